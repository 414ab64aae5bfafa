"""LockManager and RegistryLockError of MADSci's classic registry API.

A LockManager stands for one holder: what LocalRegistryManagers with the same `instance_id` hold in one process is held
once. It keeps nothing alive: the daemon knows by the kernel whether a holder lives, so there are no heartbeats.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, ClassVar

from madsci_registry.errors import (
    InternalError,
    PermissionDeniedError,
    RegistryError,
    RegistryTimeoutError,
    UnknownOutcomeError,
)
from madsci_registry.types import Holder, OldLock

if TYPE_CHECKING:
    from madsci_registry.classic_types import RegistryEntry, RegistryLock
    from madsci_registry.local_registry import LocalRegistryManager


class RegistryLockError(RegistryError):
    """A name could not be resolved or locked: held by somebody else, or no registry to ask, or refused.

    MADSci ends its program on this error only, and goes on with a random ULID after any other one; so it stands for
    every failure of a resolve. `code` and `retry` are those of the cause, such as held, unavailable, timeout,
    permission_denied; the cause itself is `__cause__`.
    """

    code = "held"
    retry = True
    name: str | None = None
    holder: Holder | None = None
    """Who holds the name, where that is why."""
    old_lock: OldLock | None = None
    """The lock of an old program, where that is why."""
    is_me: bool = False
    """True: another instance in this very process holds it."""
    hint: str | None = None
    """What a person can do."""

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(str(args[0]) if args else "", **facts)
        self.args = args

    def __reduce__(self) -> Any:
        return type(self), self.args, vars(self)


class RegistryLockTimeoutError(RegistryLockError, TimeoutError):
    """The daemon did not answer in time; a TimeoutError, as the Timeout of a file lock was."""


@contextmanager
def lock_errors() -> Iterator[None]:
    """Turn every failure inside into a RegistryLockError."""
    try:
        yield
    except RegistryLockError:
        raise
    except Exception as error:
        # Faults of ours too: a MADSci program goes on with a random ULID after whatever is no RegistryLockError.
        raise _lock_error(error) from error


def _lock_error(cause: Exception) -> RegistryLockError:
    is_late = isinstance(cause, (RegistryTimeoutError, UnknownOutcomeError))
    cls = RegistryLockTimeoutError if is_late else RegistryLockError
    if isinstance(cause, PermissionError):
        cause = PermissionDeniedError(str(cause), path=cause.filename)
    elif not isinstance(cause, RegistryError):
        cause = InternalError(f"{type(cause).__name__}: {cause}")
    facts = {key: value for key, value in vars(cause).items() if key != "message"}
    hint = facts.get("hint")
    error = cls(f"{cause.message}; {hint}" if hint else cause.message, **facts)
    vars(error).update(code=cause.code, retry=cause.retry)
    return error


class LockManager:
    """One holder of locks, by its `instance_id`. Holds nothing by itself; safe to share between threads.

    `acquire`, `refresh` and `release` change an entry object and ask nobody: what locks a name for everybody is
    `LocalRegistryManager.resolve`. In a forked child the same LockManager is a holder of its own.
    """

    LOCK_TTL: ClassVar[timedelta] = timedelta(seconds=30)
    """How long an entry object passes for locked; a name's lock lives as long as its process, whatever this says."""
    HEARTBEAT_INTERVAL: ClassVar[int] = 10
    """Seconds; accepted and not used."""

    def __init__(
        self,
        instance_id: str | None = None,
        lock_ttl: timedelta | None = None,
        heartbeat_interval: int | None = None,
    ) -> None:
        """Be a holder.

        Args:
            instance_id: at most 128 characters; the same in one process is the same holder. None: a new ULID.
            lock_ttl: how long entry objects pass for locked; None: LOCK_TTL.
            heartbeat_interval: seconds; not used. None: HEARTBEAT_INTERVAL.
        """
        self.instance_id = instance_id or _new_instance()
        self.hostname = socket.gethostname()
        self.lock_ttl = lock_ttl or self.LOCK_TTL
        self.heartbeat_interval = heartbeat_interval or self.HEARTBEAT_INTERVAL

    @property
    def pid(self) -> int:
        """This process, also in a forked child."""
        return os.getpid()

    # entry objects

    def create_lock(self) -> RegistryLock:
        """Return a new lock of this holder, from now on for `lock_ttl`."""
        from madsci_registry.classic_types import RegistryLock

        now = datetime.now(timezone.utc)
        return RegistryLock(
            holder_pid=self.pid,
            holder_host=self.hostname,
            holder_instance=self.instance_id,
            acquired_at=now,
            heartbeat_at=now,
            expires_at=now + self.lock_ttl,
        )

    def can_acquire(self, entry: RegistryEntry) -> tuple[bool, str]:
        """Tell whether `acquire` would succeed on this entry object, and why or why not."""
        lock = entry.lock
        if lock is None:
            return True, "nobody has a lock on it"
        if entry.is_locked_by(self.instance_id):
            return True, "the lock is this instance's own"
        holder = f"pid {lock.holder_pid} on {lock.holder_host}"
        if not entry.is_locked():
            return True, f"the lock of {holder} expired at {lock.expires_at}"
        return False, f"locked by {holder} until {lock.expires_at}"

    def acquire(self, entry: RegistryEntry) -> RegistryEntry:
        """Put a new lock of this holder on the entry object, and return it.

        Raises:
            RegistryLockError: it has a lock of another holder that has not expired; the entry is as it was.
        """
        can, reason = self.can_acquire(entry)
        if not can:
            raise RegistryLockError(f"cannot lock {entry.id}: {reason}")
        entry.lock = self.create_lock()
        entry.last_seen = entry.lock.acquired_at
        return entry

    def refresh(self, entry: RegistryEntry) -> RegistryEntry:
        """Let this holder's lock on the entry object last for `lock_ttl` from now, and return the entry.

        Raises:
            RegistryLockError: the entry has no lock, or another holder's; it is as it was.
        """
        if entry.lock is None or not entry.is_locked_by(self.instance_id):
            raise RegistryLockError(f"cannot refresh the lock on {entry.id}: it is not this instance's")
        now = datetime.now(timezone.utc)
        entry.lock = entry.lock.model_copy(update={"heartbeat_at": now, "expires_at": now + self.lock_ttl})
        entry.last_seen = now
        return entry

    def release(self, entry: RegistryEntry) -> RegistryEntry:
        """Take this holder's lock off the entry object, and return it; another holder's stays."""
        if entry.is_locked_by(self.instance_id):
            entry.lock = None
        return entry

    # heartbeats: the kernel tells the daemon who lives

    def start_heartbeat(self, name: str, registry: LocalRegistryManager) -> None:
        """Do nothing: the lock lives as long as its process."""

    def stop_heartbeat(self, name: str) -> None:
        """Do nothing: the lock stays until it is released."""

    def stop_all_heartbeats(self) -> None:
        """Do nothing: locks stay until they are released."""


def _new_instance() -> str:
    from ulid import ULID

    # Not by ULID(), which takes a lock: in a forked child, whoever had it may not be there to free it.
    return str(ULID.from_bytes(int(time.time() * 1000).to_bytes(6, "big") + os.urandom(10)))
