"""Who stands at the other end of a socket, whether that process lives, and how surely that is known.

Three tiers of proof, best first: `pidfd`, that the kernel gives for the peer of a socket (Linux 6.5; it works where the
pid reads 0, and after pid reuse); `pid`, a pidfd opened by pid and checked by its start time; `connection` alone. The
setting `proof` lowers the best one that is used.

Over a restart of the daemon a process is known again by its Identity. Only what is certain counts: a record of another
PID namespace, or one that lacks what would have to be compared, proves neither life nor death.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from madsci_registry.types import Proof
from madsci_registryd.admission import Credentials
from madsci_registryd.locks import Identity

# asm-generic/socket.h; Python's socket module has no names for them yet
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
UNKNOWN_BOOT = "unknown"
_OUT_OF_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""No answer about the process: whoever is admitted then would be known less surely than it could."""


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a Unix socket, as it was when it connected. Owns `pidfd`."""

    uid: int
    gid: int
    pidfd: int | None
    proof: Proof
    identity: Identity
    groups: frozenset[int] = frozenset()

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.uid, self.gid, self.groups)

    @property
    def pid(self) -> int | None:
        """Its pid here; that of a record from another PID namespace may be a stranger's here."""
        return self.identity.pid if self.identity.pid_namespace == pid_namespace() else None


class Life(Enum):
    """What a record of an earlier daemon is found to be."""

    ALIVE = "alive"
    DEAD = "dead"
    UNPROVEN = "unproven"


class Found(NamedTuple):
    """What became of the process of a record; `pidfd`, where it is alive, is the caller's."""

    life: Life
    proof: Proof = "connection"
    pidfd: int | None = None


def peer_of(sock: socket.socket, best: Proof = "pidfd") -> Peer:
    """Ask the kernel who connected. Raises ProcessLookupError where that process is gone, OSError: out of room."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    number, uid, gid = struct.unpack("3i", raw)
    pid = number or None
    pidfd, proof = _pidfd_of_peer(sock, pid, best)
    identity = Identity(pid, start_time(pidfd), pidfd_inode(pidfd), boot_id(), pid_namespace())
    if pidfd is not None and is_dead(pidfd):
        os.close(pidfd)
        raise ProcessLookupError(pid)
    return Peer(uid, gid, pidfd, proof, identity, _peer_groups(sock))


def _peer_groups(sock: socket.socket) -> frozenset[int]:
    """Return the supplementary groups that the peer had when it connected; none where the kernel does not tell."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)  # Python asks for no more: 256 groups
    except OSError:
        return frozenset()
    return frozenset(struct.unpack(f"{len(raw) // 4}I", raw))


