"""LockManager on entry objects, and RegistryLockError."""

from __future__ import annotations

import os
import pickle
import socket
from datetime import datetime, timedelta, timezone

import pytest

from classic import ULID
from madsci_registry import LockManager, RegistryEntry, RegistryError, RegistryLockError
from madsci_registry.errors import HeldError, RegistryTimeoutError, UnavailableError, UnknownOutcomeError
from madsci_registry.lock_manager import lock_errors
from madsci_registry.names import is_ulid
from madsci_registry.types import Holder

MINUTE = timedelta(minutes=1)


def new_entry() -> RegistryEntry:
    then = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return RegistryEntry(id=ULID, component_type="node", created_at=then, last_seen=then)


def expire(entry: RegistryEntry) -> None:
    assert entry.lock is not None
    entry.lock = entry.lock.model_copy(update={"expires_at": datetime.now(timezone.utc) - MINUTE})


def test_manager_has_its_defaults() -> None:
    """A LockManager without arguments is an instance of its own, with the class's TTL and interval."""
    one, other = LockManager(), LockManager()
    assert is_ulid(one.instance_id) and one.instance_id != other.instance_id
    assert (one.lock_ttl, one.heartbeat_interval) == (timedelta(seconds=30), 10)
    assert (one.hostname, one.pid) == (socket.gethostname(), os.getpid())


def test_manager_takes_what_it_is_given() -> None:
    """instance_id, lock_ttl and heartbeat_interval are what was given."""
    manager = LockManager("me", MINUTE, 3)
    assert (manager.instance_id, manager.lock_ttl, manager.heartbeat_interval) == ("me", MINUTE, 3)


def test_subclass_may_have_other_defaults() -> None:
    """LOCK_TTL and HEARTBEAT_INTERVAL of a subclass are its defaults."""

    class Long(LockManager):
        LOCK_TTL = MINUTE
        HEARTBEAT_INTERVAL = 60

    assert (Long().lock_ttl, Long().heartbeat_interval) == (MINUTE, 60)


def test_create_lock_is_this_process_from_now_on() -> None:
    """create_lock names host, process and instance, and lasts for lock_ttl from now."""
    manager = LockManager("me", MINUTE)
    lock = manager.create_lock()
    assert (lock.holder_host, lock.holder_pid, lock.holder_instance) == (socket.gethostname(), os.getpid(), "me")
    assert lock.acquired_at == lock.heartbeat_at == lock.expires_at - MINUTE
    assert abs(lock.acquired_at - datetime.now(timezone.utc)) < MINUTE


def test_acquire_locks_the_entry_itself() -> None:
    """Acquire puts a lock on the very entry it is given, returns it, and has it seen now."""
    manager, entry = LockManager("me"), new_entry()
    assert manager.can_acquire(entry)[0]
    assert manager.acquire(entry) is entry
    assert entry.is_locked() and entry.is_locked_by("me")
    assert entry.lock is not None and entry.last_seen == entry.lock.acquired_at


def test_acquire_of_a_locked_entry_is_refused() -> None:
    """Another instance's living lock refuses can_acquire, with the reason, and acquire, with RegistryLockError."""
    entry = LockManager("me").acquire(new_entry())
    before = entry.model_copy(deep=True)
    can, reason = LockManager("you").can_acquire(entry)
    assert not can and f"pid {os.getpid()} on {socket.gethostname()}" in reason
    with pytest.raises(RegistryLockError, match="pid") as refused:
        LockManager("you").acquire(entry)
    assert (entry, refused.value.code) == (before, "held")


def test_acquire_of_an_own_or_expired_lock_renews_it() -> None:
    """The same instance, also by another LockManager, may acquire anew; anybody may where the lock has expired."""
    entry = LockManager("me").acquire(new_entry())
    assert LockManager("me").can_acquire(entry)[0] and LockManager("me").acquire(entry).is_locked()
    expire(entry)
    can, reason = LockManager("you").can_acquire(entry)
    assert can and "expired" in reason
    assert LockManager("you").acquire(entry).is_locked_by("you")


