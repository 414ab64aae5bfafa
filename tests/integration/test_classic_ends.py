"""How programs with the classic classes end, and what their finalizers, atexit and forked children do: quietly, and
never to a newer lock. Each program is a process of its own; the history tells how its lock ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from classic import node
from helpers import PATIENCE_S, DaemonProcess
from madsci_registry import RegistryClient


def how_it_ended(registry: Path, name: str = "arm") -> list[str]:
    """Wait until a name is free and tell how its locks ended, in order."""
    with RegistryClient(registry, autostart=False) as client:
        client.resolve(name, "node", wait=PATIENCE_S)
        return [e.kind for e in client.history(name) if e.kind in ("released", "ended", "broken")]


def run(daemon: DaemonProcess, after: str) -> tuple[int, str, str]:
    """Run a node and then `after` to its end: exit status, what it printed after its ULID, stderr."""
    with node("1", registry=daemon.registry, after=after) as process:
        output, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output.partition("\n")[2], errors


ENDS = {
    "atexit": "",
    "finalizer": "import gc; atexit.unregister(node.close); del node; gc.collect()",
    "finalizer_of_a_cycle": "node.me = node; del node; import gc; gc.disable()",
    "finalizer_of_a_global": "atexit._clear()",
    "exception": "raise SystemExit(0)",
    "release_all": "node.resolver.release_all(); node.resolver.release_all()",
    "manager": "node.resolver.local_registry.release('arm')",
    "thread": "import threading; threading.Thread(target=lambda: (time.sleep(0.2), node.close())).start()",
    "signal": (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: (node.close(), sys.exit(0)))\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    ),
}


@pytest.mark.parametrize("way", sorted(ENDS))
def test_release_on_the_way_out_is_quiet(daemon: DaemonProcess, way: str) -> None:
    """A node that ends releases its name by its own word, from atexit, a finalizer or interpreter shutdown, without a
    word on stdout or stderr."""
    assert run(daemon, ENDS[way]) == (0, "", "")
    assert how_it_ended(daemon.registry) == ["released"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_node_frees_its_name(daemon: DaemonProcess, number: signal.Signals) -> None:
    """A node that is killed runs no atexit: its death frees the name."""
    with node("1", registry=daemon.registry) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (-number, "")
    assert how_it_ended(daemon.registry) == ["ended"]


@pytest.mark.parametrize("what", ["away", "frozen"])
def test_end_without_an_answering_daemon_is_quiet(daemon: DaemonProcess, what: str) -> None:
    """A node whose daemon is away or frozen when it ends does end, without a word."""
    with node("1", registry=daemon.registry) as process:
        assert process.stdout is not None and process.stdout.readline()
        daemon.kill() if what == "away" else daemon.signal(signal.SIGSTOP)
        try:
            output, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            daemon.start() if what == "away" else daemon.signal(signal.SIGCONT)
        assert (process.returncode, output, errors) == (0, "", "")
    assert len(how_it_ended(daemon.registry)) == 1


def test_node_that_was_refused_ends_quietly(daemon: DaemonProcess) -> None:
    """The finalizer of a node that did not get its name says nothing and frees nothing of the holder's."""
    with node("1", registry=daemon.registry) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with node("0", registry=daemon.registry) as other:
            output, errors = other.communicate(timeout=PATIENCE_S)
        assert output.startswith("held ") and output.count("\n") == 1
        assert "Exception ignored" not in errors
        with RegistryClient(daemon.registry) as client:
            found = client.get("arm").holder
            assert found is not None and found.pid == holder.pid


def test_finalizer_of_an_old_node_frees_nothing_of_a_new_one(daemon: DaemonProcess) -> None:
    """A notebook's cell run twice, its nodes on one LocalRegistryManager: the old node's finalizer, which runs when the
    new node has the lock, frees nothing."""
    after = (
        "import gc\nold, registry = node, node.resolver.local_registry\n"
        "node = Node.__new__(Node)\nnode.name, node.resolver = 'arm', IdentityResolver(local_registry=registry)\n"
        "assert node.resolver.resolve('arm', 'node') == old.id\n"
        "old.close(); del old; gc.collect()\n"
        "registry.refresh_lock('arm')\nassert registry.get_entry('arm').is_locked()\nprint('kept', flush=True)"
    )
    assert run(daemon, after) == (0, "kept\n", "")
    assert how_it_ended(daemon.registry) == ["released"]


def test_closed_node_makes_room_for_the_next(daemon: DaemonProcess) -> None:
    """A cell that closes its node before it makes the next has the name at once, and the old one's finalizer frees
    nothing, though it is another holder."""
    after = (
        "import gc\nnode.close()\nold, node = node, Node('arm', 0.0)\nassert node.id == old.id\nold.close(); del old\n"
        "gc.collect()\nnode.resolver.local_registry.refresh_lock('arm')"
    )
    assert run(daemon, after) == (0, "", "")
    assert how_it_ended(daemon.registry) == ["released", "released"]


FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what shall be tested
registry = node.resolver.local_registry
child = os.fork()
if child == 0:
    status = 1
    try:
        {child}
        status = 0
    finally:
        {end}
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
registry.refresh_lock("arm")
entry = registry.get_entry("arm")
assert entry.is_locked() and entry.lock.holder_pid == os.getpid() == registry.lock_manager.pid
"""

CHILDREN = {
    "releases": "node.close(); node.resolver.release_all(); registry.release('arm')",
    "collects": "del node, registry; import gc; gc.collect()",
    "resolves": """
        try:
            registry.refresh_lock("arm")
        except RegistryLockError:
            pass
        else:
            raise AssertionError("the child thinks it holds")
        try:
            node.resolver.resolve("arm", "node")
        except RegistryLockError as error:
            assert error.code == "held" and not error.is_me
        else:
            raise AssertionError("held twice")
        assert node.resolver.resolve("leg", "node") and registry.lock_manager.pid == os.getpid()
        registry.refresh_lock("leg")
        node.resolver.release("leg")
        assert not registry.get_entry("leg").is_locked()""",
}


@pytest.mark.parametrize("end", ["os._exit(status)", "sys.exit(status)"])
@pytest.mark.parametrize("child", sorted(CHILDREN))
def test_forked_child_frees_nothing_of_its_parent(daemon: DaemonProcess, child: str, end: str) -> None:
    """A forked child that releases, collects or uses what it inherited is a holder of its own, also where it runs the
    interpreter's whole shutdown, atexit included; the parent's lock is what it was."""
    assert run(daemon, FORK.format(child=CHILDREN[child], end=end)) == (0, "", "")
    assert how_it_ended(daemon.registry) == ["released"]