def credentials_of_peer(sock: socket.socket) -> Credentials:
    """Return which user and groups the peer had when it connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, gid = struct.unpack("3i", raw)
    return Credentials(uid, gid, _peer_groups(sock))


def _pidfd_of_peer(sock: socket.socket, pid: int | None, best: Proof) -> tuple[int | None, Proof]:
    if best == "pidfd" and (pidfd := _peer_pidfd(sock)) is not None:
        return pidfd, "pidfd"
    if best != "connection" and pid is not None and (pidfd := _open_pidfd(pid)) is not None:
        return pidfd, "pid"
    return None, "connection"


def _peer_pidfd(sock: socket.socket) -> int | None:
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ESRCH):  # Linux 6.5 and later say so of a process that was reaped
            raise ProcessLookupError(error.errno, "the peer is gone") from None
        if error.errno in _OUT_OF_ROOM:
            raise
        return None  # an older kernel (ENOPROTOOPT), or a sandbox
    os.set_inheritable(pidfd, False)
    return pidfd


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH or error.errno in _OUT_OF_ROOM:
            raise
        return None


def is_same(one: Identity, other: Identity) -> bool | None:
    """Tell whether two records of this boot mean one process; None: that cannot be told."""
    if one.pidfd_inode and other.pidfd_inode:
        return one.pidfd_inode == other.pidfd_inode
    if one.pid_namespace == other.pid_namespace and None not in (one.pid, other.pid, one.start_time, other.start_time):
        return (one.pid, one.start_time) == (other.pid, other.start_time)
    if one.pid_namespace == other.pid_namespace and None not in (one.pid, other.pid) and one.pid != other.pid:
        return False
    return None


def may_find(record: Identity, proof: Proof) -> bool:
    """Tell whether a later daemon in this PID namespace will be able to prove that the process lives."""
    is_known = record.pid is not None and (record.pidfd_inode or record.start_time) is not None
    return proof != "connection" and is_known and record.boot_id != UNKNOWN_BOOT


def find(record: Identity, best: Proof = "pidfd") -> Found:
    """Look for the process of a record that an earlier daemon made."""
    if UNKNOWN_BOOT in (record.boot_id, boot_id()):
        return Found(Life.UNPROVEN)
    if record.boot_id != boot_id():
        return Found(Life.DEAD)
    if record.pid is None or record.pid_namespace != pid_namespace():
        return Found(Life.UNPROVEN)
    try:
        pidfd = _open_pidfd(record.pid)
    except ProcessLookupError:
        return Found(Life.DEAD)
    except OSError:
        return Found(Life.UNPROVEN)
    if pidfd is None:
        return Found(Life.UNPROVEN)
    now = record._replace(start_time=start_time(pidfd), pidfd_inode=pidfd_inode(pidfd))
    same = is_same(record, now)
    if same and best != "connection" and not is_dead(pidfd):
        by_inode = best == "pidfd" and record.pidfd_inode and now.pidfd_inode
        return Found(Life.ALIVE, "pidfd" if by_inode else "pid", pidfd)
    is_gone = same is False or is_dead(pidfd)
    os.close(pidfd)
    return Found(Life.DEAD if is_gone else Life.UNPROVEN)


def peer_found(record: Identity, found: Found, *, uid: int, gid: int) -> Peer:
    """Return the process of a record as if it had just connected."""
    return Peer(uid, gid, found.pidfd, found.proof, record)


def is_dead(pidfd: int) -> bool:
    """Tell whether the process of a pidfd has ended (a zombie has)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def pidfd_inode(pidfd: int | None) -> int | None:
    """Return the inode that no other process of this boot has; None on kernels without pidfs (before 6.9)."""
    if pidfd is None:
        return None
    found = os.fstat(pidfd)
    return found.st_ino if found.st_dev != _anonymous_device() else None


@lru_cache(maxsize=1)
def _anonymous_device() -> int:
    """Return the device of the one inode that all pidfds shared before pidfs. (Their link in procfs tells nothing:
    it reads anon_inode:[pidfd] on both.)"""
    with select.epoll() as epoll:
        return os.fstat(epoll.fileno()).st_dev


def number_in_proc(pidfd: int) -> int | None:
    """Return under which number /proc shows the process of a pidfd; None where it does not, or it is dead.

    That is not its pid where /proc was mounted in another PID namespace than the daemon's.
    """
    with suppress(OSError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
            if line.startswith("Pid:"):
                number = int(line.split()[1])
                return number if number > 0 else None
    return None


def start_time(pidfd: int | None) -> int | None:
    """Return when the process of a pidfd began, in clock ticks after boot; None where that is not visible."""
    number = number_in_proc(pidfd) if pidfd is not None else None
    with suppress(OSError):
        if number is not None:
            stat = Path(f"/proc/{number}/stat").read_bytes()
            # field 22; the name before it may hold anything
            return int(stat[stat.rindex(b")") + 2 :].split()[19])
    return None


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Return what tells this boot of the kernel from others, UNKNOWN_BOOT where that is hidden.

    LXC and systemd-nspawn lay a random file over it in each container: another one there is no other boot.
    """
    path = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        if path.stat().st_dev == Path("/proc").stat().st_dev:
            return path.read_text().strip()
    return UNKNOWN_BOOT


@lru_cache(maxsize=1)
def pid_namespace() -> int:
    """Return what tells this process's PID namespace from all others of this boot.

    Not its inode alone: that is given again to a container that starts later. But a namespace has one init process,
    so it is told by that one's pidfd inode or, below zero, by inode and start of its init (kernels without pidfs).
    """
    init = _open_pidfd(1)
    try:
        inode = pidfd_inode(init)
        if inode is not None:
            return inode
        return -(Path("/proc/self/ns/pid").stat().st_ino << 30 | (start_time(init) or 0) % (1 << 30))
    finally:
        if init is not None:
            os.close(init)


def best_proof(best: Proof) -> Proof:
    """Say which tier an ordinary peer gets here, `best` at most."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = peer_of(ours, best)
    if peer.pidfd is not None:
        os.close(peer.pidfd)
    return peer.proof