def test_refresh_lets_an_own_lock_last() -> None:
    """Refresh keeps since when the lock is held, and lets it last from now; an expired one too."""
    manager = LockManager("me")
    entry = manager.acquire(new_entry())
    assert entry.lock is not None
    acquired_at = entry.lock.acquired_at
    expire(entry)
    assert manager.refresh(entry) is entry and entry.is_locked()
    assert entry.lock.acquired_at == acquired_at
    assert entry.last_seen == entry.lock.heartbeat_at >= acquired_at


@pytest.mark.parametrize("owner", ["you", None])
def test_refresh_of_what_is_not_ones_own_is_refused(owner: str | None) -> None:
    """Refresh raises RegistryLockError for another instance's lock and for none, and changes nothing."""
    entry = LockManager(owner).acquire(new_entry()) if owner else new_entry()
    before = entry.model_copy(deep=True)
    with pytest.raises(RegistryLockError):
        LockManager("me").refresh(entry)
    assert entry == before


def test_release_takes_off_ones_own_lock_only() -> None:
    """Release returns the entry without its own lock; another instance's stays, and none is none."""
    entry = LockManager("me").acquire(new_entry())
    assert LockManager("you").release(entry) is entry and entry.is_locked_by("me")
    assert LockManager("me").release(entry) is entry and entry.lock is None
    assert LockManager("me").release(entry).lock is None


# RegistryLockError


def test_lock_error_is_a_registry_error_and_made_like_any_exception() -> None:
    """RegistryLockError takes any arguments, as the documented one does, and is a RegistryError."""
    assert issubclass(RegistryLockError, RegistryError)
    assert (RegistryLockError().args, RegistryLockError("a", 1).args) == ((), ("a", 1))
    assert str(RegistryLockError("why")) == "why"


def test_lock_error_says_what_its_cause_says() -> None:
    """Of every failure comes a RegistryLockError with the message, code, retry and facts of its cause; also pickled."""
    holder = Holder(pid=7, uid=0, gid=0, proof="pidfd", host="lab1", session="s", since="now", instance="i")
    with pytest.raises(RegistryLockError) as caught, lock_errors():
        raise HeldError("held by 7", name="arm", holder=holder, is_me=True)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (str(error), error.code, error.retry, error.name) == ("held by 7", "held", True, "arm")
        assert (error.holder, error.is_me) == (holder, True)
    assert isinstance(caught.value.__cause__, HeldError)
    with pytest.raises(RegistryLockError, match="nobody there; start it") as caught, lock_errors():
        raise UnavailableError("nobody there", hint="start it")
    assert caught.value.code == "unavailable"


@pytest.mark.parametrize("cause", [RegistryTimeoutError("late"), UnknownOutcomeError("late")])
def test_lock_error_for_want_of_an_answer_is_a_timeout_error(cause: RegistryError) -> None:
    """Where the daemon did not answer in time the RegistryLockError is a TimeoutError, as a file lock's Timeout was."""
    with pytest.raises(TimeoutError) as caught, lock_errors():
        raise cause
    assert isinstance(caught.value, RegistryLockError) and caught.value.code == cause.code
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.code) == (type(caught.value), "late", cause.code)


def test_fault_is_a_lock_error_too_and_ctrl_c_is_not() -> None:
    """Whatever goes wrong is a RegistryLockError, since MADSci goes on after anything else; Ctrl-C stays Ctrl-C."""
    with pytest.raises(RegistryLockError, match="FileNotFoundError: gone") as caught, lock_errors():
        raise FileNotFoundError("gone")
    assert caught.value.code == "internal"
    with pytest.raises(KeyboardInterrupt), lock_errors():
        raise KeyboardInterrupt
