"""IdentityResolver of MADSci's classic registry API: names to ULIDs, here and in the lab that it was given.

The order is the documented one: the local registry; else the lab, whose ULID is then taken in here; else a new ULID;
then the lock; then the lab is told. Whatever the lab does, the local registry has the last word: its ULID is what a
resolve returns, and a lab that is away, slow or no lab registry is a warning, never an error.

A daemon that belongs to a lab itself does all that, and better. Then nothing is asked here, and a `lab_url` of another
lab is warned about.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from madsci_registry._arguments import item
from madsci_registry._classic_client import Taken, wait_seconds
from madsci_registry._session import FINAL_S
from madsci_registry.errors import LabUnavailableError, RegistryError
from madsci_registry.local_registry import LocalRegistryManager
from madsci_registry.lock_manager import lock_errors
from madsci_registry.types import COMPONENT_TYPES

if TYPE_CHECKING:
    from madsci_registry._lab import Known, Lab
    from madsci_registry.classic_types import AnyUrl, RegistryResolveResult
    from madsci_registry.registration import Registration
    from madsci_registry.types import ComponentType

log = logging.getLogger("madsci_registry")


class IdentityResolver:
    """Gives components their identity, by name.

    A resolver holds by its local registry's LockManager, and releases what was resolved through itself. Collecting it
    frees nothing. Threads may share it; in a forked child it holds nothing and is a holder of its own.
    """

    def __init__(self, lab_url: AnyUrl | str | None = None, local_registry: LocalRegistryManager | None = None) -> None:
        """Choose the registry; connect to nothing.

        Args:
            lab_url: where the lab registry is (http or https); None: the local registry alone.
            local_registry: None: the one of the environment and folders, for a holder of its own.

        Raises:
            RegistryLockError: there can be no local registry here.
        """
        self.lab_url = lab_url
        self.local_registry = local_registry if local_registry is not None else LocalRegistryManager()
        self._lab: Lab | None = None
        self._taken = Taken()
        self._told: dict[str, int] = {}
        """Names that the lab was told we hold, and the process that told it: a forked child holds none of them."""
        self._has_compared = False
        """Whether the daemon's lab was compared with ours."""

    def __repr__(self) -> str:
        return f"<IdentityResolver {self.local_registry!r}>"

    @property
    def lab_client(self) -> Any | None:
        """What asks the lab, made at first use; None without a lab_url."""
        if self._lab is None and self.lab_url:
            from madsci_registry._lab import Lab

            self._lab = Lab(self.lab_url)
        return self._lab

    # resolving

    def resolve(
        self,
        name: str,
        component_type: ComponentType,
        metadata: dict[str, Any] | None = None,
        retry_timeout: float | None = None,
    ) -> str:
        """Return the ULID of a name, made if neither here nor the lab knows it, and hold the name.

        Arguments and errors are those of `LocalRegistryManager.resolve`: every failure is a RegistryLockError, and
        nothing is held then. A lab that fails is a warning.
        """
        with lock_errors():
            return self._resolve(name, component_type, metadata, retry_timeout)[0].id

    def resolve_with_info(
        self,
        name: str,
        component_type: ComponentType,
        metadata: dict[str, Any] | None = None,
        retry_timeout: float | None = None,
    ) -> RegistryResolveResult:
        """As `resolve`; say also whether this very call made the ULID, and where it came from: local, lab or new."""
        with lock_errors():
            from madsci_registry.classic_types import RegistryResolveResult

            registration, source = self._resolve(name, component_type, metadata, retry_timeout)
            return RegistryResolveResult(
                name=name,
                id=registration.id,
                component_type=registration.component_type,
                is_new=registration.is_new,
                source=source,
            )

    def _resolve(
        self, name: str, component_type: ComponentType, metadata: dict[str, Any] | None, retry_timeout: float | None
    ) -> tuple[Registration, str]:
        lab: Lab | None = self.lab_client
        lab_id, lab_answers, wait_s = None, True, wait_seconds(retry_timeout)
        if lab is not None:
            item(name, component_type, metadata)
            until = time.monotonic() + wait_s
            lab_id, lab_answers = self._adopt(lab, name, component_type, wait_s)
            wait_s = until - time.monotonic()
        registration = self.local_registry._register(name, component_type, metadata, True, wait_s)
        self._taken.add(name, registration)
        try:
            if lab is not None and registration.lab != "none":
                self._leave_to_daemon(lab)
            elif lab is not None and lab_answers:
                self._tell(lab, name, registration, metadata)
        except BaseException:  # Ctrl-C above all: who hears of no result must not hold the name
            if registration._is_first:
                registration.release()
            raise
        if registration.is_new:
            return registration, "new"
        return registration, "lab" if registration.id == lab_id else registration.source

    def _adopt(self, lab: Lab, name: str, component_type: str, wait_s: float) -> tuple[str | None, bool]:
        """Take in the lab's ULID of a name that is new here; return it, and whether the lab answers.

        Raises:
            RegistryError: the local registry could not be asked.
        """
        if self.local_registry._client.lookup_to_resolve(name, wait_s) is not None or self._daemon_has_lab(lab):
            return None, True
        try:
            known = lab.find(name)
        except LabUnavailableError as error:
            log.warning("%r is resolved without the lab: %s", name, error)
            return None, False
        if known is None:
            return None, True
        self._take_in(name, known, component_type)
        return known.id, True

    def _leave_to_daemon(self, lab: Lab) -> None:
        if not self._has_compared:
            self._daemon_has_lab(lab)

    def _daemon_has_lab(self, lab: Lab) -> bool:
        """Tell whether the daemon belongs to a lab; the first time, warn if that is another one than ours."""
        try:
            daemons: dict[str, Any] = self.local_registry._client.status().get("lab", {"state": "off"})
        except RegistryError:
            return False  # who asks next hears of that
        if daemons["state"] == "off":
            return False
        if not self._has_compared and not any(lab.is_at(url) for url in daemons.get("urls", [daemons["url"]])):
            log.warning(
                "%r is not asked: the daemon belongs to the lab at %s, and that one counts", lab, daemons["url"]
            )
        self._has_compared = True
        return True

    def _take_in(self, name: str, known: Known, component_type: str) -> None:
        wanted = known.component_type if known.component_type in COMPONENT_TYPES else component_type
        entry = {"id": known.id, "component_type": wanted}
        (imported,) = self.local_registry._client.import_entries({name: entry}).entries
        if imported.outcome not in ("added", "same"):
            log.warning("the lab knows %r as %s, which is not taken over: %s", name, known.id, imported.reason)

    def _tell(self, lab: Lab, name: str, registration: Registration, metadata: dict[str, Any] | None) -> None:
        holder = self.local_registry.lock_manager
        entry = {
            "id": registration.id,
            "component_type": registration.component_type,
            "metadata": metadata or {},
            "acquire_lock": True,
            "lock_holder_host": holder.hostname,
            "lock_holder_pid": holder.pid,
            "lock_holder_instance": holder.instance_id,
        }
        try:
            lab.tell(name, entry)
        except LabUnavailableError as error:
            log.warning("the lab was not told of %r: %s", name, error)
        else:
            self._told[name] = os.getpid()

    def lookup(self, name: str) -> str | None:
        """Return the ULID of a name, without a lock: the local registry's, else the lab's.

        None means that the local registry does not know it, nor the lab, where there is one and it answers; one that
        was given and does not is warned about.

        Raises:
            RegistryError: the local registry could not be asked.
        """
        id, lab = self.local_registry.lookup(name), self.lab_client
        if id is not None or lab is None or self._daemon_has_lab(lab):
            return id
        try:
            known: Known | None = lab.find(name)
        except LabUnavailableError as error:
            log.warning("%r is looked up without the lab: %s", name, error)
            return None
        return known.id if known is not None else None

    # releasing

    def release(self, name: str) -> None:
        """Give back the lock on a name, if it was resolved through this resolver, or its local registry holds it.

        A lock that another resolver of the same holder has taken since stays. Takes at most 0.5 s, the lab included,
        raises nothing and never connects; works from atexit and finalizers.
        """
        self._release(name, self._taken.called(name), time.monotonic() + FINAL_S)

    def release_all(self) -> None:
        """Give back all locks on names that were resolved through this resolver; as `release`, 0.5 s in all."""
        until = time.monotonic() + FINAL_S
        for name in self._taken.names():
            self._release(name, self._taken.all(name), until)

    def _release(self, name: str, taken: list[Registration], until: float) -> None:
        for registration in taken:
            registration._release(max(0.0, until - time.monotonic()))
        if not taken:
            self.local_registry.release(name)
        if not all(registration._has_ended for registration in taken):
            return  # a newer resolver of the same holder has it, and its word to the lab counts
        if self._lab is not None and self._told.pop(name, None) == os.getpid():
            self._lab.unlock(name, self.local_registry.lock_manager.instance_id, until - time.monotonic())
