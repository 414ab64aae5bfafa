"""Promise 5 from the holder's side: what state its lock is in, and that it is told of each change once. Real daemon."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from conftest import Workers
from helpers import PATIENCE_S, DaemonProcess, environment, until
from madsci_registry import Fence, HeldError, LockLostError, Registration, RegistryClient, RegistryTimeoutError, _link
from madsci_registry.protocol import GRACE_S
from madsci_registry.types import LockState


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RegistryClient]:
    with RegistryClient(daemon.registry, autostart=False) as made:
        yield made


class Told:
    """What one registration's callbacks were told, in order, and in which threads."""

    def __init__(self, registration: Registration) -> None:
        self.threads: set[int] = set()
        self._queue: SimpleQueue[Any] = SimpleQueue()
        registration.on_state(lambda registration, state: self._note(state))
        registration.on_lost(lambda registration: self._note("on_lost"))

    def _note(self, what: str) -> None:
        self.threads.add(threading.get_ident())
        self._queue.put(what)

    def next(self) -> str:
        return str(self._queue.get(timeout=PATIENCE_S))

    def nothing_more(self) -> bool:
        try:
            self._queue.get(timeout=0.05)
        except Empty:
            return True
        return False


def test_daemon_that_is_gone_suspends_the_lock_until_it_is_back(daemon: DaemonProcess, client: RegistryClient) -> None:
    """While no daemon is there the lock is suspended and still ours; when one is back it is held, with the same token.
    Each change is told once, in order, in one thread."""
    mine = client.resolve("arm", "node")
    told, token = Told(mine), mine.fencing_token
    for _ in range(2):
        daemon.kill()
        assert told.next() == "suspended"
        assert (mine.state, mine.held) == ("suspended", True)
        mine.ensure()
        daemon.start()
        assert told.next() == "held"
        assert (mine.state, mine.fencing_token) == ("held", token)
        mine.ensure()
    assert told.nothing_more()
    assert len(told.threads) == 1 and threading.get_ident() not in told.threads


def test_terminated_daemon_suspends_the_lock_too(daemon: DaemonProcess, client: RegistryClient) -> None:
    """A daemon that stops in order leaves its holders their locks, suspended until the next one."""
    mine = client.resolve("arm", "node")
    told = Told(mine)
    assert daemon.terminate() == 0
    assert told.next() == "suspended"
    daemon.start()
    assert told.next() == "held"


def test_broken_lock_is_lost_once_and_for_ever(daemon: DaemonProcess, client: RegistryClient) -> None:
    """A loss is told once to each callback, also to one that comes late; ensure raises; nothing brings the lock back,
    not a restart, not a new lock on the same name."""
    mine = client.resolve("arm", "node")
    told = Told(mine)
    with RegistryClient(daemon.registry) as operator:
        operator.break_lock("arm", reason="test")
    assert [told.next(), told.next()] == ["lost", "on_lost"]
    daemon.restart()
    again = client.resolve("arm", "node")
    assert again.state == "held"
    assert (mine.state, mine.held) == ("lost", False)
    with pytest.raises(LockLostError, match="test"):
        mine.ensure()
    assert not mine.release()
    assert again.state == "held"
    assert told.nothing_more()
    late = Told(mine)
    assert sorted([late.next(), late.next()]) == ["lost", "on_lost"]
    assert late.nothing_more()


def test_release_is_a_state_and_no_loss(client: RegistryClient) -> None:
    """A lock that was given back is released: on_state says so, on_lost does not, ensure raises."""
    mine = client.resolve("arm", "node")
    told = Told(mine)
    assert mine.release()
    assert told.next() == "released"
    assert (mine.state, mine.held) == ("released", False)
    with pytest.raises(LockLostError, match="released"):
        mine.ensure()
    assert told.nothing_more()


def test_identity_without_a_lock_has_no_state(client: RegistryClient) -> None:
    """A resolve that took no lock has none to lose: ensure raises, no callback ever comes."""
    mine = client.resolve("arm", "node", acquire_lock=False)
    told = Told(mine)
    assert (mine.state, mine.held) == (None, False)
    with pytest.raises(LockLostError, match="no lock was asked for"):
        mine.ensure()
    assert told.nothing_more()


def test_callback_that_raises_or_waits_spoils_nothing_but_what_comes_after(
    daemon: DaemonProcess, client: RegistryClient
) -> None:
    """A callback that raises is logged and the next one called; one that waits delays other callbacks, no request."""
    mine = client.resolve("arm", "node")
    go_on = threading.Event()
    mine.on_state(lambda registration, state: 1 / 0)  # type: ignore[arg-type]
    mine.on_state(lambda registration, state: go_on.wait(PATIENCE_S))  # type: ignore[arg-type]
    told = Told(mine)
    daemon.restart()
    assert client.lookup("arm") == mine.id
    mine.ensure()
    go_on.set()
    assert [told.next(), told.next()] == ["suspended", "held"]


