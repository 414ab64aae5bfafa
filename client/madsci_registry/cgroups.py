"""What the text of /proc/PID/cgroup says of a process: its systemd unit and its container. Pure.

The forms are those of cgroup v1 and v2 as docker, podman, containerd, CRI-O, LXC and systemd-machined make them.
"""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

_ENGINES = {"docker": "docker", "libpod": "podman", "cri-containerd": "crictl", "crio": "crictl"}
"""How the name of a container's cgroup begins, and the command of its engine."""
_CONTAINER = re.compile(r"^(?:(docker|libpod|cri-containerd|crio)-)?([0-9a-f]{64})(?:\.scope)?$")
_MACHINE = re.compile(r"^(?:lxc\.payload\.(.+)|machine-(.+)\.scope)$")


class Place(NamedTuple):
    """Where a process runs. None: not there, or not told."""

    unit: str | None = None
    """The innermost systemd unit, a service or scope; None in a container."""
    container: str | None = None
    """The container's id or name."""
    stop_command: str | None = None
    """The command that stops the container, or all of the service; None for a scope, which may hold much else."""


def place_of(cgroup: str) -> Place:
    """Read the text of /proc/PID/cgroup."""
    for path in _paths(cgroup):
        for parent, part in zip(["", *path], path, strict=False):
            found = _container(parent, part)
            if found is not None:
                return found
    return Place(innermost_unit(cgroup), None, systemctl(cgroup, "stop"))


def systemctl(cgroup: str, verb: str) -> str | None:
    """Return the command that does `verb` with the innermost unit, None where that is no service."""
    unit = innermost_unit(cgroup)
    if unit is None or not unit.endswith(".service"):
        return None
    is_users = any(part.startswith("user@") and part != unit for path in _paths(cgroup) for part in path)
    return f"systemctl {'--user ' if is_users else ''}{verb} {shlex.quote(unit)}"


def innermost_unit(cgroup: str) -> str | None:
    """Return the innermost systemd unit (service, scope) of the text of /proc/PID/cgroup, None where there is none."""
    for line in cgroup.splitlines():
        controllers, path = _fields(line)
        if controllers in ("", "name=systemd"):
            units = [part for part in path if part.endswith((".service", ".scope"))]
            if units:
                return units[-1]
    return None


def _paths(cgroup: str) -> list[list[str]]:
    return [_fields(line)[1] for line in cgroup.splitlines()]


def _fields(line: str) -> tuple[str, list[str]]:
    _, controllers, path = [*line.split(":", 2), "", ""][:3]
    return controllers, [part for part in path.split("/") if part]


def _container(parent: str, part: str) -> Place | None:
    found = _CONTAINER.match(part)
    if found:
        in_kubernetes = parent.startswith(("kubepods", "pod"))
        engine = _ENGINES.get(found[1] or parent, "crictl" if in_kubernetes else None)
        return Place(None, found[2], f"{engine} stop {found[2][:12]}" if engine else None)
    machine = _MACHINE.match(part)
    if machine:
        return Place(None, machine[1] or machine[2], f"machinectl stop {machine[2]}" if machine[2] else None)
    return None
