"""A test in the place of a service manager: what systemd gives a daemon and hears from it."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from helpers import PATIENCE_S, environment


class Manager:
    """Starts a daemon as systemd does: it may pass listening sockets, and it is told how the daemon stands."""

    def __init__(self, registry: Path, stack: ExitStack) -> None:
        self.registry = registry
        self._stack = stack
        self.address = registry.with_name("notify")
        self.socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.socket.bind(str(self.address))
        self.socket.settimeout(PATIENCE_S)
        self.passed: list[socket.socket] = []

    def listen(self, *names: str) -> None:
        """Make the sockets of these names; the daemon gets them at its start."""
        run = self.registry.parent / "run"
        run.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(run / name))
            sock.listen(4096)
            self.passed.append(sock)

    def start(self, *options: str, watchdog_s: float = 0.0) -> subprocess.Popen[bytes]:
        extra = {"NOTIFY_SOCKET": str(self.address)}
        if watchdog_s:
            extra["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        wiring = " ".join(f"{3 + n}<&{sock.fileno()}" for n, sock in enumerate(self.passed))
        script = f'exec {wiring}; export LISTEN_PID=$$ LISTEN_FDS={len(self.passed)}; exec "$@"'
        command = [sys.executable, "-m", "madsci_registryd", "--registry", str(self.registry), *options]
        with self.registry.with_name("test.log").open("ab") as log:
            daemon = subprocess.Popen(
                ["bash", "-c", script, "bash", *command],
                env=environment(**extra),
                pass_fds=[sock.fileno() for sock in self.passed],
                stderr=log,
            )
        self._stack.callback(daemon.wait)
        self._stack.callback(daemon.kill)
        return daemon

    def hears(self, word: str) -> str:
        """Wait for a message with this word; return it."""
        while word not in (message := self.socket.recv(4096).decode()):
            pass
        return message
