"""A process and the children that it makes, in every way that Python has: each is a holder of its own. Real daemon."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import PATIENCE_S, DaemonProcess, environment, until
from madsci_registry import RegistryClient
from madsci_registry.protocol import RESUME_S
from namespaces import need_namespaces

# What a child does with what it got from its parent: nothing of it holds, frees or keeps anything of the parent's.
PROGRAM = '''
import ctypes, multiprocessing, os, signal, subprocess, sys, threading, time, warnings
import zmq
from madsci_registry import HeldError, LockLostError, Registration, RegistryClient, _transport
from madsci_registry.types import Holder

warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what shall be tested
PATH = sys.argv[1]
client = mine = None

def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no child outlives the test

os.register_at_fork(after_in_child=die_with_parent)
die_with_parent()

def use_what_was_inherited(pid):
    """In a child that has its parent's objects."""
    assert (mine.state, mine.held) == (None, False)
    try:
        mine.ensure()
    except LockLostError as error:
        assert "parent" in str(error)
    else:
        raise AssertionError("the child thinks it holds")
    mine.on_lost(print), mine.on_state(print)
    assert not mine.release() and not client.release("arm") and client.release_all() == []
    inherited = _transport._context
    assert inherited is None, "a zmq context crossed the fork"
    use_a_client(client, pid)
    assert _transport._context is not None and _transport._context not in _transport._graveyard

def use_a_client(client, pid):
    """In any child: it is a holder of its own."""
    holder = client.get("arm").holder
    assert holder.pid == pid, (holder, pid)
    try:
        client.resolve("arm", "node")
    except HeldError as error:
        assert not error.is_me and error.holder.pid == pid
    else:
        raise AssertionError("held twice")
    with client.hold("leg", "node", wait=30) as leg:
        assert client.get("leg").holder.pid == os.getpid() != pid
        leg.ensure()
    client.close()

def fresh(pid):
    with RegistryClient(PATH, autostart=False) as client:
        use_a_client(client, pid)

def by_os_fork():
    child = os.fork()
    if child == 0:
        status = 1
        try:
            use_what_was_inherited(os.getppid())
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def by_fork_that_exits():
    """The child runs the interpreter's whole shutdown, with atexit, finalizers and the parent's objects."""
    child = os.fork()
    if child == 0:
        use_what_was_inherited(os.getppid())
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def by_multiprocessing(method, target):
    child = multiprocessing.get_context(method).Process(target=target, args=(os.getpid(),))
    child.start()
    child.join(30)
    assert child.exitcode == 0, child.exitcode

