"""What the loop counts while it works: plain integers, so that a request pays for it a fraction of a microsecond.

Pure. `metrics` makes Prometheus metrics of it when somebody asks. All of it begins at 0 with the daemon. Only the
loop's thread counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from madsci_registry.errors import RegistryError
from madsci_registry.protocol import REQUESTS
from madsci_registryd.export import Result
from madsci_registryd.transaction import Tx

COMMIT_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""From a commit that is not synced to a disk that hangs."""
TURN_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""From one lookup to far above what a hand-over may take."""
BATCH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Around the server's FRAMES_A_TURN."""
UNREAD = "none"
"""The verb of a frame that could not be read."""
OTHER = "other"
# Those that are there from the beginning, at 0: Prometheus does not see the first count of a series that is new.
REFUSED_CODES = ("permission_denied", "quota", "session_required", "invalid", "protocol_version")
ENDS = ("released", "broken", "process_died", "said_bye", "not_resumed", OTHER)
_ENDS = {
    "its process died": "process_died",
    "it said bye": "said_bye",
    "its connection ended and it did not resume": "not_resumed",
}


class Histogram:
    """How many values were at most so large."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulated(self) -> list[tuple[str, float]]:
        """Return upper bounds, as Prometheus writes them, and how many values were not above each."""
        total, out = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            out.append((bound, float(total)))
        return out


class Meters:
    """The counts of one daemon."""

    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, str], int] = defaultdict(int, {(verb, "ok"): 0 for verb in REQUESTS})
        """By verb and outcome: ok, or the code of the error."""
        self.lines_refused: defaultdict[str, int] = defaultdict(int, dict.fromkeys(REFUSED_CODES, 0))
        """Lifelines that were refused, by code."""
        self.locks_ended: defaultdict[str, int] = defaultdict(int, dict.fromkeys(ENDS, 0))
        self.grants = 0
        self.hand_overs = 0
        self.commits = {True: Histogram(COMMIT_BUCKETS_S), False: Histogram(COMMIT_BUCKETS_S)}
        """Seconds of COMMIT, by whether it is synced."""
        self.batches = Histogram(BATCH_BUCKETS)
        self.disk_full = 0
        self.turns = Histogram(TURN_BUCKETS_S)
        self.passes = 0
        self.files_written = 0
        self.files_put_aside = 0

    def counted(self, verb: str, answer: Callable[[dict[str, Any]], None], reply: dict[str, Any]) -> None:
        """Count the answer to a request, and give it."""
        self.requests[verb, "ok" if "ok" in reply else reply["error"]["code"]] += 1
        answer(reply)

    def passed(self, result: Result) -> None:
        """A pass over registry.json was made."""
        self.passes += 1
        self.files_written += result.written
        self.files_put_aside += result.aside is not None

    def committed(self, tx: Tx, writes: int, seconds: float, *, synced: bool) -> None:
        """A batch of so many writes was committed."""
        self.commits[synced].add(seconds)
        self.batches.add(writes)
        self.grants += len(tx.granted)
        self.hand_overs += sum(not isinstance(result, RegistryError) for _, result in tx.settled)
        for kind, why in tx.lock_ends:
            self.locks_ended[_ENDS.get(why, OTHER) if kind == "ended" else kind] += 1
