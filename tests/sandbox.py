"""A real systemd for tests: PID 1 of namespaces of its own (tests/systemd_sandbox.sh), our programs in it under /opt.

    def test_...(sandbox: Sandbox):                     # the fixture: a fresh system without any unit of ours
        sandbox.run("systemctl", "start", "x.service")      # as root; AssertionError unless it ends with status 0
        sandbox.run("id", user="ann")                       # as a user of it: sandbox.add_user("ann", "madsci")
        with sandbox.worker(registry, user="ann") as one:   # a helpers.Worker that lives in it
            one.ask("resolve", "arm")

What is in it: this machine's files, with writes that nobody else sees and that are gone afterwards; an empty
/etc/systemd/system; the environment that runs the tests at /opt/madsci-registryd, as an installation would be; the
checkout, read-only, at /opt/madsci-registryd-source. It has no network but its own loopback. Nothing of it outlives the
test; what a killed test run left is removed by the next one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from helpers import PATIENCE_S, PROJECT, TESTS, Worker, until
from namespaces import inner_pid, only_child_of

PREFIX = Path("/opt/madsci-registryd")
SOURCE = Path("/opt/madsci-registryd-source")
SYSTEM_REGISTRY = Path("/var/lib/madsci/registry.json")
_SCRIPT = TESTS / "systemd_sandbox.sh"
_STATES = Path("/tmp")
_EDITABLE = "_editable_impl_madsci_registryd.pth"
_numbers = count()


@lru_cache(maxsize=1)
def _why_not() -> str | None:
    """Say what this machine lacks; None: nothing."""
    if sys.prefix == sys.base_prefix:
        return "needs to run in a virtual environment (make test)"
    done = subprocess.run(["bash", str(_SCRIPT), "check"], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        return f"no systemd can be booted here: {done.stderr.strip().rpartition(': ')[2]}"
    assert done.returncode == 0, done.stderr
    return None


def need_sandbox() -> None:
    """Skip the test, with what is missing, where no systemd can be booted."""
    why = _why_not()
    if why:
        pytest.skip(why)


class Sandbox:
    """A system with a systemd of its own, from `with` to its end. Several at once do not meet."""

    python = str(PREFIX / "bin" / "python")

    def __init__(self, *options: str, keep: str = "") -> None:
        """`options` are those of the script's `up` (--ro, --rw, --cgroup); `keep` names units of the machine that it
        would mask, such as systemd-logind.service."""
        self._options = options
        self._keep = keep
        self._name = f"madsci-{os.getpid()}-{next(_numbers)}"

    def __enter__(self) -> Sandbox:
        need_sandbox()
        _remove_left_ones()
        with tempfile.TemporaryDirectory() as units:
            self._script("up", units, "--venv", f"{sys.prefix}:{PREFIX}", "--ro", f"{PROJECT}:{SOURCE}", *self._options)
        try:
            self._set_up()
        except BaseException:
            self._script("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._script("down")

    def _script(self, *arguments: str) -> str:
        done = subprocess.run(
            ["bash", str(_SCRIPT), *arguments],
            env={**os.environ, "SDSB_NAME": self._name, "SDSB_KEEP": self._keep, "SDSB_DOWN_S": "5"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{arguments[0]}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _set_up(self) -> None:
        """Let the editable installation mean the checkout where it is seen in there: at home it may be closed."""
        site = Path(sysconfig.get_path("purelib"))
        assert (site / _EDITABLE).exists(), f"{site} has no editable installation of this checkout: make test makes one"
        inside = PREFIX / site.relative_to(sys.prefix) / _EDITABLE
        self.write("/run/source.pth", f"{SOURCE}/client\n{SOURCE}/daemon\n")
        self.run("mount", "--bind", "/run/source.pth", str(inside))
        self.run("rm", "-f", "/.dockerenv")  # this machine may be a container, or made from its image; that one is none

    # what tests use

    @property
    def pid(self) -> int:
        """The pid of its PID 1 out here; /proc/PID/root is its file system."""
        return int(self._script("pid"))

    def words(self, *command: str | Path, user: str | None = None) -> list[str]:
        """Return the command line that runs a command in it, as root or as a user with its groups."""
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        return ["env", f"SDSB_NAME={self._name}", "bash", str(_SCRIPT), "exec", *as_user, *map(str, command)]

    def run(
        self, *command: str | Path, user: str | None = None, status: int | None = 0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it (clean environment, in /) and check its exit status (None: any)."""
        words = self.words(*command, user=user)
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert status in (None, done.returncode), f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def shell(self, script: str, **how: Any) -> str:
        """Run a shell script in it that stops at the first failure; return its stdout."""
        return self.run("sh", "-ec", script, **how).stdout

    def registryctl(self, *arguments: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run the installed registryctl."""
        return self.run(PREFIX / "bin" / "registryctl", *arguments, **how)

    def worker(
        self, registry: str | Path = SYSTEM_REGISTRY, *, user: str | None = None, autostart: bool = False
    ) -> InnerWorker:
        """Start a client process in it, as root or a user; `autostart`: it may start a daemon as any client may."""
        return InnerWorker(self, registry, user, autostart=autostart)

    def write(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        """Write a file in it, with its folder."""
        script = 'mkdir -p "$(dirname "$1")"; cat > "$1"; chmod "$2" "$1"'
        self.run("sh", "-ec", script, "sh", path, f"{mode:o}", stdin=text)

    def add_user(self, name: str, *groups: str) -> int:
        """Make a user with a home and a group of its own; return its uid."""
        self.run("useradd", "--create-home", "--user-group", *(["--groups", ",".join(groups)] if groups else []), name)
        return int(self.run("id", "-u", name).stdout)

    def unit(self, name: str, what: str) -> str:
        """Return a property of a unit, as `systemctl show` prints it."""
        return self.run("systemctl", "show", "--value", "--property", what, name).stdout.strip()

    def main_pid(self, unit: str) -> int:
        """Return the pid, in there, of a unit's main process; 0: there is none."""
        return int(self.unit(unit, "MainPID"))

    def journal(self, unit: str) -> str:
        """Return what a unit has logged, and what systemd logged about it."""
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit).stdout

    def await_state(self, unit: str, state: str, patience_s: float = PATIENCE_S) -> None:
        """Wait until a unit's ActiveState is `state`."""
        deadline = time.monotonic() + patience_s
        while (found := self.unit(unit, "ActiveState")) != state:
            assert time.monotonic() < deadline, f"{unit} is {found}, not {state}:\n{self.journal(unit)}"
            time.sleep(0.02)


