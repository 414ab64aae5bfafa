"""What clients record of what they were told, and the judge of it.

A client records one line a fact, with the instant (CLOCK_MONOTONIC, the same for all processes) as its last word, taken
after a grant came and before its release is sent. A line is one write, so what was written survives SIGKILL. Hence a
client held a name from its G at least until its R, or until just before it died; the judge compares these intervals.

    W name at               asks for it, and waits
    G name token id at      granted
    H name token at         still held
    R name token at         about to release
    L name token at         lost
    I name id at            identity answered, no lock taken
    E code at               another error than held
    K at                    about to die
    C at                    about to end its lifeline for good while it lives on
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from madsci_registry.protocol import RESUME_S

_EPOCH_BITS = 20
"""A fencing token is epoch x 2^20 + n (docs/architecture.md)."""


@dataclass
class Record:
    """What one client recorded, and when it was killed if somebody did that. `label` is for the figures."""

    client: str
    lines: list[str]
    killed_at: float | None = None
    label: str = ""

    @classmethod
    def read(cls, path: Path, killed_at: float | None = None) -> Record:
        """Read a file; a line that was cut by SIGKILL says nothing."""
        text = path.read_text() if path.exists() else ""
        return cls(path.name, text.split("\n")[:-1], killed_at)


@dataclass
class Verdict:
    """What the records of all clients show."""

    grants: int = 0
    identities: dict[str, str] = field(default_factory=dict)
    """Every name whose ULID was answered to somebody."""
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Broken promises, in words."""
    hand_overs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By the label of who held before: after how many seconds who waited already had it."""
    first_grants: dict[int, float] = field(default_factory=dict)
    """For each epoch, which is a start of the daemon, the instant of its first grant."""


@dataclass(order=True)
class _Interval:
    begin: float
    end: float
    token: int
    client: str
    label: str = field(compare=False, repr=False)
    asked_at: float | None = field(compare=False)


def judge(records: list[Record]) -> Verdict:
    """Judge: no name held twice, tokens that grow and stay, one ULID a name, no lock of a living holder lost."""
    verdict = Verdict()
    intervals: dict[str, list[_Interval]] = defaultdict(list)
    for record in records:
        _Reader(record, verdict, intervals).read()
    for name, held in intervals.items():
        held.sort()
        for before, after in itertools.pairwise(held):
            if after.begin < before.end:
                verdict.faults.append(f"{name} held twice: {before} and {after}")
            if after.token <= before.token:
                verdict.faults.append(f"token of {name} did not grow: {before} then {after}")
            if after.asked_at is not None and after.asked_at < before.end:
                verdict.hand_overs[before.label].append(after.begin - before.end)
    return verdict


class _Reader:
    """Reads the record of one client."""

    def __init__(self, record: Record, verdict: Verdict, intervals: dict[str, list[_Interval]]) -> None:
        self.record = record
        self.verdict = verdict
        self.intervals = intervals
        self.open: dict[str, _Interval] = {}
        self.asked: dict[str, float] = {}
        self.ends = [] if record.killed_at is None else [record.killed_at]
        """What it held and did not release ended with the first of these."""
        self.kinds: dict[str, Callable[..., None]] = {
            "W": self._waits,
            "G": self._granted,
            "H": self._holds,
            "R": self._releases,
            "L": self._lost,
            "I": self._identity,
            "E": self._error,
            "K": self._dies,
            "C": self._cuts,
        }

    def read(self) -> None:
        for line in self.record.lines:
            kind, *facts, at = line.split(" ")
            self.kinds[kind](float(at), *facts)
        for name, left in self.open.items():
            if self.ends:
                left.end = max(left.begin, min(self.ends))
            else:
                self._fault(f"ended without releasing {name}, and was not killed")

    def _fault(self, what: str) -> None:
        self.verdict.faults.append(f"{self.record.client} {what}")

    def _waits(self, at: float, name: str) -> None:
        self.asked[name] = at

    def _granted(self, at: float, name: str, token: str, id: str) -> None:
        self._identity(at, name, id)
        self.verdict.grants += 1
        who, asked_at = self.record, self.asked.pop(name, None)
        interval = _Interval(at, float("inf"), int(token), who.client, who.label, asked_at)
        if name in self.open:
            self._fault(f"was granted {name} (token {token}) while it held it: {self.open[name]}")
        self.open[name] = interval
        self.intervals[name].append(interval)
        firsts, epoch = self.verdict.first_grants, int(token) >> _EPOCH_BITS
        firsts[epoch] = min(at, firsts.get(epoch, at))

    def _holds(self, at: float, name: str, token: str) -> None:
        held = self.open.get(name)
        if held is None:
            self._fault(f"held {name} (token {token}) at {at} without a grant")
        elif held.token != int(token):
            self._fault(f"had the token of {name} changed under it: {held}, then {token}")

    def _releases(self, at: float, name: str, token: str) -> None:
        self._holds(at, name, token)
        if name in self.open:
            self.open.pop(name).end = at

    def _lost(self, at: float, name: str, token: str) -> None:
        self._fault(f"lost {name} (token {token}) at {at}, which nobody took from it")
        if name in self.open:
            self.open.pop(name).end = at

    def _identity(self, at: float, name: str, id: str) -> None:
        known = self.verdict.identities.setdefault(name, id)
        if known != id:
            self.verdict.faults.append(f"{name} has two ULIDs: {known} and {id}")

    def _error(self, at: float, code: str) -> None:
        self.verdict.errors[code] += 1

    def _dies(self, at: float) -> None:
        self.ends.append(at)

    def _cuts(self, at: float) -> None:
        self.ends.append(at + RESUME_S)
