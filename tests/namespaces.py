"""Namespaces for tests, above all of PIDs: clients and daemons in containers of their own, as far as they can tell;
and what a test needs of the machine for them.

`PidNamespace` is one that lasts for a `with` block; what is started within `entered()` is in it. `ContainedDaemon` is
a daemon that has a namespace to itself, a new one at each start. All in a namespace dies with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pytest

from helpers import PATIENCE_S, DaemonProcess, environment, until
from madsci_registry.types import Proof

_UNSHARE = ["unshare", "--pid", "--fork", "--kill-child"]
_DIES_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
_SO_PEERPIDFD = 77
_libc = ctypes.CDLL(None, use_errno=True)


@lru_cache(maxsize=1)
def _why_not() -> str | None:
    """Say what this machine lacks; None: nothing."""
    if os.geteuid() != 0:
        return "needs root: unshare --pid"
    try:
        done = subprocess.run([*_UNSHARE, "--mount-proc", "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "needs unshare (util-linux)"
    return f"unshare --pid --mount-proc does not work here: {done.stderr.strip()}" if done.returncode else None


def need_namespaces() -> None:
    """Skip the test, with what is missing, where no PID namespace can be made."""
    why = _why_not()
    if why:
        pytest.skip(why)


def need_pid_choice() -> None:
    """Skip the test where the kernel does not let us choose the pid of the next process."""
    need_namespaces()
    if not Path("/proc/sys/kernel/ns_last_pid").exists():
        pytest.skip("needs /proc/sys/kernel/ns_last_pid (CONFIG_CHECKPOINT_RESTORE)")


def need_proof(tier: Proof) -> None:
    """Skip the test where the kernel gives no such proof; the daemon is not asked, it might be wrong."""
    if tier == "pidfd" and not _gives_peer_pidfd():
        pytest.skip("needs SO_PEERPIDFD (Linux 6.5)")
    if tier == "pid" and not hasattr(os, "pidfd_open"):
        pytest.skip("needs pidfd_open")


def known_again_by(tier: Proof) -> Proof:
    """Say by what a process is known that a restarted daemon found again: without pidfs (Linux 6.9) by its start."""
    pidfd, eventfd = os.pidfd_open(os.getpid()), os.eventfd(0)
    has_pidfs = os.fstat(pidfd).st_dev != os.fstat(eventfd).st_dev  # they shared an inode before
    os.close(pidfd)
    os.close(eventfd)
    return tier if tier != "pidfd" or has_pidfs else "pid"


def best_proof() -> Proof:
    """Say by what an ordinary client is known on this kernel."""
    return "pidfd" if _gives_peer_pidfd() else "pid"


@lru_cache(maxsize=1)
def _gives_peer_pidfd() -> bool:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError:
            return False
    return True


_Made = TypeVar("_Made", bound="Namespace")


class Namespace:
    """A namespace of one kind, made by unshare(1) and kept by a process that only waits. A context manager."""

    kind: str
    """The file under /proc/PID/ns that leads to it, for who is in it or starts what shall be."""
    unshare: list[str]

    def __enter__(self: _Made) -> _Made:
        command = [sys.executable, "-c", _DIES_WITH_PARENT, *self.unshare, "sleep", "infinity"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._fd = until(self._open, "for unshare to make a namespace")
        return self

    def __exit__(self, *_: object) -> None:
        # Not waited for is the init of a PID namespace: it lasts until its last process is reaped, maybe by this test.
        self._process.kill()
        self._process.wait(PATIENCE_S)
        os.close(self._fd)

    @property
    def pid(self) -> int:
        """The process that keeps it."""
        return self._process.pid

    def _open(self) -> int | None:
        assert self._process.poll() is None, "unshare ended"
        try:
            fd = os.open(f"/proc/{self.pid}/ns/{self.kind}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None  # a PID namespace that has no init yet
        if os.path.samestat(os.fstat(fd), Path(f"/proc/thread-self/ns/{self.kind}").stat()):
            os.close(fd)
            return None
        return fd

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread be in the namespace, and after the block where it was before: blocks may be nested."""
        before = os.open(f"/proc/thread-self/ns/{self.kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_namespace(self._fd)
            try:
                yield
            finally:
                _set_namespace(before)
        finally:
            os.close(before)

    def run(self, *command: str) -> None:
        """Run a command in the namespace."""
        with self.entered():
            subprocess.run(command, check=True, timeout=PATIENCE_S, capture_output=True)


def _set_namespace(fd: int) -> None:
    if _libc.setns(fd, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class PidNamespace(Namespace):
    """A PID namespace: what is started within `entered()` is in it (threads cannot be started meanwhile). At its end
    all in it gets SIGKILL."""

    kind = "pid_for_children"
    unshare = _UNSHARE

    def choose_next_pid(self, number: int) -> None:
        """Let the next process that is started in the namespace have this pid, if it is free."""
        self.run("sh", "-c", f"echo {number - 1} > /proc/sys/kernel/ns_last_pid")  # it counts for that of who writes

    def kill(self) -> None:
        """End the namespace: its init dies, and all in it."""
        init = only_child_of(self.pid)
        assert init
        os.kill(init, signal.SIGKILL)


def only_child_of(pid: int) -> int | None:
    """Return the pid of the child of a process, None where it has none."""
    children = [number for number, fields in _statuses() if fields.get("PPid") == str(pid)]
    return children[0] if children else None


def inner_pid(pid: int) -> int:
    """Return the pid that a process has in its own namespace."""
    return int(dict(_statuses())[pid]["NSpid"].split()[-1])


def _statuses() -> Iterator[tuple[int, dict[str, str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "status").read_text().splitlines()
            except OSError:
                continue
            yield int(entry.name), dict(line.split(":\t", 1) for line in lines if ":\t" in line)


class ContainedDaemon(DaemonProcess):
    """A daemon that is the init of a PID namespace, of a new one at each start.

    With `own_proc` it has the /proc of that namespace, as in a container; without, it sees the host's.
    """

    def __init__(self, registry: Path, *options: str, own_proc: bool) -> None:
        super().__init__(registry, *options)
        self._unshare = [*_UNSHARE, *(["--mount-proc"] if own_proc else [])]

    @property
    def pid(self) -> int:
        """Its pid on the host."""
        assert self._process, "not started"
        unshare = self._process.pid
        found: int = until(lambda: only_child_of(unshare), "for unshare to fork")
        return found

    def spawn(self) -> None:
        assert self._process is None, "already started"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIES_WITH_PARENT, *self._unshare, *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process:
            if self._process.poll() is None:
                self.signal(signal.SIGKILL)  # then unshare ends; the other way round it would leave while this lives
            self.wait()
