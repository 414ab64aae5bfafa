"""Containers for tests, made as an engine makes them, without one: a root of their own (an overlay over the host's),
their own namespaces, an engine's mark in it, and folders of the host that are mounted into it.

`Container` is one that can be started any number of times, each time with a new root. `ServiceDaemon` is a daemon,
`ServiceWorker` a client process in one. All in a container dies with it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pytest

from helpers import PATIENCE_S, PROJECT, TESTS, DaemonProcess, Worker, environment, until
from namespaces import need_namespaces, only_child_of

SHARED = Path("/home/madsci/.madsci")
"""Where MADSci's images have their folder."""
_DIES_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"

# Whatever is mounted or made here is in a mount namespace that ends with its last process.
_ENTER = """set -e
mount --make-rprivate /
mount -t tmpfs layers "$LAYERS"
mkdir "$LAYERS/upper" "$LAYERS/work" "$LAYERS/root"
mount -t overlay -o "lowerdir=/,upperdir=$LAYERS/upper,workdir=$LAYERS/work" overlay "$LAYERS/root"
cd "$LAYERS/root"
if [ "$HOST_PIDS" = yes ]; then mount --rbind /proc proc; else mount -t proc proc proc; fi
mount --rbind /dev dev
rm -f .dockerenv run/.containerenv
if [ -n "$MARK" ]; then mkdir -p "$(dirname "$MARK")"; touch "$MARK"; fi
mkdir -p home/madsci/.madsci
eval "$MOUNTS"
unset LAYERS HOST_PIDS MARK MOUNTS
exec chroot CHROOT_OPTIONS . "$@"
"""


# What a program in a container needs of the host: all of it has to be on the file system of the root folder.
_NEEDED = (PROJECT, Path(sys.prefix), Path(sys.executable).resolve())


@lru_cache(maxsize=1)
def _why_not() -> str | None:
    elsewhere = [str(path) for path in _NEEDED if path.stat().st_dev != Path("/").stat().st_dev]
    if elsewhere:
        return f"needs {elsewhere[0]} on the file system of the root folder"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c",
         "mount -t tmpfs layers /mnt && mkdir /mnt/u /mnt/w /mnt/r && mount -t overlay -o "
         "lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w overlay /mnt/r"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"overlayfs over the root folder does not work here: {done.stderr.strip()}" if done.returncode else None


def need_containers() -> None:
    """Skip the test, with what is missing, where no container can be made."""
    need_namespaces()
    why = _why_not()
    if why:
        pytest.skip(why)


class Container:
    """How to start a program in a container. Immutable; nothing is started yet.

    Args:
        layers: a folder of the host on which each start mounts its own layers, out of sight of the others.
        mounts: folders of the host by their places in the container; a place that ends in `:ro` is read-only, and
            "tmpfs" for a folder is one in memory.
        host_pids: as `pid: host`.
        mark: which file says that it is a container; empty: none does.
        user: uid and gid of the program; it has no other groups, as after gosu.
    """

    def __init__(
        self,
        layers: Path,
        mounts: Mapping[str, Path | str],
        *,
        host_pids: bool = False,
        mark: str = ".dockerenv",
        user: int = 0,
    ) -> None:
        layers.mkdir(exist_ok=True)
        self.host_pids = host_pids
        self._user = user
        self._env = {
            "LAYERS": str(layers),
            "HOST_PIDS": "yes" if host_pids else "",
            "MARK": mark,
            "MOUNTS": "\n".join(
                [*(_mount(place, folder) for place, folder in mounts.items()), *(_OPENED if user else ())]
            ),
        }

    def command(self, *argv: str) -> list[str]:
        """Return the command line that runs a program in a new start of the container."""
        spaces = ["--mount", "--uts", "--ipc", *([] if self.host_pids else ["--pid", "--fork", "--kill-child"])]
        user = [f"--userspec={self._user}:{self._user}", "--groups="] if self._user else []
        script = _ENTER.replace("CHROOT_OPTIONS", shlex.join(user))
        return ["unshare", *spaces, "sh", "-c", script, "sh", *argv]

    def environment(self, **extra: str) -> dict[str, str]:
        """Return what the command needs, and a clean environment for the program in it."""
        clean = environment(HOME="/home/madsci", **extra)
        clean.pop("MADSCI_REGISTRYD_EPHEMERAL", None)
        return {**clean, **extra, **self._env}

    def run(self, *argv: str, python: str = sys.executable, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these words in a new start of the container, to its end."""
        return subprocess.run(
            self.command(python, *argv),
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=False,
        )

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the first process of a start, and so to all of them; wait until they are gone."""
        if process.poll() is None:
            # Without a PID namespace, unshare, sh and chroot have become the program.
            victim = process.pid if self.host_pids else only_child_of(process.pid)
            if victim:  # then unshare ends; the other way round it would leave while this one lives
                os.kill(victim, signal.SIGKILL)
            else:
                process.kill()
        process.wait(PATIENCE_S)


# For another user than root: the way to what is needed, in the container's own layer; the host's is not changed.
_OPENED = [f"chmod a+x .{shlex.quote(str(parent))}" for path in _NEEDED for parent in path.parents]


def _mount(place: str, folder: Path | str) -> str:
    target, _, mode = place.lstrip("/").partition(":")
    quoted = shlex.quote(target)
    lines = [f"mkdir -p {quoted}"]
    lines += [f"mount -t tmpfs tmpfs {quoted}" if folder == "tmpfs" else f"mount --bind {folder} {quoted}"]
    if mode == "ro":
        lines += [f"mount -o remount,bind,ro {quoted}"]
    return "\n".join(lines)


class ServiceDaemon(DaemonProcess):
    """A daemon in a container that mounts the folder of `registry`; a new start of the container at each start."""

    def __init__(self, registry: Path, container: Container, *options: str) -> None:
        super().__init__(registry, *options)
        self.container = container

    @property
    def pid(self) -> int:
        """Its pid on the host."""
        assert self._process, "not started"
        if self.container.host_pids:
            return self._process.pid
        unshare = self._process.pid
        found: int = until(lambda: only_child_of(unshare), "for unshare to fork")
        return found

    def spawn(self) -> None:
        assert self._process is None, "already started"
        daemon = [sys.executable, "-m", "madsci_registryd", "--registry", str(SHARED / self.registry.name)]
        command = self.container.command(*daemon, *self.options)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIES_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.container.environment(),
            )

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process:
            self.container.kill(self._process)
            self._process = None


class ServiceWorker(Worker):
    """A client process in a container that mounts the registry's folder."""

    def __init__(self, container: Container, registry: Path = SHARED / "registry.json") -> None:
        self.container = container
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DIES_WITH_PARENT,
             *container.command(sys.executable, str(TESTS / "worker.py"), str(registry))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=container.environment(),
        )  # fmt: skip
        self._buffer = b""

    @property
    def program(self) -> int:
        """The pid on the host of the client itself."""
        if self.container.host_pids:
            return self.pid
        return int(until(lambda: only_child_of(self.pid), "for unshare to fork"))

    def freeze(self) -> None:
        """SIGSTOP to the client, as `docker pause` would."""
        os.kill(self.program, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.program, signal.SIGCONT)

    def kill(self) -> float:
        """Kill its container; return the monotonic instant just before."""
        before = time.monotonic()
        self.container.kill(self._process)
        return before
