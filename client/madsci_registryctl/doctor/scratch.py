"""A scratch registry for the crash test: a folder of its own, a daemon, and client processes to kill and freeze.

All of it is ended and removed when the Scratch is left, whatever happened; and if this process is killed itself, the
kernel kills what it started (PR_SET_PDEATHSIG), only the folder stays. What is started is in sessions of its own, so
that a terminal's Ctrl-C reaches this process alone, which then clears up.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from madsci_registry._autostart import clean_environment
from madsci_registry._endpoint import environment
from madsci_registryctl.doctor import probes

PATIENCE_S = 15.0
"""For one step: hundreds of times what it takes on a quiet machine."""
TOTAL_S = 60.0
"""For all steps together, so that a daemon that never answers does not add up."""
LOOK_S = 0.005

# Says when it becomes the daemon, so that the start of this little program is not counted.
_BECOME_DAEMON = (
    "import ctypes, os, sys, time; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.write(1, f'{time.monotonic()!r}\\n'.encode()); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class NotKept(Exception):
    """A step of the crash test had another end than is promised, or none."""


class Scratch:
    """The folder, the daemon and the clients, from `with Scratch()` to its end."""

    def __enter__(self) -> Scratch:
        self.deadline = time.monotonic() + TOTAL_S
        self._daemon: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []
        self._stack = ExitStack()
        folder = Path(tempfile.mkdtemp(prefix="madsci-doctor-")).resolve()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self._stack.callback(self.kill_daemon)
        self._stack.callback(self.end_clients)
        self.registry = folder / "registry.json"
        self.lifeline = folder / "run" / "registry.life"
        self.log = folder / "log"
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)

    def patience_s(self) -> float:
        """Say how long the next step may take."""
        return max(0.0, min(PATIENCE_S, self.deadline - time.monotonic()))

    def spawn(self, *words: str, **pipes: Any) -> subprocess.Popen[bytes]:
        """Start Python with these words, in a clean environment."""
        env = {**clean_environment(environment()), "MADSCI_REGISTRY_AUTOSTART": "0"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *words], stderr=log, env=env, cwd="/", start_new_session=True, **pipes
            )

    # the daemon

    def start_daemon(self) -> float:
        """Start the daemon and wait until it listens; return the monotonic instant of its exec. Raises NotKept."""
        settings = ("--registry", str(self.registry), "--ephemeral")
        words = ("-c", _BECOME_DAEMON, str(os.getpid()), "-m", "madsci_registryd", *settings)
        self._daemon = self.spawn(*words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._daemon.stdout is not None
        said = self._daemon.stdout.readline()
        until = time.monotonic() + self.patience_s()
        while probes.listener(self.lifeline).state != "listening":
            if self._daemon.poll() is not None or time.monotonic() >= until:
                raise NotKept(f"the scratch daemon does not serve: {self.last_words()}")
            time.sleep(LOOK_S)
        return float(said)

    def kill_daemon(self) -> None:
        """SIGKILL, if it runs."""
        if self._daemon is not None:
            _kill(self._daemon)
            assert self._daemon.stdout is not None
            self._daemon.stdout.close()
            self._daemon = None

    def serve(self) -> None:
        """Start the daemon unless it runs. Raises NotKept."""
        if self._daemon is None or self._daemon.poll() is not None:
            self.kill_daemon()
            self.start_daemon()

    def last_words(self) -> str:
        """Return the last line that one of the processes logged."""
        with suppress(OSError, IndexError):
            return self.log.read_text(errors="backslashreplace").splitlines()[-1]
        return "it said nothing"

    # clients

    def client(self) -> Client:
        """Start one more client process."""
        self._clients.append(Client(self))
        return self._clients[-1]

    def end_clients(self) -> None:
        """End all client processes, and what they forked."""
        while self._clients:
            self._clients.pop().end()


class Client:
    """A client process (crash_client.py): `ask` is an order and its answer, `tell` and `answer` are its halves."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        words = ("-m", "madsci_registryctl.doctor.crash_client", str(scratch.registry), str(os.getpid()))
        self._process = scratch.spawn(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and return its answer. Raises NotKept."""
        self.tell(call, **arguments)
        return self.answer(call)

    def tell(self, call: str, **arguments: Any) -> None:
        """Give an order. Raises NotKept where the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise NotKept(f"a client process has ended: {self._scratch.last_words()}") from None

    def answer(self, call: str) -> dict[str, Any]:
        """Return the answer of the order that was given. Raises NotKept: none came, or the process has ended."""
        patience_s = self._scratch.patience_s()
        until = time.monotonic() + patience_s
        while b"\n" not in self._buffer:
            if not self._is_readable(until - time.monotonic()):
                raise NotKept(f"no answer to {call} within {patience_s:.0f} s")
            piece = os.read(self._output, 65536)
            if not piece:
                raise NotKept(f"a client process has ended: {self._scratch.last_words()}")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def _output(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _is_readable(self, within_s: float) -> bool:
        poller = select.poll()
        poller.register(self._output, select.POLLIN)
        return bool(poller.poll(max(0.0, within_s) * 1000))

    @property
    def left_somebody(self) -> bool:
        """True: the process is dead and a child that it forked lives, as that has its stdout open."""
        return self._process.poll() is not None and not self._is_readable(0)

    def freeze(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> float:
        """SIGKILL; return the monotonic instant just before."""
        before = time.monotonic()
        _kill(self._process)
        return before

    def end(self) -> None:
        """SIGKILL, and the end of what it forked, which lives until its stdin is closed."""
        _kill(self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        while self._is_readable(PATIENCE_S) and os.read(self._output, 65536):
            pass
        self._process.stdout.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