def test_older_registration_does_not_release_what_was_resolved_anew(client: RegistryClient) -> None:
    """A client that resolves a name anew has the same lock, and from then on only the newest Registration gives it
    back: the finalizer of a forgotten object does not free what is in use."""
    old, new = client.resolve("arm", "node"), client.resolve("arm", "node")
    assert old.fencing_token == new.fencing_token
    assert not old.release()
    assert (old.state, new.state) == ("held", "held")
    assert new.release()
    assert (old.state, new.state) == ("released", "released")


def test_listener_that_comes_while_the_lock_is_suspended_is_told_of_its_return(
    daemon: DaemonProcess, client: RegistryClient
) -> None:
    """Who asks to be told while no daemon is there hears that the lock is held again; a callback that exits ends
    nothing but itself."""
    mine = client.resolve("arm", "node")
    daemon.kill()
    until(lambda: mine.state == "suspended" and mine._grant is not None and mine._grant._last_told == "suspended")
    mine.on_state(lambda registration, state: sys.exit(1))
    told = Told(mine)
    daemon.start()
    assert told.next() == "held"
    daemon.kill()
    assert told.next() == "suspended"


UNPROVEN = "proof = 'connection'\n"


@pytest.fixture
def unproven_daemon(registry_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that can prove no holder alive."""
    config = registry_path.with_name("registryd.toml")
    config.write_text(UNPROVEN)
    with DaemonProcess(registry_path, "--config", str(config)) as running:
        yield running


def test_holder_that_cannot_be_proven_gives_up_after_the_grace(
    unproven_daemon: DaemonProcess,
) -> None:
    """Where the daemon knows a holder by its connection alone, a lock that was suspended for 10 s counts as lost, since
    a new daemon may have given it away by then; coming back later does not bring it back, and the name is free."""
    with RegistryClient(unproven_daemon.registry, autostart=False) as client:
        mine = client.resolve("arm", "node")
        told = Told(mine)
        unproven_daemon.kill()
        assert told.next() == "suspended"
        mine.ensure()
        connection = client._shared()._connection
        assert connection is not None and connection.grace_s == GRACE_S
        connection.broken_at -= GRACE_S  # so much time has passed
        with pytest.raises(LockLostError, match="cannot prove"):
            mine.ensure()
        assert [told.next(), told.next()] == ["lost", "on_lost"]
        unproven_daemon.start()
        with RegistryClient(unproven_daemon.registry, autostart=False) as other:
            assert other.resolve("arm", "node", wait=PATIENCE_S).held
        assert mine.state == "lost"


def test_holder_that_cannot_be_proven_and_asks_nothing_gives_up_too(unproven_daemon: DaemonProcess) -> None:
    """The grace of an unproven holder ends by itself, without a call of its."""
    with RegistryClient(unproven_daemon.registry, autostart=False) as client:
        mine = client.resolve("arm", "node")
        told = Told(mine)
        unproven_daemon.kill()
        assert told.next() == "suspended"
        connection = client._shared()._connection
        assert connection is not None
        connection.broken_at -= GRACE_S
        assert [told.next(), told.next()] == ["lost", "on_lost"]


def test_proven_holder_is_suspended_without_end(daemon: DaemonProcess, client: RegistryClient) -> None:
    """Where the daemon can prove that the holder lives, a suspended lock is ours however long no daemon is there."""
    mine = client.resolve("arm", "node")
    daemon.kill()
    until(lambda: mine.state == "suspended")
    connection = client._shared()._connection
    assert connection is not None and connection.grace_s is None
    connection.broken_at -= 1e9
    assert mine.state == "suspended"
    mine.ensure()


@pytest.mark.parametrize("restart", [False, True])
def test_frozen_holder_learns_of_its_loss_first_thing_when_it_wakes(
    daemon: DaemonProcess, workers: Workers, tmp_path: Path, restart: bool
) -> None:
    """A holder that was stopped while its lock was broken, and the daemon perhaps restarted, gets LockLostError from
    the very first ensure() after it goes on, and its fencing token is refused by the fence of what it drives."""
    holder, next_one = workers(), workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    Fence(tmp_path / "arm.fence").check(token)
    holder.tell("ensure", "arm")
    assert holder.answer() is None
    holder.signal(signal.SIGSTOP)
    holder.tell("ensure", "arm")  # what it does first when it goes on: no thread of its client has run before
    with RegistryClient(daemon.registry, autostart=False) as operator:
        operator.break_lock("arm", reason="frozen")
    if restart:
        daemon.restart()
    newer = next_one.ask("resolve", "arm")["fencing_token"]
    Fence(tmp_path / "arm.fence").check(newer)
    holder.signal(signal.SIGCONT)
    with pytest.raises(LockLostError):
        holder.answer()
    assert holder.ask("losses", 1) == [["arm", token]]
    with pytest.raises(LockLostError):
        Fence(tmp_path / "arm.fence").check(token)
    Fence(tmp_path / "arm.fence").check(newer)


def test_ensure_does_not_pass_where_a_daemon_is_there_and_does_not_say(
    daemon: DaemonProcess, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the connection ended and a daemon accepts but does not answer, ensure raises instead of guessing; when it
    goes on, the lock is ours."""
    monkeypatch.setattr(_link, "LOOK_S", 0.2)
    mine = client.resolve("arm", "node")
    connection = client._shared()._connection
    assert connection is not None
    daemon.signal(signal.SIGSTOP)
    try:
        connection.fail()
        with pytest.raises(RegistryTimeoutError):
            mine.ensure()
    finally:
        daemon.signal(signal.SIGCONT)
    until(lambda: mine.state == "held", "for the resume")
    mine.ensure()


def test_log_that_blocks_keeps_no_loss_back(daemon: DaemonProcess, client: RegistryClient) -> None:
    """Losses are told though the log of the first one blocks for ever."""
    go_on = threading.Event()

    class Blocked(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            go_on.wait(PATIENCE_S)

    handler = Blocked()
    logging.getLogger("madsci_registry").addHandler(handler)
    try:
        first, second = client.resolve("arm", "node"), client.resolve("leg", "node")
        told = Told(second)
        with RegistryClient(daemon.registry) as operator:
            operator.break_lock("arm")
            operator.break_lock("leg")
        assert [told.next(), told.next()] == ["lost", "on_lost"]
        for lost in (first, second):
            with pytest.raises(LockLostError):
                lost.ensure()
    finally:
        go_on.set()
        logging.getLogger("madsci_registry").removeHandler(handler)


SPINS = """
import ctypes, os, sys, threading, time
from madsci_registry import LockLostError, RegistryClient
sys.setswitchinterval(60)  # the main thread keeps the interpreter: no other thread runs in between
client = RegistryClient(sys.argv[1], autostart=False)
mine = client.resolve("arm", "node")
print("held", flush=True)
while os.read(0, 1) == b"c":
    ctypes.PyDLL(None).usleep(int(sys.argv[2]))  # keeps the GIL, as vendors' calls do
    try:
        mine.ensure()
        print(mine.state, mine.fencing_token, flush=True)
    except LockLostError as error:
        print("LockLostError", flush=True)
"""


def test_vendor_call_that_keeps_the_interpreter_keeps_the_lock(daemon: DaemonProcess, workers: Workers) -> None:
    """A holder whose threads all stand still inside a call that keeps the GIL keeps its lock, over a restart of the
    daemon too, and learns of a loss by the first ensure() after the call."""
    command = [sys.executable, "-c", SPINS, str(daemon.registry), "3000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment()) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            other = workers()
            token = other.ask("get", "arm")["fencing_token"]
            os.write(process.stdin.fileno(), b"c")
            daemon.restart()
            began = time.monotonic()
            while time.monotonic() - began < 2.5:  # longer than a connection may be away while the daemon is up
                with pytest.raises(HeldError):
                    other.ask("resolve", "arm", wait=0.5)
            assert process.stdout.readline().split() == [b"held", str(token).encode()]
            os.write(process.stdin.fileno(), b"c")
            other.ask("break_lock", "arm")
            assert process.stdout.readline() == b"LockLostError\n"
        finally:
            process.kill()


def test_states_told_are_those_of_one_lock_whatever_the_order_of_kills(
    daemon: DaemonProcess, client: RegistryClient, workers: Workers
) -> None:
    """Over quick restarts with requests at the same time, held and suspended take turns, and the last word is held."""
    mine = client.resolve("arm", "node")
    seen: list[LockState] = []
    changed = threading.Condition()

    def note(_registration: Registration, state: LockState) -> None:
        with changed:
            seen.append(state)
            changed.notify_all()

    mine.on_state(note)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with suppress(RegistryTimeoutError):  # just started, and not ready to say
                mine.ensure()
            client.lookup("arm")

    client.timeout = PATIENCE_S
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            daemon.restart()
            client.lookup("arm")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    with changed:
        assert changed.wait_for(lambda: seen and seen[-1] == "held", PATIENCE_S)
        assert seen == ["suspended", "held"] * (len(seen) // 2)
