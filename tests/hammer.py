"""Client processes that hammer shared names while they and the daemon are killed, and the judge of what they recorded.

Each client appends what it was told to a file of its own, one line a fact, the instant (CLOCK_MONOTONIC, the same for
all processes) taken after a grant came and before its release is sent. A written line survives SIGKILL. So a client
held a name from its G at least until its R, or until just before it was killed; the judge compares these intervals.

    G name token id at      granted          R name token at    about to release
    I name id at            identity answered, no lock taken
    L name token at         lost             E code at          another error than held
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from helpers import PATIENCE_S, TESTS, environment
from madsci_registry import RegistryClient, RegistryError
from madsci_registry.errors import HeldError


class HammerProcess:
    """One hammering client process. It runs until stop() or kill()."""

    def __init__(self, registry: Path, record: Path, seed: int, shared_names: int) -> None:
        self.record = record
        self.killed_at: float | None = None
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "hammer.py"), str(registry), str(record), str(seed), str(shared_names)],
            stdin=subprocess.PIPE,
            env=environment(MADSCI_REGISTRY_AUTOSTART="0"),
        )

    def kill(self) -> None:
        """SIGKILL; what it held ends at the instant noted just before."""
        self.killed_at = time.monotonic()
        self._process.kill()
        self._reap()

    def stop(self) -> int:
        """Let it finish what it is at and end; return its exit status."""
        assert self._process.stdin
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()
        return self._reap()

    def _reap(self) -> int:
        status = self._process.wait(PATIENCE_S)
        assert self._process.stdin
        self._process.stdin.close()
        return status


@dataclass
class Verdict:
    """What the records of all clients show."""

    grants: int = 0
    identities: dict[str, str] = field(default_factory=dict)
    """Every name whose ULID was answered to somebody."""
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Broken promises, in words."""


@dataclass(order=True)
class _Interval:
    begin: float
    end: float
    token: int
    client: str


def judge(hammers: list[HammerProcess]) -> Verdict:
    """Read all records and judge: no name held twice, tokens that grow, one ULID a name, nothing lost."""
    verdict = Verdict()
    intervals: dict[str, list[_Interval]] = defaultdict(list)
    for hammer in hammers:
        _read(hammer, verdict, intervals)
    for name, held in intervals.items():
        held.sort()
        for before, after in itertools.pairwise(held):
            if after.begin < before.end:
                verdict.faults.append(f"{name} held twice: {before} and {after}")
            if after.token <= before.token:
                verdict.faults.append(f"token of {name} did not grow: {before} then {after}")
    return verdict


def _read(hammer: HammerProcess, verdict: Verdict, intervals: dict[str, list[_Interval]]) -> None:
    client = hammer.record.name
    open_grants: dict[str, _Interval] = {}
    text = hammer.record.read_text() if hammer.record.exists() else ""
    for line in text.split("\n")[:-1]:  # a line that was cut by SIGKILL says nothing
        kind, *facts = line.split(" ")
        at = float(facts[-1])
        if kind in "GI":
            _identity(verdict, facts[0], facts[2] if kind == "G" else facts[1])
        if kind == "G":
            verdict.grants += 1
            open_grants[facts[0]] = _Interval(at, float("inf"), int(facts[1]), client)
            intervals[facts[0]].append(open_grants[facts[0]])
        elif kind == "R":
            open_grants.pop(facts[0]).end = at
        elif kind == "L":
            verdict.faults.append(f"{client} lost {facts[0]} (token {facts[1]}) that nobody took from it")
        elif kind == "E":
            verdict.errors[facts[0]] += 1
    for left in open_grants.values():
        assert hammer.killed_at is not None, f"{client} ended without releasing, and was not killed"
        left.end = max(left.begin, hammer.killed_at)


def _identity(verdict: Verdict, name: str, id: str) -> None:
    if verdict.identities.setdefault(name, id) != id:
        verdict.faults.append(f"{name} has two ULIDs: {verdict.identities[name]} and {id}")


class Hammering:
    """What one hammering client does, turn by turn."""

    def __init__(self, registry: str, record: str, seed: int, shared_names: int) -> None:
        self.client = RegistryClient(registry, timeout=PATIENCE_S)
        self.file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.random = random.Random(seed)
        self.shared_names = shared_names
        self.own = f"own-{seed}"
        self.turns = 0

    def turn(self) -> None:
        """Take a shared name, hold it for a moment, give it back; now and then make a name of one's own."""
        self.turns += 1
        try:
            if self.random.random() < 0.3:
                name = f"{self.own}-{self.turns}"
                registration = self.client.resolve(name, "node", acquire_lock=False)
                self._note("I", name, registration.id)
                return
            self._hold(f"shared-{self.random.randrange(self.shared_names)}")
        except HeldError:
            pass
        except RegistryError as error:
            self._note("E", error.code)

    def _hold(self, name: str) -> None:
        registration = self.client.resolve(name, "node", wait=self.random.choice((0, 0.05, 1.0)))
        self._note("G", name, str(registration.fencing_token), registration.id)
        time.sleep(self.random.random() * 0.005)
        self._note("R" if registration.held else "L", name, str(registration.fencing_token))
        registration.release()

    def _note(self, *facts: str) -> None:
        os.write(self.file, " ".join((*facts, f"{time.monotonic():.6f}\n")).encode())


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    registry, record, seed, shared_names = sys.argv[1:]
    hammering = Hammering(registry, record, int(seed), int(shared_names))
    os.set_blocking(0, False)
    while not sys.stdin.buffer.read(1):
        hammering.turn()
    hammering.client.close()


if __name__ == "__main__":
    main()
