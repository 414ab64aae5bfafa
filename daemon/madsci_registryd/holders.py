"""Facts about a process, from the kernel: who stands at the other end of a socket, and whether it still lives.

Three tiers of proof, best first: a pidfd that the kernel gives for the peer of a socket (Linux 6.5, works where the
pid reads 0 and after pid reuse); a pidfd opened by pid and checked by its start time; the connection alone.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from madsci_registry.types import Proof

_SO_PEERPIDFD = 77  # asm-generic/socket.h; Python's socket module has no name for it yet
_OVERFLOW_UID = 65534


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a Unix socket, as it was when it connected. Owns `pidfd`."""

    uid: int
    gid: int
    pid: int | None
    pidfd: int | None
    proof: Proof
    start_time: int | None
    pidfd_inode: int | None

    @property
    def is_mapped(self) -> bool:
        """False: its uid has no name in the daemon's user namespace."""
        return self.uid != _OVERFLOW_UID


class Life(Enum):
    """What a record of an earlier daemon is found to be."""

    ALIVE = "alive"
    DEAD = "dead"
    UNPROVEN = "unproven"


def peer_of(sock: socket.socket) -> Peer:
    """Ask the kernel who connected. Raises ProcessLookupError where that process is gone already."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    number, uid, gid = struct.unpack("3i", raw)
    pid = number or None
    pidfd = _peer_pidfd(sock)
    proof: Proof = "pidfd"
    started = start_time(pid)
    if pidfd is None and pid is not None:
        proof = "pid"
        pidfd = _open_pidfd(pid)
        if pidfd is not None and start_time(pid) != started:
            os.close(pidfd)
            raise ProcessLookupError(pid)
    if pidfd is None:
        return Peer(uid, gid, pid, None, "connection", started, None)
    if is_dead(pidfd):
        os.close(pidfd)
        raise ProcessLookupError(pid)
    return Peer(uid, gid, pid, pidfd, proof, started, pidfd_inode(pidfd))


def _peer_pidfd(sock: socket.socket) -> int | None:
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except ProcessLookupError:
        raise
    except OSError:
        return None  # an older kernel
    os.set_inheritable(pidfd, False)
    return pidfd


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def find(
    *, pid: int | None, started: int | None, inode: int | None, boot: str, namespace: int
) -> tuple[Life, int | None, Proof]:
    """Look for the process of a record: its life, a pidfd where it is alive, and how that is proven."""
    if boot != boot_id():
        return Life.DEAD, None, "connection"
    if pid is None or namespace != pid_namespace():
        return Life.UNPROVEN, None, "connection"
    try:
        pidfd = _open_pidfd(pid)
    except ProcessLookupError:
        return Life.DEAD, None, "connection"
    if pidfd is None:
        return Life.UNPROVEN, None, "connection"
    now_inode = pidfd_inode(pidfd)
    if inode is not None and now_inode is not None:
        same, proof = inode == now_inode, "pidfd"
    else:
        same, proof = started is not None and started == start_time(pid), "pid"
    if same and not is_dead(pidfd):
        return Life.ALIVE, pidfd, "pidfd" if proof == "pidfd" else "pid"
    os.close(pidfd)
    return Life.DEAD, None, "connection"


def is_dead(pidfd: int) -> bool:
    """Tell whether the process of a pidfd has ended (a zombie has)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def pidfd_inode(pidfd: int) -> int | None:
    """Return the inode that no other process of this boot has; None on kernels without pidfs (before 6.9)."""
    with suppress(OSError):
        if str(Path(f"/proc/self/fd/{pidfd}").readlink()).startswith("pidfd:"):
            return os.fstat(pidfd).st_ino
    return None


def start_time(pid: int | None) -> int | None:
    """Return when a process began, in clock ticks after boot; None where it is not visible."""
    if pid is None:
        return None
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return int(stat[stat.rindex(b")") + 2 :].split()[19])  # field 22; the name before it may hold anything
    return None


def comm(pid: int | None) -> str | None:
    """Return a process's short name, None where it is not visible."""
    return _text(f"/proc/{pid}/comm", 64) if pid else None


def command_line(pid: int | None) -> str | None:
    """Return a process's arguments, at most 500 characters, None where it is not visible."""
    return _text(f"/proc/{pid}/cmdline", 500) if pid else None


def _text(path: str, limit: int) -> str | None:
    with suppress(OSError), Path(path).open("rb") as file:
        text = file.read(4 * limit).replace(b"\0", b" ").decode("utf-8", "replace").strip()
        return "".join(c if c.isprintable() else "?" for c in text)[:limit]
    return None


def boot_id() -> str:
    """Return what tells this boot of the kernel from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> int:
    """Return the inode of this process's PID namespace."""
    return Path("/proc/self/ns/pid").stat().st_ino


def best_proof() -> Proof:
    """Say which tier this kernel gives for an ordinary peer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = peer_of(ours)
    if peer.pidfd is not None:
        os.close(peer.pidfd)
    return peer.proof