def by_pool(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        pool.map(fresh, [os.getpid()] * 2)

def by_fork_in_a_thread():
    """While other threads of the parent are in the middle of requests and blocks that hold."""
    stop = threading.Event()
    def busy(n):
        while not stop.is_set():
            client.lookup("arm")
            with client.hold(f"own-{n}", "node"):
                pass
    threads = [threading.Thread(target=busy, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    runner = threading.Thread(target=lambda: [by_os_fork() for _ in range(5)])
    runner.start()
    runner.join()
    stop.set()
    for thread in threads:
        thread.join()

def by_subprocess():
    subprocess.run([sys.executable, sys.argv[0], PATH, "child", str(os.getpid())], check=True)

def by_fork_twice():
    child = os.fork()
    if child == 0:
        status = 1
        try:
            parent = os.getppid()
            fresh(parent)
            grandchild = os.fork()
            if grandchild == 0:
                try:
                    fresh(parent)
                    status = 0
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

WAYS = {
    "os_fork": by_os_fork,
    "fork_that_exits": by_fork_that_exits,
    "fork_twice": by_fork_twice,
    "fork_in_a_thread": by_fork_in_a_thread,
    "multiprocessing_fork": lambda: by_multiprocessing("fork", use_what_was_inherited),
    "multiprocessing_forkserver": lambda: by_multiprocessing("forkserver", fresh),
    "multiprocessing_spawn": lambda: by_multiprocessing("spawn", fresh),
    "pool_fork": lambda: by_pool("fork"),
    "subprocess": by_subprocess,
}

if __name__ == "__main__":
    if sys.argv[2] == "child":
        fresh(int(sys.argv[3]))
        sys.exit(0)
    client = RegistryClient(PATH, autostart=False)
    mine = client.resolve("arm", "node")
    lost = []
    mine.on_lost(lost.append)
    WAYS[sys.argv[2]]()
    mine.ensure()
    assert mine.state == "held" and client.get("arm").fencing_token == mine.fencing_token and not lost
    assert mine.release()
    client.close()
'''
WAYS = (
    "os_fork",
    "fork_that_exits",
    "fork_twice",
    "fork_in_a_thread",
    "multiprocessing_fork",
    "multiprocessing_forkserver",
    "multiprocessing_spawn",
    "pool_fork",
    "subprocess",
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "forks.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_child_is_a_holder_of_its_own(daemon: DaemonProcess, script: Path, way: str) -> None:
    """A child, however it was made, holds nothing of its parent's, frees nothing, is refused what the parent holds as
    another process, and gets session, locks and zmq context of its own; the parent's lock is what it was."""
    done = subprocess.run(
        [sys.executable, script, daemon.registry, way],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with RegistryClient(daemon.registry, autostart=False) as client:
        kinds = [e.kind for e in client.history("arm")]
        assert kinds == ["created", "granted", "released"]
        until(lambda: len(client.sessions()) == 1, "for the sessions of the dead to end")


# A holder that makes a child, says its pid, and waits to be killed; the child lives on with all that it inherited.
LIVES_ON = """
import ctypes, multiprocessing, os, subprocess, sys, time, warnings
from madsci_registry import RegistryClient
warnings.simplefilter("ignore", DeprecationWarning)

def live_on():
    ctypes.CDLL(None).prctl(1, 0)  # it shall outlive its parent; the test ends it
    time.sleep(600)

if __name__ == "__main__":
    client = RegistryClient(sys.argv[1], autostart=False)
    mine = client.resolve("arm", "node")
    way = sys.argv[2]
    if way == "os_fork":
        pid = os.fork()
        if pid == 0:
            live_on()
    elif way == "c_fork":  # a library's fork, of which Python knows nothing: every descriptor stays open in the child
        pid = ctypes.CDLL(None).fork()
        if pid == 0:
            ctypes.CDLL(None).sleep(600)
    elif way == "subprocess":
        pid = subprocess.Popen(["sleep", "600"], close_fds=False).pid
    else:
        child = multiprocessing.get_context(way).Process(target=live_on)
        child.start()
        pid = child.pid
    print(pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def lives_on(tmp_path: Path) -> Path:
    path = tmp_path / "lives_on.py"
    path.write_text(LIVES_ON)
    return path


@pytest.fixture
def left_behind() -> Iterator[list[int]]:
    """Pids of children to kill: each is pinned by a pidfd, so that nobody else is hit."""
    pidfds: list[int] = []
    yield pidfds
    for pidfd in pidfds:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


@pytest.mark.parametrize("way", ["os_fork", "c_fork", "fork", "forkserver", "spawn", "subprocess"])
def test_parent_that_is_killed_frees_its_name_while_its_child_lives(
    daemon: DaemonProcess, lives_on: Path, left_behind: list[int], way: str
) -> None:
    """The death of the process that took the lock ends it at once, whatever children of it live on and whatever they
    have open."""
    with subprocess.Popen(
        [sys.executable, lives_on, daemon.registry, way], stdout=subprocess.PIPE, env=environment()
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        left_behind.append(child)
        with RegistryClient(daemon.registry, autostart=False) as client:
            assert client.get("arm").state == "held"
            killed_at = time.monotonic()
            parent.kill()
            assert client.resolve("arm", "node", wait=PATIENCE_S).held
            assert time.monotonic() - killed_at < RESUME_S / 2
            assert not select.select([child], [], [], 0)[0], "the child should have lived"


# A child of pid 1 that is pid 1 itself, in a namespace of its own, as container runtimes make them.
NAMESAKE = """
import ctypes, os, sys
from madsci_registry import HeldError, RegistryClient
client = RegistryClient(sys.argv[1], autostart=False)
mine = client.resolve("a", "node")
assert os.getpid() == 1
if ctypes.CDLL(None, use_errno=True).unshare(0x20000000):  # CLONE_NEWPID: from the next child on
    sys.exit("unshare: " + os.strerror(ctypes.get_errno()))
child = os.fork()
if child == 0:
    status = 1
    try:
        assert os.getpid() == 1
        assert (mine.state, mine.held, mine.release()) == (None, False, False)
        try:
            client.resolve("a", "node")
        except HeldError:
            status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
assert client.lookup("a") == mine.id and mine.held
mine.ensure()
print("both were right")
"""


def test_child_with_its_parents_pid_is_a_holder_of_its_own(daemon: DaemonProcess) -> None:
    """A child forked into a new PID namespace, where it has its parent's number, does not take itself for it."""
    need_namespaces()
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", NAMESAKE, str(daemon.registry)]
    done = subprocess.run(
        [*unshare, *program], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "both were right\n"), done.stderr
