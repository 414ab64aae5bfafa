"""Daemons of several hosts, and several services of one lab on one etcd: real processes, under members that take names.

Each daemon knows all services, each in an order of its own. What its clients were answered, and what the lab tells of
it, is compared when all is well again (`Trial.check`).
"""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from etcd import free_ports
from helpers import PATIENCE_S
from lab_fleets import LOCK_KINDS, FleetHost, LabFleet
from lab_hosts import RovingReader
from lab_members import Job, MemberProcess, Verdict, judge
from labs import LabProcess, client

TERM_BITS = 20
"""What a token has below its term."""


class EtcdFleet(LabFleet):
    """Services of one lab, and its hosts, by letter, without anything in between. A context manager."""

    def __init__(self, folder: Path, store: str, letters: str = "abc", *, services: int = 3, **env: str) -> None:
        """`store`: the URL of an etcd that runs; `env`: settings of all daemons."""
        self.services: list[LabProcess] = []
        for number, port in enumerate(free_ports(services)):
            home = folder / f"service-{number}"
            home.mkdir()
            service = LabProcess(home, "--store", store)
            service.port = port
            self.services.append(service)
        super().__init__(folder, letters, lab=self.services[0], **env)
        self._others = ExitStack()

    def __enter__(self) -> EtcdFleet:
        with ExitStack() as stack:
            for service in self.services[1:]:
                stack.enter_context(service)
            super().__enter__()
            self._others = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._others.close()

    @property
    def urls(self) -> list[str]:
        return [service.url for service in self.services]

    def add(self, letter: str, **env: str) -> FleetHost:
        """Add a host, whose daemon is not started yet, and goes to the next service first."""
        turn = len(self.hosts) % len(self.services)
        urls = self.urls[turn:] + self.urls[:turn]
        return super().add(letter, MADSCI_REGISTRYD_LAB_URL=json.dumps(urls), **env)

    def mend(self) -> None:
        """Start what does not run, and wait until all is well."""
        for service in self.services:
            if service._process is None:
                service.start()
        super().mend()

    def told_by(self, url: str, cursor: str) -> list[dict[str, Any]]:
        """Read the feed of one service from a cursor to its end."""
        reader = RovingReader([url])
        try:
            reader.cursor = cursor
            while reader.read(0):
                pass
            return reader.events
        finally:
            reader.close()

    def ids_by(self, url: str) -> dict[str, set[str]]:
        """Return by name the ULIDs that one service says of it."""
        found: dict[str, set[str]] = {}
        after: str | None = ""
        with client(url) as http:
            while after is not None:
                page = http.post("/registry/list", json={"after": after, "limit": 1000}).json()
                found |= {entry["name"]: {entry["id"], *entry["other_ids"]} for entry in page["entries"]}
                after = page["after"]
        return found


