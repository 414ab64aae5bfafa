"""Client processes on the hosts of a lab that take names from each other, use a device that fences, and record what
they see; and the judge of it.

As a program, `python lab_members.py JOB` is one of them. It records a line a fact, each one write, with the instant
(CLOCK_MONOTONIC) as its last word:

    G name token id at      granted
    C name token at         its lock is held and confirmed (looked at before this instant)
    F name token highest at the device refused the token, for a higher one
    L name token at         lost
    R name at               no longer held by it: released, or its turn is over
    I name id at            the name has this ULID
    E code at               an error
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers import PATIENCE_S, TESTS, environment
from madsci_registry import HeldError, Registration, RegistryClient, RegistryError

LOOK_S = 0.01


@dataclass(frozen=True)
class Job:
    """What a member is to do."""

    registry: str
    record: str
    device: str
    seed: int
    names: int


class Device:
    """Devices, one for each name, that do what they are told with the highest token seen, and refuse lower ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def use(self, name: str, token: int) -> int:
        """Use it; return the highest token, which is `token` where it was not refused."""
        file = os.open(self._folder / f"{name}.device", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            highest = max(int(os.pread(file, 20, 0) or b"0"), token)
            os.pwrite(file, b"%020d" % highest, 0)
            return highest
        finally:
            os.close(file)


class Member:
    """What one member does, turn by turn."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.client = RegistryClient(job.registry, timeout=PATIENCE_S, autostart=False)
        self.device = Device(Path(job.device))
        self.file = os.open(job.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.random = random.Random(job.seed)
        self.turns = 0

    def turn(self) -> None:
        """Take a name, and hold it for a while; or make a name of its own, and change it."""
        self.turns += 1
        try:
            if self.random.random() < 0.3:
                self._own()
            else:
                self._hold(f"shared-{self.random.randrange(self.job.names)}")
        except HeldError:
            time.sleep(0.02)
        except RegistryError as error:
            self._note("E", error.code)
            time.sleep(0.02)

    def _own(self) -> None:
        name = f"own-{self.job.seed}-{self.turns}"
        self._note("I", name, self.client.resolve(name, "node", acquire_lock=False).id)
        self.client.set_metadata(name, {"turn": self.turns})
        self.client.rename(name, f"{name}-renamed")

    def _hold(self, name: str) -> None:
        held = self.client.resolve(name, "node", wait=self.random.choice((0, 0.2, 2.0)))
        self._note("G", name, str(held.fencing_token), held.id)
        until = time.monotonic() + self.random.choice((0.05, 0.3, 3.0)) * self.random.random()
        while time.monotonic() < until and self._look(name, held):
            time.sleep(LOOK_S)
        self._note("R", name)
        held.release()

    def _look(self, name: str, held: Registration) -> bool:
        """Use the device if the lock is confirmed; tell whether it is held."""
        at = time.monotonic()
        token = held.fencing_token or 0
        if held.state == "lost":
            self._note("L", name, str(token))
            return False
        if held.lab == "confirmed" and held.state == "held" and held.fencing_token == token:
            self._note("C", name, str(token), at=at)
            highest = self.device.use(name, token)
            if highest != token:
                self._note("F", name, str(token), str(highest))
        return held.held

    def _note(self, *facts: str, at: float | None = None) -> None:
        os.write(self.file, " ".join((*facts, f"{time.monotonic() if at is None else at:.6f}\n")).encode())


class MemberProcess:
    """One member. It runs until it is told to stop, or killed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "lab_members.py"), json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            env=environment(MADSCI_REGISTRY_AUTOSTART="0"),
        )

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._reap()

    def finish(self) -> int:
        """Let it finish what it is at; return its exit status."""
        assert self._process.stdin
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()
        return self._reap()

    def _reap(self) -> int:
        status = self._process.wait(2 * PATIENCE_S)
        assert self._process.stdin
        self._process.stdin.close()
        return status

    def lines(self) -> list[str]:
        """Return what it has recorded, but for a line that was cut."""
        path = Path(self.job.record)
        return path.read_text().split("\n")[:-1] if path.exists() else []


@dataclass(order=True)
class Span:
    """For how long at least a lock was confirmed in the eyes of its holder."""

    begin: float
    end: float
    token: int
    who: str


@dataclass
class Verdict:
    """What the records of all members show."""

    grants: int = 0
    confirmed: int = 0
    """Grants that were confirmed at some time."""
    moves: int = 0
    """Of these, the ones that followed on one of another host."""
    refused: int = 0
    """How often the device refused somebody."""
    lost: int = 0
    ids: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """All ULIDs that a name was said to have."""
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.grants} grants, {self.confirmed} confirmed, {self.moves} moves between hosts, {self.lost} lost, "
            f"{self.refused} refused by the device, {len(self.ids)} names, errors {dict(self.errors)}"
        )


def judge(records: dict[str, list[str]]) -> Verdict:
    """Judge records, by member ("HOST/..."): no name has two confirmed holders at once; the tokens of confirmed locks
    grow in the whole lab; whom a device refused is not confirmed any more."""
    verdict = Verdict()
    spans: dict[str, list[Span]] = defaultdict(list)
    for who, lines in records.items():
        _read(who, lines, verdict, spans)
    for name, found in spans.items():
        found.sort()
        verdict.confirmed += len(found)
        for before, after in itertools.pairwise(found):
            verdict.moves += before.who.split("/")[0] != after.who.split("/")[0]
            if after.begin < before.end:
                verdict.faults.append(f"{name} has two confirmed holders: {before} and {after}")
            if after.token <= before.token:
                verdict.faults.append(f"the token of {name} did not grow: {before}, then {after}")
    return verdict


def _read(who: str, lines: list[str], verdict: Verdict, spans: dict[str, list[Span]]) -> None:
    open_: dict[str, Span | None] = {}
    refused: set[str] = set()
    for line in lines:
        kind, *facts, last = line.split(" ")
        name, at = facts[0], float(last)
        if kind in "GI":
            verdict.ids[name].add(facts[-1])
        if kind == "G":
            verdict.grants += 1
            open_[name] = None
            refused.discard(name)
        elif kind == "C":
            span = open_[name]
            if name in refused:
                verdict.faults.append(f"{name} is confirmed for {who} after a device has refused it: {line}")
            if span is None:
                open_[name] = span = Span(at, at, int(facts[1]), who)
                spans[name].append(span)
            if int(facts[1]) < span.token:
                verdict.faults.append(f"the token of {name} fell for {who}: {span}, then {line}")
            span.end, span.token = at, int(facts[1])
        elif kind == "F":
            verdict.refused += 1
            refused.add(name)
        elif kind == "L":
            verdict.lost += 1
        elif kind == "E":
            verdict.errors[name] += 1


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    member = Member(Job(**json.loads(sys.argv[1])))
    os.set_blocking(0, False)
    while not sys.stdin.buffer.read(1):
        member.turn()
    with suppress(RegistryError):
        member.client.close()


if __name__ == "__main__":
    main()
