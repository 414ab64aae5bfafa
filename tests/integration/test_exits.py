"""How programs really end, and what becomes of their locks: each program below is run as a process of its own.

The daemon tells by its history how each lock ended: "released" by the program's own word, "ended" by its death.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from helpers import PATIENCE_S, DaemonProcess, environment
from madsci_registry import RegistryClient

HOLD = """
import sys
from madsci_registry import RegistryClient
client = RegistryClient(sys.argv[1], autostart=False)
mine = client.resolve("arm", "node")
"""


@contextmanager
def program(daemon: DaemonProcess, text: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run HOLD and then `text` with warnings as errors; its stdin, stdout and stderr are pipes."""
    pipe = subprocess.PIPE
    command = [sys.executable, *options, "-c", HOLD + text, str(daemon.registry)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(daemon: DaemonProcess, text: str, *options: str) -> tuple[int, str, str]:
    """Run a program to its end: exit status, stderr, and how the first lock on the arm ended."""
    with program(daemon, text, *options) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, errors, how_it_ended(daemon)


def how_it_ended(daemon: DaemonProcess) -> str:
    """Wait until the arm is free and tell how its first lock ended."""
    with RegistryClient(daemon.registry, autostart=False) as client:
        client.resolve("arm", "node", wait=PATIENCE_S)
        events = [e for e in client.history("arm") if e.kind in ("released", "ended", "broken")]
        return events[0].kind


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signal_that_ends_a_program_frees_what_it_held(daemon: DaemonProcess, number: signal.Signals) -> None:
    """A program that is ended by a signal runs no atexit and no finalizer: its death frees the name."""
    text = "import atexit; atexit.register(print, 'atexit')\nprint('held', flush=True)\nsys.stdin.read()"
    with program(daemon, text) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output, errors) == (-number, "", "")
    assert how_it_ended(daemon) == "ended"


def test_ctrl_c_unwinds_a_block_that_holds(daemon: DaemonProcess) -> None:
    """SIGINT is an exception: a `with` block that holds gives its lock back on the way out."""
    text = (
        "mine.release()\nclient.close()\n"
        "with RegistryClient(sys.argv[1]) as other, other.hold('leg', 'node'):\n"
        "    print('held', flush=True)\n    sys.stdin.read()"
    )
    with program(daemon, text) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    with RegistryClient(daemon.registry, autostart=False) as client:
        assert [e.kind for e in client.history("leg")] == ["created", "granted", "released"]


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemError('x')", "import os; os._exit(0)"])
def test_end_without_a_release_frees_at_once(daemon: DaemonProcess, end: str) -> None:
    """A program that releases nothing, however it ends, frees its names by its death."""
    status, errors, how = outcome(daemon, end)
    assert (status, how) == ({"sys.exit(3)": 3, "raise SystemError('x')": 1}.get(end, 0), "ended")
    assert ("SystemError" in errors) == ("SystemError" in end)


