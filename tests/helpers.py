"""What tests share: a clock to turn, a real daemon, and client processes that can be killed and frozen.

Nothing here outlives its test: daemons and workers get SIGKILL when the test process dies (PR_SET_PDEATHSIG), and
the fixtures end what is left before that.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent
PATIENCE_S = 30.0
"""How long anything may take before a test gives up: far above what is normal, as machines that test are loaded."""

_DIES_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class FakeClock:
    """A clock for the daemon's rules that moves only when a test says so."""

    def __init__(self, monotonic: float = 1000.0, wall: float = 1_790_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._slept = 0.0

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic += seconds
        self._wall += seconds

    def boottime(self) -> float:
        return self._monotonic + self._slept

    def sleep(self, seconds: float) -> None:
        """Let the machine be suspended: only the wall clock and the clock that counts sleep go on."""
        self._slept += seconds
        self._wall += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock; monotonic time does not notice."""
        self._wall += seconds


def until(condition: Callable[[], Any], what: str = "", patience_s: float = PATIENCE_S) -> Any:
    """Return the first true answer of `condition`; AssertionError after `patience_s`. For what sends no event."""
    deadline = time.monotonic() + patience_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain {what}"
        time.sleep(0.005)
    return answer


def environment(**extra: str) -> dict[str, str]:
    """Return an environment for child processes in which our packages are found, settings of the user are not."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MADSCI_")}
    env["PYTHONPATH"] = os.pathsep.join(str(PROJECT / part) for part in ("client", "daemon", "lab", "tests"))
    env["PYTHONWARNINGS"] = "error"
    env["MADSCI_REGISTRYD_EPHEMERAL"] = "true"  # tests may run in a container, where temporary folders go with it
    return {**env, **extra}


class ProgramProcess:
    """A Python program of ours in a process of its own, which says on stderr what it does, to a file."""

    def __init__(self, log_path: Path) -> None:
        self.extra_env: dict[str, str] = {}
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process, "not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it has said on stderr, over all its starts."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def run(self, *arguments: str) -> None:
        """Start the interpreter with these arguments; do not wait until it serves."""
        assert self._process is None, "already started"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIES_WITH_PARENT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(**self.extra_env),
            )

    def check_alive(self) -> None:
        assert self._process
        assert self._process.poll() is None, f"it ended with {self._process.returncode}:\n{self.log}"

    def signal(self, number: int) -> None:
        """Send it a signal (SIGSTOP, SIGCONT, ...)."""
        assert self._process
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait until the process has ended by itself; return its exit status."""
        assert self._process
        status = self._process.wait(PATIENCE_S)
        self._process = None
        return status

    def terminate(self) -> int:
        """SIGTERM; return the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL and reap, if it runs."""
        if self._process:
            self._process.kill()
            self.wait()


class DaemonProcess(ProgramProcess):
    """A real daemon in a process of its own on `registry` (DIR/NAME.json). A context manager; start() begins it."""

    def __init__(self, registry: Path, *options: str) -> None:
        self.registry = registry
        self.options = options
        self.socket = registry.parent / "run" / f"{registry.stem}.sock"
        self.lifeline = self.socket.with_suffix(".life")
        super().__init__(registry.parent / f"{registry.stem}.test.log")

    def __enter__(self) -> DaemonProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs the daemon's program on this registry."""
        return [sys.executable, "-m", "madsci_registryd", "--registry", str(self.registry), *self.options, *arguments]

    def spawn(self) -> None:
        """Start the process; do not wait until it serves."""
        self.run(*self.command()[1:])

    def start(self) -> DaemonProcess:
        """Start the process and wait until its lifeline accepts."""
        self.spawn()
        until(self._serves, f"for the daemon to serve:\n{self.log}")
        return self

    def _serves(self) -> bool:
        self.check_alive()
        return accepts(self.lifeline)

    def restart(self) -> DaemonProcess:
        """SIGKILL and start again."""
        self.kill()
        return self.start()


def accepts(path: Path) -> bool:
    """Tell whether a stream socket at `path` accepts connections."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        folder = os.open(path.parent, os.O_PATH) if path.parent.is_dir() else None
        if folder is None:
            return False
        try:  # through procfs: the path may be too long for a socket address
            probe.connect(f"/proc/self/fd/{folder}/{path.name}")
        except OSError:
            return False
        finally:
            os.close(folder)
        return True


class Worker:
    """A client process that does what it is told over a pipe (tests/worker.py). A context manager.

    `ask` is a call and its answer; `tell` and `answer` are its halves, for what waits.
    """

    def __init__(self, registry: Path, *, user: str = "", **extra_env: str) -> None:
        """`user`: be UID:GID[:GROUP...], which takes root."""
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "worker.py"), str(registry)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(**{"MADSCI_REGISTRY_AUTOSTART": "0", "WORKER_USER": user, **extra_env}),
        )
        self._buffer = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, call: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the worker's RegistryClient (or one of tests/worker.py's own) and return its answer.

        Raises:
            RegistryError: what the call raised there.
        """
        self.tell(call, *args, **kwargs)
        return self.answer()

    def tell(self, call: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"call": call, "args": args, "kwargs": kwargs}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, patience_s: float = PATIENCE_S) -> Any:
        """Return the answer of the call that was begun, or raise what it raised."""
        from madsci_registry.errors import from_wire

        reply = json.loads(self._line(patience_s))
        if "error" in reply:
            raise from_wire(reply["error"])
        return reply["ok"]

    def answered(self, within_s: float = 0.0) -> bool:
        """Tell whether an answer is there, waiting for it at most `within_s` seconds."""
        assert self._process.stdout
        return b"\n" in self._buffer or bool(select.select([self._process.stdout], [], [], within_s)[0])

    def _line(self, patience_s: float) -> bytes:
        assert self._process.stdout
        deadline = time.monotonic() + patience_s
        while b"\n" not in self._buffer:
            assert self.answered(max(0.0, deadline - time.monotonic())), f"no answer of the worker in {patience_s} s"
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            assert piece, f"the worker ended with {self._process.wait(PATIENCE_S)}"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def signal(self, number: int) -> None:
        """Send the process a signal (SIGSTOP, SIGCONT, SIGINT, ...)."""
        self._process.send_signal(number)

    def kill(self) -> float:
        """SIGKILL and reap; return the monotonic instant just before."""
        before = time.monotonic()
        self._process.kill()
        self._process.wait(PATIENCE_S)
        return before

    def end(self) -> int:
        """Close the worker's input, upon which it closes its client and ends; return its exit status."""
        assert self._process.stdin
        self._process.stdin.close()
        return self._process.wait(PATIENCE_S)


def daemons_under(folder: Path) -> list[int]:
    """List the pids of daemons whose command line names something in `folder` (also autostarted ones)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"madsci_registryd" in line and os.fsencode(folder) + b"/" in line:
                found.append(int(entry.name))
    return found


def end_daemons_under(folder: Path) -> None:
    """Kill every daemon that serves something in `folder`, and wait until it is gone."""
    for pid in daemons_under(folder):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if pid in daemons_under(folder):  # still the same one, now that the descriptor pins it
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            assert select.select([fd], [], [], PATIENCE_S)[0], f"daemon {pid} does not die"
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
