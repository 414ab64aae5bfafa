"""A real daemon, and clients of it, whose clocks can be turned while they run.

As a program, `python turned_clock.py OFFSETS MODULE ARGUMENT...` runs a module (madsci_registryd, worker) whose wall
clock and monotonic clock are ahead by the two numbers of seconds in the file OFFSETS, read again at every look at a
clock.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

from helpers import TESTS, DaemonProcess, Worker, environment
from madsci_registry.types import Proof

DAY_S = 86400.0


class TurnedDaemon(DaemonProcess):
    """A daemon whose clocks this test turns; they stay turned over its restarts.

    `proof` is the setting of that name, in a configuration file.
    """

    def __init__(self, registry: Path, proof: Proof = "pidfd") -> None:
        config = registry.parent / "registryd.toml"
        config.write_text(f'proof = "{proof}"\n')
        super().__init__(registry, "--config", str(config))
        self.offsets = registry.parent / "offsets.json"
        self._wall_s = self._monotonic_s = 0.0
        self._write()

    def command(self, *arguments: str) -> list[str]:
        python, _, *rest = super().command(*arguments)
        return [python, str(TESTS / "turned_clock.py"), str(self.offsets), *rest]

    def set_wall(self, seconds: float) -> None:
        """Step the wall clock to so many seconds ahead of the true time (below zero: behind it)."""
        self._wall_s = seconds
        self._write()

    def pass_time(self, seconds: float) -> None:
        """Let the daemon find that so much time has passed, on both its clocks."""
        self._wall_s += seconds
        self._monotonic_s += seconds
        self._write()

    def _write(self) -> None:
        new = self.offsets.with_suffix(".new")
        new.write_text(json.dumps([self._wall_s, self._monotonic_s]))
        new.replace(self.offsets)


class TurnedWorker(Worker):
    """A client process on the same turned clocks."""

    def __init__(self, daemon: TurnedDaemon) -> None:
        program = [sys.executable, str(TESTS / "turned_clock.py"), str(daemon.offsets), "worker", str(daemon.registry)]
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(MADSCI_REGISTRY_AUTOSTART="0"),
        )
        self._buffer = b""


def main() -> None:
    offsets = Path(sys.argv[1])
    true_wall, true_monotonic = time.time, time.monotonic

    def wall() -> float:
        return true_wall() + float(json.loads(offsets.read_text())[0])

    def monotonic() -> float:
        return true_monotonic() + float(json.loads(offsets.read_text())[1])

    time.time, time.time_ns, time.monotonic = wall, lambda: int(wall() * 1e9), monotonic
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
