"""Hosts of a lab that several services serve: each goes on at the next one when one does not answer, and remembers what
it was answered. For tests that kill members and services under load."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from ulid import ULID

from helpers import PATIENCE_S
from labs import client

Ask = Callable[[str, dict[str, Any]], Any]


class Answers:
    """What all hosts of a test were answered. Thread-safe."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.ids: dict[str, set[str]] = defaultdict(set)
        """By name: the ULIDs that were answered for it."""
        self.new: dict[str, int] = defaultdict(int)
        """By name: how often it was said to be new."""
        self.terms: dict[str, list[int]] = defaultdict(list)
        """By name: the terms of its grants."""
        self.acked_at: list[float] = []
        """When each change was answered."""
        self.faults: list[str] = []
        """What must not happen."""

    def gap_s(self, begin: float, end: float) -> float:
        """Return the longest time between two answers."""
        times = [begin, *sorted(at for at in self.acked_at if begin < at < end), end]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


class RovingHost:
    """A host with a session. `ask` repeats a request, as it is, at one service after the other until one answers."""

    def __init__(
        self, urls: Sequence[str], name: str, answers: Answers, session: str = "", patience_s: float = 10.0
    ) -> None:
        """`session`: one that it has already. `patience_s`: how long it waits for one service."""
        self.name, self.answers, self._patience_s = name, answers, patience_s
        self._https = [client(url) for url in urls]
        self._turn = 0
        self._ops = 0
        self.session = session or self.ask("hosts/register", boot="boot", label="a test")["session"]

    def close(self) -> None:
        for http in self._https:
            http.close()

    def ask(self, route: str, **body: Any) -> Any:
        """Send a request until a service answers it; return the answer, or the error that it is."""
        deadline = time.monotonic() + PATIENCE_S * 4
        while time.monotonic() < deadline:
            http = self._https[self._turn % len(self._https)]
            try:
                answer = http.post(f"/registry/{route}", json={"host": self.name, **body}, timeout=self._patience_s)
            except httpx.HTTPError:
                self._turn += 1
                time.sleep(0.02)
                continue
            if answer.status_code < 500:
                return answer.json()
            self._turn += 1
        raise AssertionError(f"{self.name}: nobody answered {route}")

    def keep(self) -> None:
        """Send a keepalive: its session must be there."""
        answer = self.ask("hosts/keepalive", session=self.session, boot="boot", holds={})
        if "lease_s" not in answer:
            self.fault(f"lost its session: {answer}")

    def create(self, name: str) -> None:
        """Get or create a component."""
        self._ops += 1
        answer = self.ask("resolve", op=str(self._ops), name=name, id=str(ULID()), component_type="node")
        with self.answers.guard:
            self.answers.ids[name].add(answer["entry"]["id"])
            self.answers.new[name] += answer["is_new"]
            self.answers.acked_at.append(time.monotonic())

    def lock_and_release(self, name: str) -> None:
        """Lock a name and give it back, if nobody has it."""
        (lock,) = self.ask("lock", session=self.session, locks=[{"name": name}])["locks"]
        if "error" in lock:
            if lock["error"]["code"] != "held":
                self.fault(f"{name}: {lock['error']}")
            return
        with self.answers.guard:
            self.answers.terms[name].append(lock["term"])
            self.answers.acked_at.append(time.monotonic())
        self.ask("release", session=self.session, locks={name: lock["term"]})

    def fault(self, text: str) -> None:
        with self.answers.guard:
            self.answers.faults.append(f"{self.name}: {text}")


class RovingReader:
    """Reads the feed from one service after the other; `events` are what it was told, in order."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._https = [client(url) for url in urls]
        self._turns = itertools.count()
        self.events: list[dict[str, Any]] = []
        self.cursor = str(self._page({})["cursor"])

    def close(self) -> None:
        for http in self._https:
            http.close()

    def read(self, wait_s: float) -> int:
        """Read a page at the next service that answers; return how much was told."""
        page = self._page({"cursor": self.cursor, "limit": 100, "wait_s": wait_s})
        self.events += page["events"]
        self.cursor = page["cursor"]
        return len(page["events"])

    def _page(self, asked: dict[str, Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S * 4
        while time.monotonic() < deadline:
            http = self._https[next(self._turns) % len(self._https)]
            try:
                answer = http.get("/registry/changes", params=asked, timeout=10.0)
            except httpx.HTTPError:
                continue
            assert answer.status_code in (200, 500, 503), answer.text
            if answer.status_code == 200:
                return answer.json()
        raise AssertionError("nobody told the feed")
