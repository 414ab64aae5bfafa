"""What a resolve gives: the identity of a component and, if asked for, its lock."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from madsci_registry._grants import lab_state
from madsci_registry._process import this_process
from madsci_registry.errors import LockLostError

if TYPE_CHECKING:
    from madsci_registry._grants import Grant
    from madsci_registry._session import Session
    from madsci_registry.client import RegistryClient
    from madsci_registry.types import ComponentType, LabState, LockState


class Registration:
    """A resolved name; `str()` gives the ULID.

    It keeps its client alive; collecting it frees nothing: the lock lives until it is released, lost, or its process
    ends. A client that resolves a name anew has the same lock, which the new Registration releases then: an older one
    no longer does, so that no finalizer of a forgotten object frees what is in use. Threads may share it. In a forked
    child it holds nothing, and releasing it there does nothing.
    """

    def __init__(
        self, client: RegistryClient, session: Session, result: dict[str, Any], grant: Grant | None = None
    ) -> None:
        self._client = client
        self._session = session
        self._grant = grant
        self._number = 0
        """Which Registration of the grant it is; 0: made by `hold`, which releases at the end of its block."""
        self._name: str = result["name"]
        self.id: str = result["id"]
        """The ULID: 26 characters, for ever the same for this component."""
        self.component_type: ComponentType = result["component_type"]
        self.is_new: bool = result["is_new"]
        """True: this very resolve made the component."""
        self.source: str = result.get("source", "local")
        """Where the ULID came from: "lab" where this very resolve learnt it there, else "local"."""
        self._lab: LabState = lab_state(result.get("lab"))
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
        """The number that grows with every grant of the name; None without a lock.

        It changes while the lock is held where the component is renamed, and grows where the lab confirms later a lock
        that was taken without it: read it each time, rather than once.
        """
        return self._grant.fencing_token if self._grant else None

    @property
    def state(self) -> LockState | None:
        """How the lock stands: held, suspended, lost or released; None where there is none in this process.

        suspended: the daemon is not there, and the lock is still ours: for as long as this process lives where the
        daemon could prove that, else for 10 s. lost and released are for ever. What the daemon has said counts even
        if nobody has read it yet, as after a SIGSTOP; otherwise asks nobody.
        """
        if self._grant is None or self._session.process != this_process():
            return None
        return self._grant.state(is_connected=self._session.look())

    @property
    def lab(self) -> LabState:
        """How it stands in the lab: none, confirmed or unconfirmed; without a lock, whether the lab knew of the ULID.

        By the daemon's last word: it says so when it changes, and nobody keeps it up while `state` is suspended. none:
        the daemon has no lab, or there is no lock in this process.
        """
        if self._grant is None:
            return self._lab
        if self._session.process != this_process():
            return "none"
        self._session.look()
        return self._grant.lab

    @property
    def preferred_id(self) -> str | None:
        """The ULID that the lab prefers for this component, which the next resolve gives; None: the one that it has.

        Two hosts made the component while they were apart. This Registration keeps its `id`, and both ULIDs stay known
        as the same component.
        """
        if self._grant is None or self._session.process != this_process():
            return None
        self._session.look()
        preferred = self._grant.preferred_id
        return preferred if preferred != self.id else None

    @property
    def held(self) -> bool:
        """True while the lock is ours, held or suspended; see `state`."""
        return self.state in ("held", "suspended")

    def ensure(self) -> None:
        """Do nothing while the lock is ours, held or suspended; to be called before acting on it.

        Takes microseconds while the connection is up. Where it is down, but a daemon is there to be asked, as after a
        SIGSTOP over a restart, that one says whether the lock is still ours; this may take 2 s.

        Raises:
            LockLostError: it is lost or released, belongs to the parent of this forked process, or was never taken.
            RegistryError: a daemon is there, but did not answer (timeout) or refuses to say that the lock is ours: it
                may be another's, do not act.
        """
        grant = self._grant
        if grant is None:
            raise self._lost("no lock was asked for")
        if self._session.process != this_process():
            raise self._lost("it belongs to the parent of this process")
        self._session.look(resume=True)
        if not grant.held:
            raise self._lost(grant.end_reason)

    def _lost(self, reason: str) -> LockLostError:
        message = f"{self.name!r} is not held: {reason}"
        return LockLostError(message, name=self.name, fencing_token=self.fencing_token, reason=reason)

    def on_lost(self, callback: Callable[[Registration], None]) -> None:
        """Call `callback(registration)` once when the lock is lost, at once if it is lost already.

        A release is no loss. All callbacks run one after the other in one thread of their own.
        """
        if self._grant is not None and self._session.process == this_process():
            self._grant.on_lost(callback, self)

    def on_state(self, callback: Callable[[Registration, LockState], None]) -> None:
        """Call `callback(registration, state)` once at each change of `state`, at once if the lock has ended already.

        Also where `lab` (with it perhaps `fencing_token`) or `preferred_id` has changed, with the state as it was. In
        the order in which the changes happened, in the thread of all callbacks; nothing comes after lost or released.
        Which state it is says the argument: `registration.state` may have changed again.
        """
        if self._grant is not None and self._session.process == this_process():
            self._grant.on_state(callback, self)

    def release(self) -> bool:
        """Give the lock back; True if it was held here until now.

        False, and nothing changes, where it has ended already, or where this client has resolved the name anew since:
        then the newest Registration releases it, and older ones end with that.

        Takes at most 0.5 s, raises nothing and never connects: where the daemon is away it hears of it when it is back.
        Works from atexit and finalizers.
        """
        return self._release(self._client.timeout)

    def _release(self, within_s: float) -> bool:
        """As `release`, in at most so many seconds, for who has many to release."""
        grant = self._grant
        return grant is not None and grant.latest == self._number and self._session.release(grant, within_s)

    @property
    def _may_release(self) -> bool:
        """True while the lock is ours and no newer Registration has it; asks nobody."""
        grant = self._grant
        return grant is not None and grant.held and grant.latest == self._number

    @property
    def _is_first(self) -> bool:
        """True: the resolve that gave it took the lock, which this client did not hold before."""
        return self._number == 1

    @property
    def _has_ended(self) -> bool:
        """True: there is no lock (any more), as far as this process knows; asks nobody."""
        return self._grant is None or not self._grant.held

    def _own(self, grant: Grant) -> None:
        """Be the one that releases the lock from now on."""
        self._number = grant.hand_out()

    def _give_back(self) -> bool:
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
        if registration.state is not None:  # else a forked child leaves its parent's block
            grant.leave(registration._give_back)
