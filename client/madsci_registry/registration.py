"""What a resolve gives: the identity of a component and, if asked for, its lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from madsci_registry.errors import LockLostError

if TYPE_CHECKING:
    from madsci_registry._ledger import Grant
    from madsci_registry._session import Session
    from madsci_registry.client import RegistryClient
    from madsci_registry.types import ComponentType


class Registration:
    """A resolved name; `str()` gives the ULID.

    It keeps its client alive; collecting it frees nothing: the lock lives until it is released, lost, or its process
    ends. Threads may share it. In a forked child it holds nothing, and releasing it there does nothing.
    """

    def __init__(
        self, client: RegistryClient, session: Session, result: dict[str, Any], grant: Grant | None = None
    ) -> None:
        self._client = client
        self._session = session
        self._grant = grant
        self._name: str = result["name"]
        self.id: str = result["id"]
        """The ULID: 26 characters, for ever the same for this component."""
        self.component_type: ComponentType = result["component_type"]
        self.is_new: bool = result["is_new"]
        """True: this very resolve made the component."""
        self.source: str = result.get("source", "local")
        """Where the identity came from: "local" or "lab"."""
        self.acquired_at: str | None = result.get("acquired_at")
        """When the lock was granted (UTC, ISO 8601); None without a lock."""
        self.warnings: tuple[str, ...] = tuple(result.get("warnings", ()))
        """What a person should know, such as that this name belonged to a component that was renamed."""

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        lock = f", fencing_token={self.fencing_token}, held={self.held}" if self._grant else ""
        return f"<Registration {self.name!r} id={self.id}{lock}>"

    @property
    def name(self) -> str:
        """The component's name; follows a rename while the lock is held."""
        return self._grant.key.name if self._grant else self._name

    @property
    def fencing_token(self) -> int | None:
        """The number that grows with every grant of the name; None without a lock. Follows a rename."""
        return self._grant.fencing_token if self._grant else None

    @property
    def held(self) -> bool:
        """True while the lock is held, as far as this process has been told; asks nobody."""
        return self._grant is not None and self._grant.held and self._session.pid == os.getpid()

    def ensure(self) -> None:
        """Do nothing while the lock is held; asks nobody.

        Raises:
            LockLostError: it is lost or released, belongs to the parent of this forked process, or was never taken.
        """
        if self.held:
            return
        reason = "no lock was asked for" if self._grant is None else self._grant.end_reason
        if self._session.pid != os.getpid():
            reason = "it belongs to the parent of this process"
        message = f"{self.name!r} is not held: {reason}"
        raise LockLostError(message, name=self.name, fencing_token=self.fencing_token, reason=reason)

    def on_lost(self, callback: Callable[[Registration], None]) -> None:
        """Call `callback(registration)` once when the lock is lost, at once if it is lost already.

        A release is no loss. Callbacks run one after the other in a thread of their own.
        """
        if self._grant is not None and self._session.pid == os.getpid():
            self._grant.on_lost(callback, self)

    def release(self) -> bool:
        """Give the lock back; True if it was held here until now.

        Takes at most 0.5 s, raises nothing and never connects: where the daemon is away it hears of it when it is back.
        Works from atexit and finalizers. Other Registrations of the same client for this name end too.
        """
        return self._grant is not None and self._session.release(self._grant, self._client.timeout)


class Held:
    """Holds a name while its `with` block runs; made by `RegistryClient.hold`."""

    def __init__(self, take: Callable[[], tuple[Registration, Grant]]) -> None:
        self._take = take
        self._entered: list[tuple[Registration, Grant]] = []

    def __enter__(self) -> Registration:
        entered = self._take()
        self._entered.append(entered)
        return entered[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        registration, grant = self._entered.pop()
        grant.leave(registration.release)
