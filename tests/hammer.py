"""Client processes that hammer names while they and the daemon are killed and frozen, and record what they are told.

What a record says, and who judges it: records.py.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from helpers import PATIENCE_S, TESTS, environment
from madsci_registry import Registration, RegistryClient, RegistryError
from madsci_registry.errors import HeldError
from records import Record

Role = Literal["hammer", "keep", "queue"]
QUEUES = 2
"""How many names those share who wait without end."""


@dataclass(frozen=True)
class Job:
    """What a hammering client is to do."""

    registry: str
    record: str
    seed: int
    role: Role
    place: int
    """Which of the kept names a keeper keeps."""
    shared_names: int
    kept_names: int


class HammerProcess:
    """One hammering client process. It runs until it is told to stop, or killed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.killed_at: float | None = None
        self._record = Path(job.record)
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "hammer.py"), json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            env=environment(MADSCI_REGISTRY_AUTOSTART="0"),
        )

    @property
    def record_bytes(self) -> int:
        """How much it has recorded by now."""
        return self._record.stat().st_size if self._record.exists() else 0

    def recorded(self) -> Record:
        return Record.read(self._record, self.killed_at)

    def kill(self) -> None:
        """SIGKILL, unless it has ended; what it held ends at the instant noted just before."""
        if self._process.returncode is None:
            self.killed_at = time.monotonic()
            self._process.kill()
            self.reap()

    def freeze(self) -> None:
        """SIGSTOP: it keeps what it holds."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def tell_to_stop(self) -> None:
        """Let it finish what it is at and end."""
        assert self._process.stdin
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()

    def reap(self) -> int:
        """Wait until it has ended and return its exit status."""
        status = self._process.wait(PATIENCE_S)
        assert self._process.stdin
        self._process.stdin.close()
        return status


class Hammering:
    """What one hammering client does, turn by turn."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.client = RegistryClient(job.registry, timeout=PATIENCE_S)
        self.file = os.open(job.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.random = random.Random(job.seed)
        self.turns = 0
        self.kept: Registration | None = None

    def turn(self) -> None:
        """Do one thing of its role."""
        self.turns += 1
        try:
            {"hammer": self._hammer, "keep": self._keep, "queue": self._queue}[self.job.role]()
        except HeldError:
            pass
        except RegistryError as error:
            self._note("E", error.code)

    def finish(self) -> None:
        """Give back what it keeps, if it still does, by the daemon's word too."""
        if self.kept is not None:
            name = f"kept-{self.job.place}"
            again = self.client.resolve(name, "node")
            self._note("H", name, str(again.fencing_token))
            self._release(name, again)
        self.client.close()

    def _hammer(self) -> None:
        """Take a shared name, hold it for a moment, give it back; now and then make a name of one's own, or try to get
        one that another keeps."""
        if self.random.random() < 0.3:
            name = f"own-{self.job.seed}-{self.turns}"
            registration = self.client.resolve(name, "node", acquire_lock=False)
            self._note("I", name, registration.id)
        elif self.job.kept_names and self.random.random() < 0.2:
            self._hold(f"kept-{self.random.randrange(self.job.kept_names)}", 0, 0)
        else:
            name = f"shared-{self.random.randrange(self.job.shared_names)}"
            self._hold(name, self.random.choice((0, 0.05, 1.0)), self.random.random() * 0.005)

    def _queue(self) -> None:
        """Wait without end, hold for a while."""
        self._hold(f"queue-{self.random.randrange(QUEUES)}", math.inf, self.random.random() * 0.5)

    def _keep(self) -> None:
        """Hold on, idle: ask for nothing, only look whether it is still held."""
        name = f"kept-{self.job.place}"
        if self.kept is None:
            self.kept = self._take(name, math.inf)
        for _ in range(10):
            time.sleep(0.02)
            if not is_held(self.kept):
                self._note("L", name, str(self.kept.fencing_token))
                self.kept = None
                return
        self._note("H", name, str(self.kept.fencing_token))

    def _hold(self, name: str, wait_s: float, hold_s: float) -> None:
        registration = self._take(name, wait_s)
        time.sleep(hold_s)
        self._release(name, registration)

    def _take(self, name: str, wait_s: float) -> Registration:
        if wait_s == math.inf:
            self._note("W", name)
        registration = self.client.resolve(name, "node", wait=wait_s)
        self._note("G", name, str(registration.fencing_token), registration.id)
        return registration

    def _release(self, name: str, registration: Registration) -> None:
        self._note("R" if is_held(registration) else "L", name, str(registration.fencing_token))
        registration.release()

    def _note(self, *facts: str) -> None:
        os.write(self.file, " ".join((*facts, f"{time.monotonic():.6f}\n")).encode())


def is_held(registration: Registration) -> bool:
    """Tell whether a lock is held, by all that its holder has been told."""
    return registration.held and getattr(registration, "state", None) != "lost"


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    hammering = Hammering(Job(**json.loads(sys.argv[1])))
    os.set_blocking(0, False)
    while not sys.stdin.buffer.read(1):
        hammering.turn()
    hammering.finish()


if __name__ == "__main__":
    main()
