"""What `doctor` asks the kernel about this host. Nothing here judges, starts or changes anything."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from madsci_registry import containers
from madsci_registry.errors import UnsupportedError
from madsci_registry.types import Proof
from madsci_registryctl.stop import connect, peer_pid

SO_PEERPIDFD = 77  # asm-generic/socket.h; Python's socket module has no name for it yet


class Listener(NamedTuple):
    """What stands at the path of a socket."""

    state: Literal["listening", "dead", "missing", "no socket"]
    """dead: a socket's file whose process is gone."""
    pid: int | None = None
    """Who listens; None: nobody, or not visible from here."""


class Space(NamedTuple):
    """What a file system has left for an ordinary user."""

    free_bytes: int
    free_inodes: int | None
    """None: it does not count them."""
    is_read_only: bool


def kernel_proof() -> Proof:
    """Say how surely this kernel lets a daemon know the processes at the other end of its sockets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        with suppress(OSError):
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
            return "pidfd"
    with suppress(OSError):
        os.close(os.pidfd_open(os.getpid()))
        return "pid"
    return "connection"


def listener(path: Path) -> Listener:
    """Say who listens on a stream socket at `path`. Raises OSError where that may not be asked."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Listener("missing")
    if not stat.S_ISSOCK(mode):
        return Listener("no socket")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            connect(probe, path)
        except ConnectionRefusedError:
            return Listener("dead")
        except BlockingIOError:
            return Listener("listening")  # so many wait to be accepted that there is no room for one more
        try:
            return Listener("listening", peer_pid(probe))
        except UnsupportedError:
            return Listener("listening")


def process_state(pid: int) -> str | None:
    """Return the kernel's letter for what a process does (proc(5): T is stopped), None where it is not visible."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_bytes()
        return text[text.rindex(b")") + 2 :][:1].decode()  # the name before it may hold anything
    return None


def flock_holder(path: Path) -> int | None:
    """Return the pid that has an flock on a file; None: nobody, or not visible. Looking does not take the lock."""
    with suppress(OSError):
        found = path.stat()
        wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return int(fields[4])
    return None


def file_system(folder: Path) -> str:
    """Name the type of the file system that holds a folder, 'unknown' where the kernel does not say."""
    return containers.mount_of(folder).kind


def space(folder: Path) -> Space:
    """Say what is left on the file system of a folder. Raises OSError."""
    found = os.statvfs(folder)
    inodes = found.f_favail if found.f_files else None
    return Space(found.f_bavail * found.f_frsize, inodes, bool(found.f_flag & os.ST_RDONLY))


def nearest_folder(folder: Path) -> Path:
    """Return the folder, or where it is not there the nearest one above that is. Raises OSError."""
    while True:
        try:
            folder.stat()
        except FileNotFoundError:
            folder = folder.parent
        else:
            return folder