# Each ends with the interpreter's own shutdown, and gives the lock back on the way.
RELEASES = {
    "atexit": "import atexit; atexit.register(mine.release)",
    "atexit_close": "import atexit; atexit.register(client.close)",
    "atexit_while_threads_run": (
        "import atexit, threading, time\natexit.register(mine.release)\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    ),
    "finalizer_of_a_cycle": (
        "class Node:\n    def __del__(self): mine.release()\nnode = Node(); node.self = node\ndel node\n"
        "import gc; gc.disable()"
    ),
    "finalizer_of_a_global": "class Node:\n    def __del__(self, mine=mine): mine.release()\nnode = Node()",
    "finalizer_that_closes": "class Node:\n    def __del__(self, client=client): client.close()\nnode = Node()",
    "finalizer_by_name": "class Node:\n    def __del__(self, client=client): client.release('arm')\nnode = Node()",
    "weakref_finalize": "import weakref\nclass Node: pass\nnode = Node()\nweakref.finalize(node, mine.release)",
    "finalizer_in_another_thread": (
        "import threading\n"
        "class Node:\n    def __del__(self, mine=mine): mine.release()\n"
        "def run():\n    node = Node()\n    started.set()\n    go.wait()\n"
        "started, go = threading.Event(), threading.Event()\n"
        "thread = threading.Thread(target=run)\nthread.start()\nstarted.wait()\ngo.set()"
    ),
    "thread_that_outlives_main": (
        "import threading\n"
        "def run():\n    threading.main_thread().join()\n    mine.release()\n"
        "threading.Thread(target=run).start()"
    ),
    "signal_handler": (
        "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: (mine.release(), sys.exit(0)))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nimport time; time.sleep(60)"
    ),
}


@pytest.mark.parametrize("way", sorted(RELEASES))
def test_release_on_the_way_out_is_quiet_and_reaches_the_daemon(daemon: DaemonProcess, way: str) -> None:
    """A release from atexit, a finalizer or a late thread at interpreter shutdown frees the name by its own word: no
    exception, no warning, no word on stderr."""
    assert outcome(daemon, RELEASES[way], "-X", "dev") == (0, "", "released")


@pytest.mark.parametrize("way", ["atexit", "finalizer_of_a_global", "atexit_close"])
def test_release_on_the_way_out_with_the_daemon_away_is_quiet_and_quick(daemon: DaemonProcess, way: str) -> None:
    """Where no daemon is there any more the program still ends without a word; the next daemon finds it dead."""
    text = RELEASES[way] + "\nprint('held', flush=True)\nsys.stdin.read()"
    with program(daemon, text) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        daemon.kill()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    daemon.start()
    assert how_it_ended(daemon) == "ended"


@pytest.mark.parametrize("way", ["atexit", "finalizer_of_a_global", "atexit_close"])
def test_release_on_the_way_out_with_the_daemon_frozen_ends_in_time(daemon: DaemonProcess, way: str) -> None:
    """A daemon that does not answer does not keep a program from ending, and hears of the release when it goes on."""
    text = RELEASES[way] + "\nprint('held', flush=True)\nsys.stdin.read()"
    with program(daemon, text) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        daemon.signal(signal.SIGSTOP)
        try:
            _, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            daemon.signal(signal.SIGCONT)
    assert (process.returncode, errors) == (0, "")
    how_it_ended(daemon)


# Python 3.12 lets no thread be started while the interpreter ends.
AT_EXIT_WITHOUT_THREADS = """
import _thread, atexit, threading

def no_thread(*_args, **_kwargs):
    raise RuntimeError("can't create new thread at interpreter shutdown")

@atexit.register
def at_exit():
    threading._start_new_thread = threading._start_joinable_thread = _thread.start_new_thread = no_thread
    mine.on_lost(print)
    mine.on_state(print)
    mine.ensure()
    assert mine.release() and not mine.release()
    assert client.lookup("arm") == mine.id
    client.close()
"""


def test_atexit_needs_no_new_thread(daemon: DaemonProcess) -> None:
    """All that a program may do with its lock in atexit works without starting a thread, which Python 3.12 and later
    refuse there."""
    assert outcome(daemon, AT_EXIT_WITHOUT_THREADS) == (0, "", "released")


RESOLVES_AT_EXIT = """
import atexit, threading
from madsci_registry import RegistryError
client.close()
late = RegistryClient(sys.argv[1], autostart=False)

@atexit.register
def at_exit():
    try:  # Python 3.12 refuses it, others do not
        threading.Thread(target=int).start()
        print("threads")
    except RuntimeError:
        pass
    try:
        with late.hold("leg", "node"):
            print("held")
    except RegistryError as error:
        print(error.code)
"""


def test_first_request_in_atexit_is_served_or_refused_in_words(daemon: DaemonProcess) -> None:
    """A client that connects for the first time in atexit is served where a thread can be started, and told so where
    not; it neither hangs nor breaks."""
    with program(daemon, RESOLVES_AT_EXIT) as process:
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert output.split() in (["threads", "held"], ["unavailable"])


# What a notebook does: the same cell twice in one process; the name `node` lets the old object go only after the new
# one was made.
CELL = """
class Node:
    def __init__(self):
        self.mine = client.resolve("arm", "node")
    def __del__(self):
        {finalizer}
"""


def test_cell_run_twice_keeps_the_new_lock(daemon: DaemonProcess) -> None:
    """A cell that makes its object anew has the lock afterwards: the finalizer of the old object, which runs after the
    new one was made, does not free it."""
    text = CELL.format(finalizer="self.mine.release()") + (
        "mine = None\n"
        "node = Node()\nnode = Node()\n"
        "assert node.mine.state == 'held', node.mine.state\nnode.mine.ensure()\n"
        "assert client.get('arm').fencing_token == node.mine.fencing_token\n"
        "assert node.mine.release() and client.get('arm').state == 'free'"
    )
    assert outcome(daemon, text) == (0, "", "released")


def test_cell_that_makes_its_client_anew_waits_for_the_old_one(daemon: DaemonProcess) -> None:
    """A cell that makes client and lock anew is refused as itself while the old client is open; once that is closed
    the new lock is granted, and neither the old client's nor the old lock's finalizer frees it."""
    text = (
        "from madsci_registry import HeldError\n"
        "class Node:\n"
        "    def __init__(self):\n"
        "        self.client = RegistryClient(sys.argv[1])\n        self.mine = self.client.resolve('leg', 'node')\n"
        "    def stop(self):\n"
        "        self.client.release('leg')\n        self.client.close()\n"
        "        if hasattr(self, 'mine'): self.mine.release()\n"
        "    __del__ = stop\n"
        "node = Node()\n"
        "try: Node()\n"
        "except HeldError as error: assert error.is_me\n"
        "old = node\nold.stop()\nnode = Node()\nold.stop(); del old\n"
        "node.mine.ensure()\nassert client.get('leg').fencing_token == node.mine.fencing_token"
    )
    status, errors, _ = outcome(daemon, text)
    assert (status, errors) == (0, "")
