"""What Prometheus is told: the daemon's counts and its state as metrics, each one documented in docs/operations.md.

The only module that imports prometheus_client (40 ms, so only where somebody asks). No label holds a name, a uid or
anything else that clients choose: there are as many time series as the tables of this program have rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from platform import python_version
from typing import Any

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from madsci_registryd.core import Core
from madsci_registryd.meters import Histogram

_PREFIX = "madsci_registryd_"
_LAB_STATES = ("off", "connecting", "up", "away", "refused")
_EXPORT_STATES = ("on", "off", "failing", "stopped")
_PROOFS = ("pidfd", "pid", "connection")
_PRESENCES = ("attached", "dropped", "detached")

Families = Iterator[Metric]


class Metrics(Collector):
    """Makes the metrics of one daemon. Belongs to the loop's thread: it asks the database."""

    def __init__(self, core: Core, status: Callable[[], dict[str, Any]], database: Path, started_at: float) -> None:
        self._core = core
        self._status = status
        self._database = database
        self._started_at = started_at
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """Name nothing beforehand: nobody else registers here."""
        return []

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Families:
        """Make all metrics, as they are now."""
        status = self._status()
        yield from _about(status, self._started_at)
        yield from _names(status)
        yield from self._sessions()
        yield from self._work()
        yield from self._commits()
        yield from self._file(status)
        yield from _lab(status["lab"])
        yield from self._disk()

    def _sessions(self) -> Families:
        counts = {(proof, presence): 0 for proof in _PROOFS for presence in _PRESENCES}
        for session in list(self._core.registrar.sessions.values()):
            key = session.process.proof, session.presence.value
            counts[key] = counts.get(key, 0) + 1
        text = "Client processes, by how surely they are known to live and how they stand to the daemon."
        yield _gauges("sessions", text, ("proof", "presence"), counts)

    def _work(self) -> Families:
        meters = self._core.meters
        text = "Answers to requests, by verb and ok or the error."
        yield _counters("requests", text, ("verb", "code"), meters.requests)
        text = "Connections that were refused, by error."
        yield _counters("connections_refused", text, ("code",), meters.lines_refused)
        quotas = self._core.quotas
        refused = {what: quotas.refused[what] for what in quotas.limits._fields}
        yield _counters("quota_refusals", "What quotas refused, by quota.", ("what",), refused)
        yield _counter("grants", "Locks that were given.", meters.grants)
        yield _counter("hand_overs", "Locks that were given to a client that had waited.", meters.hand_overs)
        yield _counters("locks_ended", "Locks that ended, by how.", ("how",), meters.locks_ended)
        text = "How long the loop worked in a turn, without its waiting."
        yield _histogram("loop_turn_seconds", text, (), {(): meters.turns})

    def _commits(self) -> Families:
        meters = self._core.meters
        text = "How long a commit took, by whether it was synced to the disk."
        by_sync: dict[tuple[str, ...], Histogram] = {
            ("yes" if synced else "no",): histogram for synced, histogram in meters.commits.items()
        }
        yield _histogram("commit_seconds", text, ("synced",), by_sync)
        yield _histogram("batch_writes", "How many changes shared a commit.", (), {(): meters.batches})
        yield _counter("disk_full", "Batches that were refused because the disk was full.", meters.disk_full)

    def _file(self, status: dict[str, Any]) -> Families:
        export, meters = status["export"], self._core.meters
        states = {(state,): int(export["state"] == state) for state in _EXPORT_STATES}
        yield _gauges("export_state", "How it stands with registry.json: 1 for the present state.", ("state",), states)
        yield _counter("export_passes", "Passes over registry.json.", meters.passes)
        yield _counter("export_writes", "Passes that wrote registry.json.", meters.files_written)
        yield _counter("export_put_aside", "Files that were not whole and were put aside.", meters.files_put_aside)
        yield _gauge("export_claims", "Names that old programs see as held by new ones.", export.get("claims", 0))
        yield _counter("old_changes_refused", "Changes of old programs that were refused.", export.get("refused", 0))
        text = "Old programs that wrote registry.json, at most the last 20."
        yield _gauge("old_programs", text, len(export.get("old_programs", ())))

    def _disk(self) -> Families:
        """By stat alone: the live files must not be opened."""
        yield _gauge("database_bytes", "Size of the database.", _size(self._database))
        wal = self._database.with_name(f"{self._database.name}-wal")
        yield _gauge("wal_bytes", "Size of the database's write-ahead log.", _size(wal))
        with suppress(OSError):
            disk = os.statvfs(self._database.parent)
            yield _gauge("disk_free_bytes", "Free space on the database's disk.", disk.f_bavail * disk.f_frsize)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _about(status: dict[str, Any], started_at: float) -> Families:
    build = {
        "version": status["version"],
        "protocol": str(status["protocol_version"]),
        "sqlite": status["sqlite_version"],
        "python": python_version(),
    }
    yield _gauges("build_info", "1; what runs.", tuple(build), {tuple(build.values()): 1})
    yield _gauge("start_time_seconds", "When the daemon started, in seconds since 1970.", started_at)
    yield _gauge("epoch", "The epoch: it grows with each start.", status["epoch"])
    yield _gauge("revision", "The revision of the last event.", status["revision"])
    yield _gauge("degraded", "How many things `status` names as degraded.", len(status["degraded"]))


def _lab(lab: dict[str, Any]) -> Families:
    states = {(state,): int(lab["state"] == state) for state in _LAB_STATES}
    yield _gauges("lab_state", "How the lab is reached: 1 for the present state.", ("state",), states)
    yield _gauge("lab_behind", "Changes that the lab has not yet, at most 10,000.", lab.get("behind", 0))
    locks = {(standing,): lab.get(standing, 0) for standing in ("confirmed", "unconfirmed")}
    yield _gauges("lab_locks", "Held names, by how they stand in the lab.", ("standing",), locks)
    yield _gauge("lab_contested", "Names that another host of the lab holds too.", len(lab.get("contested", ())))
    yield _gauge("lab_conflicts", "Names for which the lab prefers another ULID.", lab.get("conflicts", 0))


def _names(status: dict[str, Any]) -> Families:
    held = status["held"]
    states = {("held",): held, ("free",): status["names"] - held, ("retired",): status["retired"]}
    yield _gauges("names", "Names, by state.", ("state",), states)
    yield _gauge("waiting", "Requests that wait for a held name.", status["waiting"])


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, text, value=value)


def _gauges(name: str, text: str, labels: tuple[str, ...], values: dict[Any, int]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counters(name: str, text: str, labels: tuple[str, ...], values: dict[Any, int]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric((key,) if isinstance(key, str) else key, value)
    return family


def _histogram(name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], Histogram]) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, text, labels=labels)
    for key, histogram in values.items():
        family.add_metric(key, histogram.cumulated(), histogram.sum)
    return family
