"""LocalRegistryManager of MADSci's classic registry API: a thin adapter over RegistryClient.

What differs from MADSci's own is in docs/migration.md. `_register` is the one way to resolve; IdentityResolver uses it
too. Releases go by the Registration that a manager was given, so that a manager that is collected late, or closed by a
finalizer, frees no lock that another one has taken since.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from madsci_registry._classic_client import ClassicClient, Taken, wait_seconds
from madsci_registry._grants import Key
from madsci_registry._session import FINAL_S
from madsci_registry.errors import (
    ConflictError,
    HeldError,
    InvalidError,
    LockLostError,
    NameTakenError,
    NotFoundError,
    RegistryError,
)
from madsci_registry.lock_manager import LockManager, RegistryLockError, lock_errors
from madsci_registry.types import Component

if TYPE_CHECKING:
    from madsci_registry.classic_types import RegistryEntry
    from madsci_registry.registration import Registration
    from madsci_registry.types import ComponentType

__all__ = ["RETRY_INTERVAL_SECONDS", "LocalRegistryManager", "RegistryError", "RegistryLockError"]

log = logging.getLogger("madsci_registry")

RETRY_INTERVAL_SECONDS: float = 2.0
"""Not used: who waits for a name stands in the daemon's queue and has it as soon as it is free."""

_ANSWER_PART = 0.7
"""Of FILE_LOCK_TIMEOUT: so that a program that ends on the error has ended within retry_timeout + FILE_LOCK_TIMEOUT."""


