"""Mixed fleets: old and new programs on the same names of one registry, killed at random, and the judge of it.

What a process records is in fleet_member.py. It held a name at least from its G until its R, or until just before it
was killed; an old one besides no longer than its time to live after its T or its last heartbeat B. So an overlap of
these intervals is one of the holds.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_member import OLD_TTL_S
from helpers import PATIENCE_S, TESTS, DaemonProcess, environment, until
from records import Record

EMULATED_TTL_S = 30.0
CLOCKS_S = 0.01
"""How much the wall clock may be slewed against the monotonic one within a time to live."""
REPAIR_S = 3.0
"""A torn file is written anew within a second of the daemon's being there; machines that test are loaded."""


@dataclass
class Hold:
    """A name, for some time, by one process."""

    begin: float
    end: float
    who: str
    is_old: bool
    asked: float = 0.0
    lives_until: float = float("inf")
    """Until when an old lock is in force, as far as its holder knows."""
    is_cut: bool = False
    """Its holder was killed."""


@dataclass
class Fleets:
    """What the records of a run show."""

    grants: Counter[str] = field(default_factory=Counter)
    """By kind: old, new."""
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    names: int = 0
    torn: int = 0
    """Looks that found a file that an old program left torn."""
    looks: int = 0
    heartbeats: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    """Holders that were killed while they held, by kind."""
    crossings: Counter[str] = field(default_factory=Counter)
    """Names that went from one kind to the other."""
    kills: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"grants {dict(self.grants)}, {self.heartbeats} heartbeats, {self.names} names, kills {dict(self.kills)}, "
            f"of holders {dict(self.cut)}, hand-overs {dict(self.crossings)}, {self.looks} looks ({self.torn} torn), "
            f"errors {dict(self.errors)}"
        )


def judge(records: list[tuple[Record, bool]], ttl_s: float) -> Fleets:
    """Judge records, each with whether it is an old program's: no name is held by an old and a new one at once, nor by
    two new ones, nor given to a new one while a killed old one's lock is in force; no name has two ULIDs."""
    verdict = Fleets()
    ids: dict[str, str] = {}
    holds: dict[str, list[Hold]] = defaultdict(list)
    for record, is_old in records:
        _read(record, is_old, ttl_s, verdict, ids, holds)
    verdict.names = len(ids)
    for name, held in holds.items():
        _judge_name(name, sorted(held, key=lambda hold: hold.begin), verdict)
    return verdict


def _read(
    record: Record, is_old: bool, ttl_s: float, verdict: Fleets, ids: dict[str, str], holds: dict[str, list[Hold]]
) -> None:
    open_: dict[str, Hold] = {}
    asked: dict[str, float] = {}
    for line in record.lines:
        kind, *facts, last = line.split(" ")
        name, at = facts[0], float(last)
        if kind in "GI":
            known = ids.setdefault(name, facts[1])
            if known != facts[1]:
                verdict.faults.append(f"{name} has two ULIDs: {known} and {facts[1]} for {record.client}")
        if kind == "T":
            asked[name] = at
        elif kind == "G":
            hold = Hold(at, float("inf"), record.client, is_old, asked[name])
            if is_old:
                hold.lives_until = asked[name] + ttl_s - CLOCKS_S
            open_[name] = hold
            holds[name].append(hold)
            verdict.grants["old" if is_old else "new"] += 1
        elif kind == "B" and name in open_:
            verdict.heartbeats += 1
            open_[name].lives_until = max(open_[name].lives_until, at + ttl_s - CLOCKS_S)
        elif kind == "R":
            hold = open_.pop(name)
            hold.end = min(at, hold.lives_until)
        elif kind == "E":
            verdict.errors[f"{'old' if is_old else 'new'} {name}"] += 1
    for name, left in open_.items():
        if record.killed_at is None:
            verdict.faults.append(f"{record.client} ended without releasing {name}, and was not killed")
        # A killed old holder cannot release: its lock is in force until its time is over.
        left.end = left.lives_until if is_old else max(left.begin, record.killed_at or left.begin)
        left.is_cut = True
        verdict.cut["old" if is_old else "new"] += 1


def _judge_name(name: str, held: list[Hold], verdict: Fleets) -> None:
    old: list[Hold] = []
    new: Hold | None = None
    for before, hold in itertools.pairwise(held):
        if before.is_old != hold.is_old:
            kinds = "old to new" if before.is_old else "new to old"
            verdict.crossings[f"killed {kinds}" if before.is_cut else kinds] += 1
    for hold in held:
        if hold.is_old:
            if new is not None and hold.begin < new.end:
                verdict.faults.append(f"{name} held by a new and an old one: {new}, {hold}")
            old = [*(each for each in old if each.end > hold.begin), hold]
            continue
        verdict.faults += [
            f"{name} held by an old and a new one: {each}, {hold}" for each in old if hold.begin < each.end
        ]
        if new is not None and hold.begin < new.end:
            verdict.faults.append(f"{name} held by two new ones: {new}, {hold}")
        if new is None or hold.end > new.end:
            new = hold
        old = []


