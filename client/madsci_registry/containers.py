"""What procfs and the root folder say of containers: whether this is one, and whether a folder is in it alone.

Shared with the daemon, which asks before it puts a database there. Only looked at, nothing is kept or changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PASSING_KINDS = ("overlay", "overlayfs", "aufs", "fuse-overlayfs", "fuse.fuse-overlayfs", "tmpfs", "ramfs")
"""File systems of a container's own root, and those in memory: they go with the container."""

# What engines leave in the containers that they make (docker, podman), or put into their environment (podman,
# systemd-nspawn; kubernetes).
_FILES = (".dockerenv", "run/.containerenv")
_VARIABLES = ("container", "KUBERNETES_SERVICE_HOST")

# The initial namespaces of the Linux kernel (include/linux/proc_ns.h).
_INITIAL = {
    "pid": "pid:[4026531836]",
    "uts": "uts:[4026531838]",
    "ipc": "ipc:[4026531839]",
    "cgroup": "cgroup:[4026531835]",
    "user": "user:[4026531837]",
}

_ROOT = Path("/")
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """The mount that holds a folder."""

    point: str
    kind: str
    """The type of its file system; 'unknown' where the kernel does not say."""


def is_container(env: Mapping[str, str], root: Path = _ROOT) -> bool:
    """Tell whether this process is in a container: an engine's mark, and a namespace that is not the host's.

    A mark alone does not count: a machine made from an image has it too. Neither does a namespace, which a service or
    a browser may have; and with `pid: host` that of pids is the host's.
    """
    return is_marked(env, root) and any(_is_own(root, kind) for kind in _INITIAL)


def is_marked(env: Mapping[str, str], root: Path = _ROOT) -> bool:
    """Tell whether an engine's mark is here."""
    return any((root / file).exists() for file in _FILES) or any(env.get(variable) for variable in _VARIABLES)


def has_own_pids(root: Path = _ROOT) -> bool:
    """Tell whether this process has another PID namespace than the host: what is in it ends with its first process."""
    return _is_own(root, "pid")


def _is_own(root: Path, kind: str) -> bool:
    with suppress(OSError):
        return str((root / "proc/self/ns" / kind).readlink()) != _INITIAL[kind]
    return False  # no such kind in this kernel


def mount_of(folder: Path, root: Path = _ROOT) -> Mount:
    """Return the mount that holds a folder. Raises OSError where the folder may not be looked at."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    where = os.path.realpath(folder)
    found: tuple[tuple[bool, int], Mount] = (False, -1), Mount("/", "unknown")
    with suppress(OSError):
        for number, mount in _mounts(root):
            # btrfs gives its subvolumes devices of their own: then the longest mount point above the folder counts.
            if os.path.commonpath([mount.point, where]) == mount.point:
                found = max(found, ((number == wanted, len(mount.point)), mount), key=lambda one: one[0])
    return found[1]


def _mounts(root: Path) -> Iterator[tuple[str, Mount]]:
    """Yield device and mount of each line of mountinfo (proc(5))."""
    for line in (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        _, _, device, _, point = before.split()[:5]
        yield device, Mount(_OCTAL.sub(lambda match: chr(int(match[1], 8)), point), after.split()[0])


def is_alone(mount: Mount) -> bool:
    """Tell whether what is on a mount of this container is in no other one: its own root, or memory."""
    return mount.point == "/" or mount.kind in PASSING_KINDS


def compose_line(folder: Path) -> str:
    """Return the line of a compose file that mounts the lab's folder at `folder` of a container."""
    return f"- ./{folder.name}:{folder}"
