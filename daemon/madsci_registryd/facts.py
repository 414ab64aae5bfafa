"""What the kernel tells of a client's process, for people: program, user, container, unit, and how to end it.

Read from /proc once, when a session begins or resumes. Nothing is decided by it. A fact that cannot be read (hidden,
another namespace, a hardened daemon) is None.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from madsci_registry.cgroups import Place, place_of
from madsci_registry.types import Process
from madsci_registryd.clock import iso
from madsci_registryd.holders import Peer, is_dead, number_in_proc

_COMM_MAX, _LINE_MAX = 64, 500
_UID_DIGITS = 10  # of 2^32
# PROC_PID_INIT_INO of the Linux kernel (include/linux/proc_ns.h): the initial PID namespace.
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"


def process_of(peer: Peer) -> Process:
    """Gather the facts of a peer. Without a pidfd only its ids: a bare pid may be another process by now."""
    bare = Process(pid=peer.pid, uid=peer.uid, gid=peer.gid, proof=peer.proof, user=_user_of(peer.uid))
    number = None if peer.pidfd is None else number_in_proc(peer.pidfd)
    if peer.pidfd is None or number is None:
        return bare
    folder = Path(f"/proc/{number}")
    place = place_of(_text(folder / "cgroup") or "")
    facts = replace(
        bare,
        comm=_line(folder / "comm", _COMM_MAX),
        command_line=_line(folder / "cmdline", _LINE_MAX),
        executable=_link(folder / "exe"),
        process_started_at=_started_at(peer.identity.start_time),
        container=place.container,
        unit=place.unit,
        end_command=_end_command(place, folder, peer.pid),
    )
    return bare if is_dead(peer.pidfd) else facts  # dead by now: another process may have had its number


def _end_command(place: Place, folder: Path, pid: int | None) -> str | None:
    """Say how to end a process and nothing else: its container; its service, where it is what systemd started; or it.

    A process that a service has started (cron, sshd, a node manager) is not all of that service.
    """
    if place.container:
        return place.stop_command
    parent = _fields_of(folder / "status").get("PPid")
    if place.stop_command and parent and _line(Path(f"/proc/{parent}/comm"), _COMM_MAX) == "systemd":
        return place.stop_command
    return _kill(pid)


def _fields_of(status: Path) -> dict[str, str]:
    lines = (line.split(":", 1) for line in (_text(status) or "").splitlines())
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def _kill(pid: int | None) -> str | None:
    """Say how to end a process by its pid; nothing in a container, where a person outside would end another one."""
    return f"kill {pid}" if pid and _link(Path("/proc/self/ns/pid")) == _INITIAL_PID_NAMESPACE else None


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text("utf-8", "replace")
    return None


def _line(path: Path, limit: int) -> str | None:
    with suppress(OSError), path.open("rb") as file:
        return _printable(file.read(4 * limit).replace(b"\0", b" ").decode("utf-8", "replace").strip(), limit)
    return None


def _link(path: Path) -> str | None:
    with suppress(OSError):
        return _printable(str(path.readlink()), 4096)
    return None


def _printable(text: str, limit: int) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]


def _started_at(ticks: int | None) -> str | None:
    return None if ticks is None else iso(_boot_instant() + ticks / os.sysconf("SC_CLK_TCK"))


@lru_cache(maxsize=1)
def _boot_instant() -> float:
    """Return the wall-clock second in which the kernel says it booted: a label."""
    for line in (_text(Path("/proc/stat")) or "").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0


def _user_of(uid: int) -> str | None:
    passwd = Path("/etc/passwd")
    with suppress(OSError):
        return _users(passwd, passwd.stat().st_mtime_ns).get(uid)
    return None


@lru_cache(maxsize=1)
def _users(passwd: Path, _mtime_ns: int) -> dict[int, str]:
    """Read the names of the host's users. Not by the name service: that may ask the network, and the loop waits."""
    users: dict[int, str] = {}
    for line in passwd.read_text("utf-8", "replace").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2].isdecimal() and len(fields[2]) <= _UID_DIGITS:
            users.setdefault(int(fields[2]), _printable(fields[0], 64))
    return users
