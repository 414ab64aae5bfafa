"""Locks of one process: instances, nesting, threads, losses, Ctrl-C, forks. A real daemon."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import PATIENCE_S, DaemonProcess, Worker, environment, until
from madsci_registry import (
    HeldError,
    InvalidError,
    LockLostError,
    Registration,
    RegistryClient,
    RegistryTimeoutError,
    SessionRequiredError,
    UnknownOutcomeError,
    WrongTypeError,
)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RegistryClient]:
    with RegistryClient(daemon.registry) as made:
        yield made


@pytest.fixture
def other(daemon: DaemonProcess) -> Iterator[RegistryClient]:
    with RegistryClient(daemon.registry) as made:
        yield made


def test_resolve_by_another_client_of_the_process_is_refused_as_me(
    client: RegistryClient, other: RegistryClient
) -> None:
    """Two clients of one process are two instances: the second is told who holds the name, and that it is itself."""
    mine = client.resolve("a", "node")
    with pytest.raises(HeldError) as caught:
        other.resolve("a", "node")
    assert (caught.value.is_me, caught.value.id, caught.value.place) == (True, mine.id, None)
    assert caught.value.holder is not None
    assert (caught.value.holder.pid, caught.value.holder.instance) == (os.getpid(), client.instance)
    assert len(client.sessions()) == 1


def test_resolve_again_by_the_same_client_gives_the_same_grant(client: RegistryClient) -> None:
    """One client resolving a name twice has one lock: releasing either registration ends both."""
    first, second = client.resolve("a", "node"), client.resolve("a", "node")
    assert (first.is_new, second.is_new) == (True, False)
    assert first.fencing_token == second.fencing_token
    assert second.release()
    assert not first.held
    assert not first.release()
    with pytest.raises(LockLostError):
        first.ensure()


def test_hold_nested_releases_with_the_last_block(client: RegistryClient) -> None:
    """Holds nest: the lock is given back when the outermost block ends, and not before."""
    with client.hold("a", "node") as outer:
        with client.hold("a", "node") as inner:
            assert str(inner) == outer.id
        outer.ensure()
        assert client.get("a").state == "held"
    assert not outer.held
    assert client.get("a").state == "free"


def test_hold_of_a_resolved_name_leaves_it_resolved(client: RegistryClient) -> None:
    """A block that holds what resolve took before does not take it away from who resolved it."""
    mine = client.resolve("a", "node")
    with client.hold("a", "node"):
        pass
    assert mine.held
    assert client.get("a").state == "held"


def test_hold_by_many_threads_of_one_client_is_held_in_each_block(
    daemon: DaemonProcess, client: RegistryClient
) -> None:
    """Threads that enter and leave hold of one name at once are never left in a block without the lock."""
    errors: list[str] = []

    def enter_and_leave(times: int) -> None:
        for _ in range(times):
            with client.hold("a", "node") as registration:
                component = client.get("a")
                if not registration.held or component.fencing_token != registration.fencing_token:
                    errors.append(f"{registration!r} while the daemon says {component}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter_and_leave, [40] * 8))
    assert not errors
    assert client.get("a").state == "free"


def test_release_by_name_ends_only_what_this_client_holds(client: RegistryClient, other: RegistryClient) -> None:
    """A release of a name that this client does not hold answers False and changes nothing."""
    mine = client.resolve("a", "node")
    assert not other.release("a")
    assert mine.held
    assert client.release("a")
    assert not client.release("a")
    assert other.resolve("a", "node").held


def test_release_all_returns_what_was_held(client: RegistryClient, other: RegistryClient) -> None:
    """release_all frees every lock of this client and none of another one."""
    kept = other.resolve("kept", "node")
    client.resolve_many([(f"n{i}", "node") for i in range(20)])
    assert sorted(client.release_all()) == sorted(f"n{i}" for i in range(20))
    assert kept.held
    assert [c.name for c in client.list(state="held")] == ["kept"]


def test_close_frees_what_the_client_held(client: RegistryClient, other: RegistryClient) -> None:
    """After close the next one has the name, and the closed client refuses to be used."""
    client.resolve("a", "node")
    client.close()
    client.close()
    assert other.resolve("a", "node").held
    with pytest.raises(SessionRequiredError):
        client.lookup("a")


def test_collecting_a_client_frees_nothing(daemon: DaemonProcess, other: RegistryClient) -> None:
    """A client and a registration that are garbage still hold the name: only release, close and death free it."""
    RegistryClient(daemon.registry, autostart=False).resolve("a", "node")
    with pytest.raises(HeldError):
        other.resolve("a", "node")


def test_resolve_with_another_type_is_refused(client: RegistryClient) -> None:
    """A known name with another component_type is wrong_type, and nothing is held after it."""
    client.resolve("a", "node").release()
    with pytest.raises(WrongTypeError) as caught:
        client.resolve("a", "module")
    assert (caught.value.component_type, caught.value.given) == ("node", "module")
    assert client.get("a").state == "free"


@pytest.mark.parametrize("wait", [None, math.nan, -1, True, "1"])
def test_resolve_with_a_wait_that_is_none_is_invalid(client: RegistryClient, wait: object) -> None:
    """A wait is a number of seconds; None, NaN, negatives, booleans and text are refused by name."""
    with pytest.raises(InvalidError) as caught:
        client.resolve("a", "node", wait=wait)  # type: ignore[arg-type]
    assert caught.value.field == "wait"


def test_resolve_with_wait_is_refused_with_its_place_when_that_is_over(
    client: RegistryClient, other: RegistryClient
) -> None:
    """A waiter whose time is over is told its place in the queue, and leaves it."""
    client.resolve("a", "node")
    before = time.monotonic()
    with pytest.raises(HeldError) as caught:
        other.resolve("a", "node", wait=0.2)
    assert time.monotonic() - before >= 0.2
    assert (caught.value.place, caught.value.waiting) == (1, 1)
    assert client.get("a").waiting == 0


def test_resolve_with_wait_gets_the_name_when_it_is_released(client: RegistryClient, other: RegistryClient) -> None:
    """A waiter has the name as soon as it is released, with a higher token."""
    mine = client.resolve("a", "node")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(other.resolve, "a", "node", wait=math.inf)
        until(lambda: client.get("a").waiting == 1, "for the waiter")
        mine.release()
        theirs = waiting.result(PATIENCE_S)
    assert theirs.held
    assert (theirs.fencing_token or 0) > (mine.fencing_token or 0)


def interrupting(condition: Callable[[], object], at: list[float]) -> threading.Thread:
    """Send this process SIGINT when `condition` is true, and note when."""

    def run() -> None:
        until(condition, "to interrupt")
        at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_resolve_interrupted_by_ctrl_c_comes_out_and_leaves_the_queue(
    client: RegistryClient, other: RegistryClient, workers: Callable[[], Worker]
) -> None:
    """Ctrl-C comes out of a wait within 0.2 s and withdraws the request: the name goes to the next one."""
    mine = client.resolve("a", "node")
    at: list[float] = []
    thread = interrupting(lambda: client.get("a").waiting == 1, at)
    with pytest.raises(KeyboardInterrupt):
        other.resolve("a", "node", wait=math.inf)
    late_s = time.monotonic() - at[0]
    thread.join()
    assert late_s < 0.2
    until(lambda: client.get("a").waiting == 0, "for the waiter to be gone")
    mine.release()
    assert workers().ask("resolve", "a", wait=1)["held"]


def test_break_lock_tells_the_holder_once(client: RegistryClient, other: RegistryClient) -> None:
    """A holder whose lock is broken gets one callback and an error at the next use; a late callback is called too."""
    mine = client.resolve("a", "node")
    told: list[Registration] = []
    event = threading.Event()
    mine.on_lost(told.append)
    mine.on_lost(lambda registration: event.set())
    assert not other.break_lock("a", fencing_token=1)
    assert other.break_lock("a", reason="maintenance")
    assert event.wait(PATIENCE_S)
    assert told == [mine]
    with pytest.raises(LockLostError, match="maintenance"):
        mine.ensure()
    late = threading.Event()
    mine.on_lost(lambda registration: late.set())
    assert late.wait(PATIENCE_S)
    assert not other.break_lock("a")
    assert len(told) == 1


def test_on_lost_callback_that_raises_spoils_no_other(client: RegistryClient, other: RegistryClient) -> None:
    """A callback that raises is logged, and the next one is called."""
    mine = client.resolve("a", "node")
    event = threading.Event()
    mine.on_lost(lambda registration: 1 / 0)  # type: ignore[arg-type]
    mine.on_lost(lambda registration: event.set())
    other.break_lock("a")
    assert event.wait(PATIENCE_S)


def test_rename_of_a_held_name_is_followed_by_its_registration(client: RegistryClient, other: RegistryClient) -> None:
    """A forced rename leaves the holder its lock: name and token follow, release frees the new name."""
    mine = client.resolve("old", "node")
    other.rename("old", "new", force=True)
    until(lambda: mine.name == "new", "for the holder to be told")
    assert mine.held
    assert mine.fencing_token == client.get("new").fencing_token
    assert not client.release("old")
    assert mine.release()
    assert client.get("new").state == "free"


def test_fork_leaves_the_locks_with_the_parent(daemon: DaemonProcess, client: RegistryClient) -> None:
    """A forked child holds nothing, releases nothing of its parent's, and gets a session of its own at first use."""
    mine = client.resolve("a", "node")
    lost = threading.Event()
    mine.on_lost(lambda registration: lost.set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads, and that is the test
        child = os.fork()
    if child == 0:
        faults = 1
        try:
            assert not mine.held
            assert not mine.release()
            assert not client.release("a")
            assert client.get("a").holder.pid == os.getppid()  # type: ignore[union-attr]
            with pytest.raises(HeldError) as caught:
                client.resolve("a", "node")
            assert not caught.value.is_me
            assert client.resolve("b", "node").held
            client.close()
            faults = 0
        finally:
            os._exit(faults)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mine.held
    assert not lost.is_set()
    assert client.get("b").state == "free"
    assert client.release("a")


AT_EXIT = """
import atexit, sys
from madsci_registry import RegistryClient
client = RegistryClient(sys.argv[1])
class Node:
    def __del__(self):
        client.release_all()
node = Node()
node.self = node
registration = client.resolve("a", "node")
client.resolve("b", "node")
atexit.register(registration.release)
"""


def test_release_at_interpreter_shutdown_works_quietly(daemon: DaemonProcess) -> None:
    """Releasing from atexit and finalizers end without a word, and quickly."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", AT_EXIT, str(daemon.registry)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with RegistryClient(daemon.registry) as client:
        kinds = [e.kind for e in client.history("a")]
    assert "released" in kinds


def test_requests_to_a_frozen_daemon_time_out_and_leave_nothing_behind(
    daemon: DaemonProcess, client: RegistryClient, other: RegistryClient
) -> None:
    """Of a daemon that does not answer, a read times out and a write has an unknown outcome; no lock stays behind."""
    for turn in range(5):  # which of request and withdrawal the daemon reads first is chance
        client.timeout = PATIENCE_S
        client.lookup("x")
        client.timeout = 0.3
        daemon.signal(signal.SIGSTOP)
        try:
            with pytest.raises(UnknownOutcomeError):
                client.resolve(f"a{turn}", "node")
            with pytest.raises(RegistryTimeoutError):
                client.lookup("x")
            with pytest.raises(RegistryTimeoutError):
                client.resolve("b", "node")  # no connection to send it over any more: nothing was done
        finally:
            daemon.signal(signal.SIGCONT)
        assert other.lookup("b") is None
        # Whether it was run and then withdrawn, or withdrawn before it was run: nobody holds it.
        assert other.resolve(f"a{turn}", "node", wait=PATIENCE_S).held