class Member:
    """A process of a fleet."""

    def __init__(self, kind: str, registry: Path, number: int, names: int, rest_s: float, python: str) -> None:
        self.kind, self.number = kind, number
        self.killed_at: float | None = None
        self.path = registry.parent / f"{kind}-{number}.record"
        job = {"kind": kind, "registry": str(registry), "record": str(self.path), "seed": number}
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MADSCI_"))}
        self._process = subprocess.Popen(
            [python, str(TESTS / "fleet_member.py"), json.dumps({**job, "names": names, "rest_s": rest_s})],
            stdin=subprocess.PIPE,
            env=plain if kind == "madsci" else environment(MADSCI_REGISTRY_AUTOSTART="0"),
            cwd=registry.parent,
        )

    @property
    def is_old(self) -> bool:
        return self.kind != "new"

    @property
    def has_begun(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    @property
    def holds(self) -> bool:
        """It seems to hold a name just now."""
        return self.has_begun and self.path.read_bytes().rsplit(b"\n", 2)[-2][:1] in (b"G", b"B")

    def kill(self) -> None:
        self.killed_at = time.monotonic()
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._close()

    def finish(self) -> None:
        """Let it finish what it is at; kill it where that takes too long."""
        self._close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    def recorded(self) -> tuple[Record, bool]:
        return Record.read(self.path, self.killed_at), self.is_old


class Looker(threading.Thread):
    """Looks at the file again and again, under its lock, as MADSci does. What it finds is whole, but where an old
    program was killed while it wrote, and then not for long."""

    def __init__(self, registry: Path) -> None:
        super().__init__(name="looker")
        self.registry = registry
        self.faults: list[str] = []
        self.looks = self.torn = 0
        self.old_killed_at = 0.0
        self.daemon_up_at = time.monotonic()
        self._torn_since: float | None = None
        self._last_whole = time.monotonic()
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.02):
            with Path(f"{self.registry}.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._look()

    def _look(self) -> None:
        began = time.monotonic()
        self.looks += 1
        try:
            entries = json.loads(self.registry.read_bytes())["entries"]
            assert all(len(entry["id"]) == 26 for entry in entries.values())
        except (ValueError, KeyError, FileNotFoundError) as error:
            self._note_torn(began, repr(error))
            return
        self._torn_since, self._last_whole = None, began

    def _note_torn(self, now: float, what: str) -> None:
        self.torn += 1
        self._torn_since = self._torn_since or now
        if self.old_killed_at < self._last_whole - 1.0:
            self.faults.append(f"a broken file, and no old program was killed: {what}")
        elif now - max(self._torn_since, self.daemon_up_at) > REPAIR_S:
            self.faults.append(f"a broken file was not written anew: {what}")

    def stop(self) -> None:
        self._end.set()
        self.join(PATIENCE_S)


def run_mixed_fleets(
    daemon: DaemonProcess,
    *,
    old: int,
    new: int,
    seconds: float,
    pause_s: float,
    seed: int,
    names: int = 6,
    rest_s: float = 0.0,
    madsci: Path | None = None,
    kill_old: bool = True,
) -> Fleets:
    """Let an old and a new fleet hammer the same names while members and the daemon are killed and replaced.

    Args:
        daemon: which serves at the beginning and the end.
        old: how many old programs.
        new: how many new ones.
        seconds: how long.
        pause_s: between two kills, about.
        seed: of the order, and of what the members do.
        names: how many names they share.
        rest_s: how long a new one rests after each hold at most, so that old ones, who only poll, get their share.
        madsci: the folder of the programs in an environment with the real MADSci; None: old programs are emulated.
        kill_old: kill these too.
    """
    print(f"seed {seed}: {old} old and {new} new programs for {seconds:g} s")
    kind, python = ("madsci", str(madsci / "python")) if madsci else ("emulated", sys.executable)
    chance, kills = random.Random(seed), Counter[str]()
    all_: list[Member] = []

    def add(which: str) -> Member:
        runs = sys.executable if which == "new" else python
        all_.append(Member(which, daemon.registry, seed * 1000 + len(all_), names, rest_s, runs))
        return all_[-1]

    living = [add(which) for which in [kind] * old + ["new"] * new]
    looker = Looker(daemon.registry)
    try:
        until(lambda: all(member.has_begun for member in living), "for the fleets to begin")
        looker.start()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(chance.uniform(0.5, 1.5) * pause_s)
            _kill_one(daemon, living, looker, chance, kills, add, kill_old)
        time.sleep(1.0)
        for member in living:
            member.finish()
    finally:
        if looker.is_alive():
            looker.stop()
        for member in all_:
            if member._process.poll() is None:
                member.kill()
    verdict = judge([member.recorded() for member in all_], OLD_TTL_S if madsci else EMULATED_TTL_S)
    verdict.faults += looker.faults
    verdict.looks, verdict.torn, verdict.kills = looker.looks, looker.torn, kills
    print(verdict)
    return verdict


def _kill_one(
    daemon: DaemonProcess,
    living: list[Member],
    looker: Looker,
    chance: random.Random,
    kills: Counter[str],
    add: Any,
    kill_old: bool,
) -> None:
    if chance.random() < 0.3:
        daemon.kill()
        time.sleep(chance.choice((0.0, 0.0, 0.3)))
        daemon.start()
        looker.daemon_up_at = time.monotonic()
        kills["daemon"] += 1
        return
    able = [member for member in living if kill_old or not member.is_old]
    holding = [member for member in able if member.holds]
    victim = chance.choice(holding if holding and chance.random() < 0.5 else able)
    if victim.is_old:
        looker.old_killed_at = time.monotonic()
    victim.kill()
    kills["old" if victim.is_old else "new"] += 1
    living.remove(victim)
    living.append(add(victim.kind))