class LocalRegistryManager:
    """One registry, for one holder of locks: the instance of its LockManager.

    Connects to the registry's daemon at first use, and starts one where that is allowed. Collecting a manager frees
    nothing; its locks live until they are released or the process ends. Threads may share it; in a forked child it
    holds nothing and is a holder of its own.
    """

    FILE_LOCK_TIMEOUT: ClassVar[int] = 5
    """Seconds that a call may take until it fails where the daemon does not answer; `resolve`: beyond its
    retry_timeout. There is no file lock."""

    def __init__(self, registry_path: Path | None = None, lock_manager: LockManager | None = None) -> None:
        """Choose the registry; connect to nothing.

        Args:
            registry_path: path of its JSON file; None: by environment and folders (`registryctl where`).
            lock_manager: the holder; None: a new one.

        Raises:
            RegistryLockError: a path that cannot be one, or not on Linux.
        """
        with lock_errors():
            self.lock_manager = lock_manager if lock_manager is not None else LockManager()
            timeout_s = _ANSWER_PART * self.FILE_LOCK_TIMEOUT
            self._client = ClassicClient(registry_path or None, self.lock_manager.instance_id, timeout_s)
            self._client.serve(self)
        self._taken = Taken()

    def __repr__(self) -> str:
        return f"<LocalRegistryManager {self._client.endpoint} instance={self.lock_manager.instance_id}>"

    @property
    def registry_path(self) -> Path | None:
        """The registry's JSON file; None where MADSCI_REGISTRY_SOCKET named a socket alone."""
        return self._client.endpoint.registry

    # locks

    def resolve(
        self,
        name: str,
        component_type: ComponentType,
        metadata: dict[str, Any] | None = None,
        acquire_lock: bool = True,
        retry_timeout: float | None = None,
    ) -> str:
        """Return the ULID of a name, made if it is new, and hold the name.

        Args:
            name: 1 to 255 bytes of text.
            component_type: what it is; a known name keeps its own type, with a warning.
            metadata: merged into what is known.
            acquire_lock: False: only the identity.
            retry_timeout: seconds to wait in the queue while somebody else holds the name; None: not at all.

        Raises:
            RegistryLockError: for every failure, its `code` says which; at most FILE_LOCK_TIMEOUT seconds after
                retry_timeout. Nothing is held then.
        """
        return self._register(name, component_type, metadata, acquire_lock, retry_timeout).id

    def _register(
        self,
        name: str,
        component_type: ComponentType,
        metadata: dict[str, Any] | None,
        acquire_lock: bool,
        retry_timeout: float | None,
    ) -> Registration:
        with lock_errors():
            wait_s = wait_seconds(retry_timeout)
            registration = self._client.resolve_of_any_type(name, component_type, metadata, wait_s, acquire_lock)
            if acquire_lock:
                self._taken.add(name, registration)
            return registration

    def release(self, name: str) -> None:
        """Give back the lock on a name, if this manager's instance holds it; else do nothing.

        A lock that another manager of the same instance has taken since this one resolved the name stays. Takes at
        most 0.5 s, raises nothing and never connects; works from atexit and finalizers.
        """
        until = time.monotonic() + FINAL_S
        taken = self._taken.called(name)
        for registration in taken:
            registration._release(max(0.0, until - time.monotonic()))
        if not taken:
            self._client.release(name)

    def refresh_lock(self, name: str) -> None:
        """Make sure that this manager's instance holds the name; there is nothing to keep alive.

        Raises:
            RegistryLockError: no component is called so, or the lock is not this instance's (any more).
        """
        with lock_errors():
            taken = self._taken.called(name)
            if taken:
                try:
                    taken[-1].ensure()
                    return
                except LockLostError:
                    if not self._holds(name):
                        raise
            if not self._holds(name):
                raise self._not_mine(self._client.get(name))

    def _holds(self, name: str) -> bool:
        """Tell whether this instance holds a name in this process, by whatever manager it was taken."""
        session = self._client._shared()
        session.look(resume=True)
        return session.ledger.find(Key(self._client.instance, name)) is not None

    def _not_mine(self, component: Component) -> RegistryError:
        name, holder, old_lock = component.name, component.holder, component.old_lock
        if old_lock is not None:
            return HeldError(
                f"{name!r} is not held by this instance, but by {old_lock.label}", name=name, old_lock=old_lock
            )
        if holder is None:
            return LockLostError(f"{name!r} is not held by this instance, nor by anybody", name=name)
        by = f"{holder.label} on {holder.host}, instance {holder.instance}"
        return HeldError(f"{name!r} is not held by this instance, but by {by}", name=name, holder=holder)

    # reading

    def lookup(self, name: str) -> str | None:
        """Return the ULID of a name; None means that no component has this name, and nothing else.

        Raises:
            RegistryError: the registry could not be asked.
        """
        return self._client.read_or(None, lambda: self._client.lookup(name))

    def get_entry(self, name: str) -> RegistryEntry | None:
        """Return all about a name; None means that no component has this name, and nothing else.

        Raises:
            RegistryError: the registry could not be asked.
        """
        try:
            component = self._client.read_or(None, lambda: self._client.get(name))
        except NotFoundError:
            return None
        return self._entry(component) if component is not None else None

    def list_entries(
        self, component_type: ComponentType | None = None, include_stale: bool = False
    ) -> list[tuple[str, RegistryEntry]]:
        """Return (name, entry) of all components in the order of their names, held or not.

        Args:
            component_type: only those; None: any.
            include_stale: True: the retired ones too, which `clean_stale` has put away.

        Raises:
            RegistryError: the registry could not be asked.
        """
        components = self._list(component_type=component_type or None, include_retired=include_stale)
        return [(component.name, self._entry(component)) for component in components]

    def export(self) -> dict[str, Any]:
        """Return the whole registry in the format of registry.json, as it is at one instant.

        Raises:
            RegistryError: the registry could not be asked.
        """
        from madsci_registry.classic_types import LocalRegistry

        return self._client.read_or(LocalRegistry().model_dump(mode="json"), self._client.export)

    def _list(self, **which: Any) -> list[Component]:
        return self._client.read_or([], lambda: self._client.list(**which))

    def _entry(self, component: Component) -> RegistryEntry:
        from madsci_registry.classic_types import entry_of

        return entry_of(component, self.lock_manager.lock_ttl)

    # changing

    def rename(self, old_name: str, new_name: str, force: bool = False) -> str:
        """Give a component another name and return its ULID, which goes with the name.

        Args:
            old_name: its present name.
            new_name: its name from now on.
            force: True: although it is held; its holder keeps the lock, under the new name.

        Raises:
            RegistryLockError: it is held, by whomever, and force is False. RegistryError: no component is called
                old_name, one is called new_name, or the registry could not be asked. Nothing changed.
        """
        if old_name == new_name:
            raise NameTakenError(f"{new_name!r} is known already", name=new_name, id=self._client.get(old_name).id)
        try:
            return self._client.rename(old_name, new_name, force=force).id
        except HeldError:
            with lock_errors():
                raise

    def clean_stale(self, older_than_days: int = 7, dry_run: bool = False) -> list[str]:
        """Retire what nobody holds and nobody has seen for so long; return the names. Resolving one revives its ULID.

        Args:
            older_than_days: days.
            dry_run: True: only return the names.

        Raises:
            RegistryError: the registry could not be asked; some may be retired already.
        """
        unseen_since = _days_ago(older_than_days)
        stale = [c for c in self._list(state="free") if c.last_seen < unseen_since]
        return [c.name for c in stale if dry_run or self._retire(c, unseen_since)]

    def _retire(self, component: Component, unseen_since: str) -> bool:
        try:
            self._client.retire(component.name, id=component.id, unseen_since=unseen_since)
        except (ConflictError, HeldError, NotFoundError):  # it was used meanwhile
            return False
        return True

    def import_entries(self, data: dict[str, Any], merge: bool = True) -> None:
        """Take in a whole registry in the format of registry.json, as `export` gives it, in one step or not at all.

        What is known here stays what it is: an entry that contradicts it is left out, with a warning. Locks are not
        taken in.

        Args:
            data: with the entries by name under "entries".
            merge: False: also retire what `data` lacks; what is held stays.

        Raises:
            InvalidError: `data` or one of its entries is none; nothing changed. RegistryError: the registry could not
                be asked.
        """
        from madsci_registry.classic_types import entries_of

        entries = entries_of(data, may_lack=merge)  # an empty registry in place of this one is hardly what was meant
        invalid = [e for e in self._client.import_entries(entries, dry_run=True).entries if e.outcome == "invalid"]
        if invalid:
            reason = f"{invalid[0].name!r}: {invalid[0].reason}"
            raise InvalidError(f"entries: {reason}", field="entries", reason=reason)
        for entry in self._client.import_entries(entries, "merge" if merge else "replace").entries:
            if entry.outcome == "conflict":
                log.warning("import: %r was left as it is: %s", entry.name, entry.reason)


def _days_ago(days: float) -> str:
    """Return the instant so many days ago as the registry writes it. Raises InvalidError."""
    try:
        then = datetime.now(timezone.utc) - timedelta(days=days)
    except (TypeError, ValueError, OverflowError):
        reason = f"must be a number of days, not {days!r}"
        raise InvalidError(f"older_than_days: {reason}", field="older_than_days", reason=reason) from None
    # Not by strftime, whose years before 1000 have fewer digits: these texts are compared.
    return then.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