class InnerWorker(Worker):
    """A client process in a sandbox (tests/worker.py); `pid` is the one that it has in there."""

    def __init__(self, sandbox: Sandbox, registry: str | Path, user: str | None, *, autostart: bool) -> None:
        setting = f"MADSCI_REGISTRY_AUTOSTART={'' if autostart else '0'}"
        words = ("env", setting, sandbox.python, SOURCE / "tests" / "worker.py", registry)
        self._process = subprocess.Popen(
            sandbox.words(*words, user=user), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._outer_pid: int | None = None
        self._buffer = b""

    def _find(self) -> int:
        """Return its pid out here: it is the child of what entered the namespaces."""
        if self._outer_pid is None:
            self._outer_pid = until(lambda: only_child_of(self._process.pid), "for nsenter to fork")
        return self._outer_pid

    @property
    def pid(self) -> int:
        return inner_pid(self._find())

    def signal(self, number: int) -> None:
        os.kill(self._find(), number)

    def kill(self) -> float:
        before = time.monotonic()
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
        self._process.wait(PATIENCE_S)
        return before


def _remove_left_ones() -> None:
    """End sandboxes whose test run was killed: they are named after its pid."""
    for state in _STATES.glob(".sdsb-madsci-*-*"):
        name = state.name.removeprefix(".sdsb-").removesuffix(".lock")
        owner = name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            subprocess.run(
                ["bash", str(_SCRIPT), "down"], env={**os.environ, "SDSB_NAME": name}, capture_output=True, check=False
            )