class Trial:
    """Members at work on all hosts of a fleet, and a reader that goes from service to service. A context manager."""

    def __init__(self, fleet: EtcdFleet, seed: int, *, members: int = 3, names: int = 6) -> None:
        """`members`: on each host; `names`: that all of them take."""
        self.fleet = fleet
        self.chance = random.Random(seed)
        self._names = names
        self._numbers = itertools.count(seed * 1000)
        self._all: list[tuple[str, MemberProcess]] = []
        self._living: list[tuple[str, MemberProcess]] = []
        for host in fleet.hosts.values():
            with host.asking() as asking:  # nobody makes a name anew that he cannot ask the lab for
                for n in range(names):
                    asking.resolve(f"shared-{n}", "node", acquire_lock=False)
        self._reader = RovingReader(fleet.urls)
        self._cursor = self._reader.cursor
        self._over = threading.Event()
        self._reading = threading.Thread(target=self._read, name="feed")
        self._reading.start()
        for letter in fleet.hosts:
            for _ in range(members):
                self._add(letter)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        for member in [member for _, member in self._living]:
            member.kill()
        self._over.set()
        self._reading.join(4 * PATIENCE_S)
        self._reader.close()

    def _add(self, letter: str) -> None:
        number = next(self._numbers)
        record, registry = self.fleet.folder / f"member-{number}", self.fleet[letter].registry
        member = MemberProcess(Job(str(registry), str(record), str(self.fleet.folder), number, self._names))
        self._all.append((letter, member))
        self._living.append(self._all[-1])

    def _read(self) -> None:
        while not self._over.is_set():
            self._reader.read(1.0)

    def replace_one(self) -> None:
        """Kill a member; another one takes its place."""
        letter, member = self._living.pop(self.chance.randrange(len(self._living)))
        member.kill()
        self._add(letter)

    def finish(self) -> Verdict:
        """Let all members finish, and judge what they saw."""
        statuses = [member.finish() for _, member in self._living]
        assert not any(statuses), statuses
        return judge(self.records())

    def records(self) -> dict[str, list[str]]:
        """Return what each member has recorded, by HOST/NUMBER."""
        return {f"{letter}/{member.job.seed}": member.lines() for letter, member in self._all}

    def gaps_s(self, spans: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
        """Return for each span of time how long no member was answered a grant or a new name, and how long none had a
        grant confirmed, at the longest."""
        answered, confirmed = [], []
        for lines in self.records().values():
            for before, line in itertools.pairwise(["", *lines]):
                if line[0] in "GI":
                    answered.append(_at(line))
                if line[0] == "I" or (before[:1], line[0]) == ("G", "C"):
                    confirmed.append(_at(line))
        pairs = [*spans]
        return [_gap_s(answered, *pair) for pair in pairs], [_gap_s(confirmed, *pair) for pair in pairs]

    # what must be so in the end

    def check(self, verdict: Verdict) -> list[dict[str, Any]]:
        """Compare what members and daemons know with what each service tells; return the feed.

        For when all is well again. Sessions must all have lived on.
        """
        fleet = self.fleet
        assert not verdict.faults, "\n".join(verdict.faults[:20])
        fleet.mend()
        self._over.set()
        self._reading.join(4 * PATIENCE_S)
        while self._reader.read(0):
            pass
        told = self._reader.events
        for url in fleet.urls:
            assert fleet.told_by(url, self._cursor) == told, f"the feed of {url} is another one"
            self._check_identities(verdict, fleet.ids_by(url))
        revisions = [event["revision"] for event in told]
        assert revisions == sorted(set(revisions))
        assert not [event for event in told if event["kind"] in ("registered", "expired", "ended")]
        self._check_terms(told)
        self._check_changes(told)
        return told

    def _check_identities(self, verdict: Verdict, listed: dict[str, set[str]]) -> None:
        assert not {name: ids for name, ids in verdict.ids.items() if len(ids) != 1}
        assert not {name: ids for name, ids in listed.items() if len(ids) != 1}
        known = set().union(*listed.values())
        assert not [name for name, ids in verdict.ids.items() if not ids <= known], "a name is lost"
        for name, ids in verdict.ids.items():
            assert listed.get(name, listed.get(f"{name}-renamed")) == ids, name

    def _check_terms(self, told: list[dict[str, Any]]) -> None:
        """Fail where terms do not grow, or a lock was confirmed that was not granted in the lab to that host."""
        terms: dict[str, list[int]] = defaultdict(list)
        granted: set[tuple[str, str, int]] = set()
        for event in told:
            if event["kind"] == "granted":
                terms[event["name"]].append(event["why"]["term"])
                granted.add((event["host"], event["name"], event["why"]["term"]))
        for name, found in terms.items():
            assert found == sorted(set(found)), f"terms of {name}: {found}"
        names = {letter: host.name for letter, host in self.fleet.hosts.items()}
        for who, lines in self.records().items():
            for line in lines:
                kind, name, token, *_ = line.split(" ")
                if kind == "C":
                    assert (names[who.partition("/")[0]], name, int(token) >> TERM_BITS) in granted, line

    def _check_changes(self, told: list[dict[str, Any]]) -> None:
        """Fail where the lab did not hear each change of a name that one host has, once and in order."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for event in told:
            if event["kind"] not in LOCK_KINDS:
                kinds[event["id"]].append(event["kind"])
        for host in self.fleet.hosts.values():
            with host.asking() as asking:
                made = {
                    c.id: [change.kind for change in asking.history(c.name) if change.id == c.id]
                    for c in asking.list("own-*", include_retired=True)
                }
            assert len(made) > 3, f"void: {host.folder.name} made too little"
            for id, expected in made.items():
                assert kinds[id] == expected, id


def _at(line: str) -> float:
    return float(line.rpartition(" ")[2])


def _gap_s(instants: list[float], begin: float, end: float) -> float:
    times = [begin, *sorted(at for at in instants if begin < at < end), end]
    return max(later - earlier for earlier, later in itertools.pairwise(times))
