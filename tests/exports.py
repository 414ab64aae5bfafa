"""registry.json under load: readers without a lock while the daemon is killed, and how long lookups take meanwhile.

`make test` runs these small, `make chaos` large.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ulid

from helpers import PATIENCE_S, DaemonProcess, Worker, until
from madsci_registry import RegistryClient, RegistryError
from old_program import OldProgram

MANY = 10_000


def leftovers(registry: Path) -> set[str]:
    """List what a write that was killed has left."""
    return {path.name for path in registry.parent.glob(f"{registry.name}.*.tmp")}


@dataclass
class Reading:
    """What readers without a lock and the kills of a run saw."""

    reads: int = 0
    versions: int = 0
    """Different files that were read."""
    broken: list[str] = field(default_factory=list)
    made: int = 0
    """Names that were made meanwhile."""
    left: int = 0
    """Kills that left a temporary file."""
    unswept: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    """Names that were answered and that the file had not at the end."""


class _Reader(threading.Thread):
    def __init__(self, registry: Path, ended: threading.Event, out: Reading) -> None:
        super().__init__(name="reader", daemon=True)
        self._registry, self._ended, self._out = registry, ended, out

    def run(self) -> None:
        seen, last = 0, b""
        while not self._ended.is_set():
            content = b""
            try:
                content = self._registry.read_bytes()
                self._out.reads += 1
                if content == last:
                    time.sleep(0.0005)
                    continue
                entries = json.loads(content)["entries"]
                assert len(entries) >= seen, f"{len(entries)} entries after {seen}"
                seen, last = len(entries), content
                self._out.versions += 1
            except (OSError, ValueError, KeyError, AssertionError) as error:
                self._out.broken.append(f"{error!r}: {len(content)} bytes, {content[-40:]!r}")


class _Maker(threading.Thread):
    """Makes one name after the other."""

    def __init__(self, registry: Path, prefix: str, ended: threading.Event) -> None:
        super().__init__(name="maker", daemon=True)
        self._registry, self._prefix, self._ended = registry, prefix, ended
        self.made: list[str] = []

    def run(self) -> None:
        with RegistryClient(self._registry, timeout=PATIENCE_S, autostart=False) as client:
            for number in itertools.count():
                if self._ended.is_set():
                    return
                name = f"{self._prefix}-{number}"
                with suppress(RegistryError):
                    client.resolve(name, "node", {"n": number}, acquire_lock=number % 2 == 0)
                    self.made.append(name)
                    client.release(name)


def read_while_killed(daemon: DaemonProcess, kills: int, seed: int) -> Reading:
    """Kill a daemon that writes new names again and again, start it anew; read the file all the time without a lock."""
    chance, out, ended = random.Random(seed), Reading(), threading.Event()
    with RegistryClient(daemon.registry, autostart=False) as client:
        client.resolve("first", "node", acquire_lock=False)  # from now on there is a file
    readers = [_Reader(daemon.registry, ended, out) for _ in range(2)]
    makers = [_Maker(daemon.registry, f"made-{i}", ended) for i in range(2)]
    try:
        for thread in (*readers, *makers):
            thread.start()
        until(lambda: all(maker.made for maker in makers), "for names to be made")
        for _ in range(kills):
            _await_more(makers)
            time.sleep(chance.random() * 0.05)
            daemon.kill()
            left = leftovers(daemon.registry)
            out.left += bool(left)
            daemon.start()
            out.unswept |= left & leftovers(daemon.registry)
    finally:
        ended.set()
        for thread in (*readers, *makers):
            thread.join(PATIENCE_S)
    made = {name for maker in makers for name in maker.made}
    out.made = len(made)
    out.missing = made - json.loads(daemon.registry.read_bytes())["entries"].keys()
    return out


def _await_more(makers: list[_Maker]) -> None:
    before = sum(len(maker.made) for maker in makers)
    until(lambda: sum(len(maker.made) for maker in makers) > before, "for more names")


def write_many(registry: Path, count: int = MANY) -> None:
    """Write a registry.json with so many entries, as an old program would."""
    now = "2026-01-02T03:04:05.678901Z"
    entry = {"component_type": "node", "created_at": now, "last_seen": now, "lock": None, "workcell_id": None}
    entries = {
        f"name-{n}": {"id": str(ulid.ULID()), **entry, "metadata": {"rack": n, "note": "x" * 40}} for n in range(count)
    }
    OldProgram(registry).write({"version": 1, "created_at": now, "entries": entries})


@dataclass
class Latencies:
    """How long lookups took, in seconds, in peace and while the large file was written and rewritten."""

    quiet: list[float]
    exports: list[float]
    rewrites: list[float]
    exported: int
    rewritten: int


def lookups_beside_a_large_file(daemon: DaemonProcess, seconds: float) -> Latencies:
    """Measure lookups of a client in another process on a registry of MANY names: in peace, while changes have the file
    written all the time, and while an old program rewrites all of it."""
    with Worker(daemon.registry) as asker, Worker(daemon.registry) as changer:
        asker.ask("lookup", "name-1")
        changer.ask("lookup", "name-1")
        quiet = asker.ask("time_lookups", "name-1", seconds)
        with _counting(daemon.registry) as exports:
            changer.tell("change_metadata", "name-2", seconds)
            during_exports = asker.ask("time_lookups", "name-1", seconds)
            changer.answer()
        rewritten, old = 0, OldProgram(daemon.registry)
        asker.tell("time_lookups", "name-1", seconds)
        while not asker.answered():
            old.edit(partial(_set_n, n=rewritten))
            rewritten += 1
            asker.answered(0.3)  # the daemon reads it in between
        during_rewrites = asker.answer()
        until(
            lambda: changer.ask("get", "name-3")["metadata"].get("n") == rewritten - 1, "for the last change to come in"
        )
    return Latencies(quiet, during_exports, during_rewrites, exports(), rewritten)


def _set_n(entries: dict[str, Any], n: int) -> None:
    entries["name-3"]["metadata"]["n"] = n


@contextmanager
def _counting(registry: Path) -> Iterator[Callable[[], int]]:
    """Count how often the file is replaced meanwhile."""
    seen: set[tuple[int, int]] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            found = registry.stat()
            seen.add((found.st_ino, found.st_mtime_ns))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield lambda: len(seen) - 1
    ended.set()
    thread.join(PATIENCE_S)


def share(seconds: list[float], part: float) -> float:
    """Return the quantile of times."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
