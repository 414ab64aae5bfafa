"""What the daemon reads of a process from /proc: real processes, this machine's kernel."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import until
from madsci_registry.cgroups import Place
from madsci_registry.types import Holder, Proof
from madsci_registryd import facts, holders
from madsci_registryd.clock import iso
from madsci_registryd.facts import process_of
from madsci_registryd.holders import Life
from madsci_registryd.locks import Identity


@pytest.fixture
def own_peer() -> Iterator[holders.Peer]:
    """This process, as the daemon would see it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = holders.peer_of(ours)
    yield peer
    assert peer.pidfd is not None
    os.close(peer.pidfd)


def test_process_of_a_living_peer_tells_what_the_kernel_knows(own_peer: holders.Peer) -> None:
    """Pid, user, program, executable, start and the command that would end it, each as it is."""
    process = process_of(own_peer)
    assert (process.pid, process.uid, process.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert process.executable == os.path.realpath(sys.executable)
    assert process.command_line is not None and "python" in process.command_line
    assert process.comm
    assert process.user == pwd.getpwuid(os.geteuid()).pw_name
    assert process.process_started_at is not None
    assert iso(time.time() - 3 * 86400) < process.process_started_at <= iso(time.time() + 2)
    if process.container is None and not (process.unit or "").endswith(".service"):
        is_host = str(Path("/proc/self/ns/pid").readlink()) == "pid:[4026531836]"
        assert process.end_command == (f"kill {os.getpid()}" if is_host else None)


def test_service_is_named_only_for_what_systemd_started(tmp_path: Path) -> None:
    """The command that ends a holder stops its service where systemd is its parent, and else the holder alone."""
    place = Place("ssh.service", None, "systemctl stop ssh.service")
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nPPid:\t{os.getpid()}\n")
    assert facts._end_command(place, tmp_path, 4711) in ("kill 4711", None)
    namesake = tmp_path / "systemd"
    shutil.copy(shutil.which("sleep") or "", namesake)
    with subprocess.Popen([str(namesake), "60"]) as systemd:
        try:
            status.write_text(f"PPid:\t{systemd.pid}\n")
            until(lambda: facts._end_command(place, tmp_path, 4711) == "systemctl stop ssh.service")
        finally:
            systemd.kill()


def test_label_of_an_invisible_process_says_so() -> None:
    """A holder whose pid is not visible is named by what is known of it."""
    holder = Holder(
        pid=None, uid=7, gid=7, proof="connection", container="c" * 64, host="h", session="s", since="t", instance="i"
    )
    assert holder.label == "a process whose pid is not visible (uid 7, container cccccccccccc)"


def record(pid: int) -> Identity:
    """Make the record that a daemon has of a process."""
    pidfd = os.pidfd_open(pid)
    try:
        return Identity(
            pid, holders.start_time(pidfd), holders.pidfd_inode(pidfd), holders.boot_id(), holders.pid_namespace()
        )
    finally:
        os.close(pidfd)


def life(identity: Identity, best: Proof = "pidfd") -> tuple[Life, Proof]:
    found = holders.find(identity, best)
    if found.pidfd is not None:
        os.close(found.pidfd)
    return found.life, found.proof


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_find_of_a_living_process_proves_it(child: subprocess.Popen[bytes]) -> None:
    """A process that lives is proven by its pidfd inode where the kernel has one, else by its start; the setting
    lowers that."""
    mine = record(child.pid)
    best = "pidfd" if mine.pidfd_inode else "pid"
    assert life(mine) == (Life.ALIVE, best)
    assert life(mine, "pid") == (Life.ALIVE, "pid")
    assert life(mine._replace(pidfd_inode=None)) == (Life.ALIVE, "pid")
    assert life(mine, "connection") == (Life.UNPROVEN, "connection")


def test_find_of_a_zombie_is_dead(child: subprocess.Popen[bytes]) -> None:
    """A process that has ended and that its parent has not reaped yet holds nothing."""
    mine = record(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for best in ("pidfd", "pid", "connection"):
        assert life(mine, best)[0] is Life.DEAD
    child.wait()
    assert life(mine)[0] is Life.DEAD


def test_find_of_a_reused_pid_is_dead(child: subprocess.Popen[bytes]) -> None:
    """A record whose pid belongs to another process by now is of a dead one, by inode as by start time."""
    mine = record(child.pid)
    assert mine.start_time is not None
    assert life(mine._replace(pidfd_inode=None, start_time=mine.start_time - 1))[0] is Life.DEAD
    if mine.pidfd_inode is None:
        pytest.skip("no pidfs: this kernel is older than 6.9")
    assert life(mine._replace(pidfd_inode=mine.pidfd_inode - 1))[0] is Life.DEAD


@pytest.mark.parametrize("changed", [{"pid_namespace": 1}, {"pid": None}, {"pidfd_inode": None, "start_time": None}])
def test_find_of_what_cannot_be_compared_proves_nothing(
    child: subprocess.Popen[bytes], changed: dict[str, Any]
) -> None:
    """A record of another PID namespace, without a pid, or with nothing to know the process by, is neither proof of
    life nor of death."""
    assert life(record(child.pid)._replace(**changed))[0] is Life.UNPROVEN


def test_find_where_the_boot_is_hidden_proves_nothing(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a container lays a random file over the boot's id, another id is no other boot: nobody is dead."""
    mine = record(child.pid)
    assert life(mine._replace(boot_id=holders.UNKNOWN_BOOT))[0] is Life.UNPROVEN
    assert not holders.may_find(mine._replace(boot_id=holders.UNKNOWN_BOOT), "pidfd")
    monkeypatch.setattr(holders, "boot_id", lambda: holders.UNKNOWN_BOOT)
    assert life(mine)[0] is Life.UNPROVEN


@pytest.mark.parametrize("line", ["x:x:99999999999999999999:1", "x:x:" + "9" * 5000 + ":1", "x", "", "x:x:-1:1"])
def test_passwd_with_rubbish_in_it_names_the_others(tmp_path: Path, line: str) -> None:
    """A line that is none in the file of users is passed over."""
    passwd = tmp_path / "passwd"
    passwd.write_text(f"{line}\nanna:x:1000:1000::/home:/bin/sh\n")
    assert facts._users(passwd, 0)[1000] == "anna"


def test_find_of_another_boot_is_dead(child: subprocess.Popen[bytes]) -> None:
    """No process lives on over a boot."""
    assert life(record(child.pid)._replace(boot_id="other"))[0] is Life.DEAD


def test_pid_namespace_of_two_containers_differs() -> None:
    """Namespaces that live one after the other are told apart, whatever their inode numbers are."""
    if os.geteuid() != 0:
        pytest.skip("needs root: unshare --pid")
    program = "from madsci_registryd import holders; print(holders.pid_namespace())"
    seen = {holders.pid_namespace()}
    for _ in range(3):
        done = subprocess.run(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"unshare --pid does not work here: {done.stderr.strip()}")
        seen.add(int(done.stdout))
    assert len(seen) == 4


class AnswersWith:
    """A connected socket on a kernel that answers SO_PEERPIDFD with an error."""

    def __init__(self, number: int) -> None:
        self._number = number

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:
        if size:
            return struct.pack("3i", os.getpid(), 7, 7)
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.ENOPROTOOPT, "pid"),
        (errno.EPERM, "pid"),
        (errno.EINVAL, ProcessLookupError),
        (errno.ESRCH, ProcessLookupError),
        (errno.EMFILE, OSError),
        (errno.ENOMEM, OSError),
    ],
)
def test_peer_of_on_a_kernel_that_gives_no_pidfd(number: int, outcome: str | type[OSError]) -> None:
    """A kernel that does not know the option lets the pid do; one that says that the peer was reaped, or that there is
    no room, admits nobody by a lower tier."""
    sock: Any = AnswersWith(number)
    if isinstance(outcome, str):
        peer = holders.peer_of(sock)
        assert peer.pidfd is not None
        os.close(peer.pidfd)
        assert peer.proof == outcome
        return
    with pytest.raises(outcome) as caught:
        holders.peer_of(sock)
    assert isinstance(caught.value, ProcessLookupError) == (outcome is ProcessLookupError)
