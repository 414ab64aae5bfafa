"""What Prometheus is told of a lab; each metric has its row in docs/lab.md. The lab's only prometheus_client.

No label holds a name, a host or anything else that clients choose.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from madsci_registry_lab.feed import Feed
from madsci_registry_lab.gate import Gate
from madsci_registry_lab.store import LabStore

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "madsci_registry_lab_"


class Metrics(Collector):
    """The metrics of one lab registry."""

    def __init__(self, store: LabStore, feed: Feed, gate: Gate, version: str) -> None:
        self._store, self._feed, self._gate, self._version = store, feed, gate, version
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """Name nothing beforehand: nobody else registers here."""
        return []

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format. Raises: what the store raises."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Make all metrics, as they are now."""
        about = self._store.about()
        build = GaugeMetricFamily(f"{_PREFIX}build_info", "1; what runs.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        for name, text, value in (
            ("epoch", "The epoch: it grows with each start.", about.epoch),
            ("revision", "The revision of the last change.", int(about.cursor.rpartition(".")[2])),
            ("names", "Names that have a component.", about.names),
            ("locks", "Names that are held.", about.locks),
            ("hosts", "Hosts that are heard.", about.sessions),
            ("conflicts", "Conflicts that nobody has decided.", about.conflicts),
            ("feed_waiting", "Requests that wait for changes.", self._feed.waiting),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
        labels = ["method", "route", "status"]
        answers = CounterMetricFamily(f"{_PREFIX}answers", "Answers, by method, route and HTTP status.", labels=labels)
        for key, count in sorted(self._gate.answers.copy().items()):
            answers.add_metric(key, count)
        yield answers
