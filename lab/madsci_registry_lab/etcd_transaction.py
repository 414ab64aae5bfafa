"""A transaction on etcd: reads of one revision, writes kept back, and a commit that compares all that was read.

Theory of operation
- `run` calls an operation with a Transaction. Its first read says the revision; all other reads are of that revision.
  So an operation sees one state of the lab, and what it raises is true of that state.
- The commit is one etcd transaction: if every key that the operation looked at (`fetch` alone is no look) is as it was,
  all writes happen, in one revision, with the events of the change. Else nothing does, and the operation is run again
  on what is there now. So operations take effect as if one after the other, whichever replica they come from.
- A try whose answer was lost is repeated by the gateway as it is. Every transaction names its events by an `op` of its
  own: a repeat whose compares fail, but whose first event is there, was done by the earlier try. What writes no event
  (a mark that moves, a conflict told once more) comes to the same when it is done again.
- A session is compared by its creation, as keepalives change its revision and nothing else. `pin` compares that too.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ulid import ULID

from madsci_registry.errors import UnavailableError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.clock import Clock, SystemClock, iso
from madsci_registry_lab.etcd_gateway import EtcdGateway, RevisionCompactedError
from madsci_registry_lab.etcd_wire import Compare, Delete, Kv, Put, Range, Txn, after
from madsci_registry_lab.store import LASTING, Event

COMPARES_MAX = 90
"""Of one transaction of several changes: etcd takes 128, and one more change reads at most thirty keys."""
BYTES_MAX = 512 * 1024
"""Likewise: etcd takes 1.5 MiB."""
READS_MAX = 100
"""Keys that are read in one request."""
AGAIN_S = 0.02
"""At most so long does an operation wait, at random, before it is run again."""

_Result = TypeVar("_Result")


class Transaction:
    """One run of an operation. Not thread-safe."""

    def __init__(self, gateway: EtcdGateway, now: str) -> None:
        self._gateway = gateway
        self._prefix = gateway.access.prefix
        self.now = now
        self.op = str(ULID())
        self.revision = 0
        """Of all that is read; 0: nothing has been."""
        self._read: dict[str, Kv | None] = {}
        self._used: set[str] = set()
        """Of what was read, what the operation has looked at."""
        self._pinned: set[str] = set()
        self._trusted: set[str] = set()
        self._under: dict[str, dict[str, str]] = {}
        self._writes: dict[str, str | None] = {}
        self._events: dict[str, Event] = {}

    def fetch(self, *keys: str) -> None:
        """Read keys that may be needed, in one request; what was read before is not read again."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._read]
        for n in range(0, len(missing), READS_MAX):
            part = missing[n : n + READS_MAX]
            asked = tuple(Range(self._prefix + key, revision=self.revision) for key in part)
            done = self._gateway.txn(Txn(then=asked))
            self.revision = self.revision or done.revision
            for key, found in zip(part, done.found, strict=True):
                self._read[key] = found.kvs[0] if found.kvs else None

    def get(self, key: str) -> str | None:
        """Return the value of a key as this transaction leaves it; None: it is not there."""
        if key in self._writes:
            return self._writes[key]
        self.fetch(key)
        self._used.add(key)
        return self.peek(key)

    def peek(self, key: str) -> str | None:
        """Return what a key that was fetched had then, for what does not matter to the outcome."""
        found = self._read[key]
        return found.value if found else None

    def pin(self, key: str) -> int:
        """Read a key and return its mod_revision (0: not there), which the commit compares whatever the key is."""
        self.fetch(key)
        self._used.add(key)
        self._pinned.add(key)
        found = self._read[key]
        return found.changed if found else 0

    def trust(self, *keys: str) -> None:
        """Read keys that never change without another key that is read here: the commit does not compare them."""
        self._trusted.update(key for key in keys if key not in self._used)
        self.fetch(*keys)

    def under(self, prefix: str) -> dict[str, str]:
        """Return what stands under all keys that begin so, by what follows in them, as this transaction leaves it. The
        commit compares that none of them has changed or come; that none is gone, another key has to say."""
        if prefix not in self._under:
            start = self._prefix + prefix
            found = self._gateway.range(Range(start, after(start), revision=self.revision))
            self.revision = self.revision or found.revision
            self._under[prefix] = {kv.key.removeprefix(start): kv.value for kv in found.kvs}
        written = {key.removeprefix(prefix): v for key, v in self._writes.items() if key.startswith(prefix)}
        now = {**self._under[prefix], **written}
        return {key: value for key, value in sorted(now.items()) if value is not None}

    def put(self, key: str, value: str) -> None:
        self._writes[key] = value

    def delete(self, key: str) -> None:
        self._writes[key] = None

    def tell(self, kind: str, name: str | None, id: str | None, host: str | None, **why: object) -> None:
        """Write an event."""
        key = rows.event_key(id, self.op, len(self._events))
        self._events[key] = Event(0, self.now, kind, name, id, host, why)

    @property
    def is_full(self) -> bool:
        """No further change may be added to this transaction."""
        size = sum(len(value.encode()) for value in self._writes.values() if value)
        compares = len(self._used - self._trusted) + len(self._under)
        return compares > COMPARES_MAX or len(self._events) > COMPARES_MAX or size > BYTES_MAX

    @property
    def told(self) -> bool:
        """It has events."""
        return bool(self._events)

    def commit(self) -> int:
        """Write what is to be written, if all that was read is still so; return the revision, 0: it is not so.

        Raises:
            UnavailableError: the outcome is unknown.
            NoSpaceError: nothing changed.
        """
        if not self._writes and not self._events:
            return self.revision or 1
        marker = next(iter(self._events), None)
        done = self._gateway.txn(
            Txn(
                compares=tuple(self._compares()),
                then=tuple(self._operations()),
                otherwise=(Range(self._prefix + marker, keys_only=True),) if marker else (),
            )
        )
        if done.succeeded:
            return done.revision
        earlier = done.found[0].kvs if done.found else ()
        return earlier[0].created if earlier else 0

    def _compares(self) -> list[Compare]:
        single = [self._compare(key, found) for key, found in self._read.items() if key in self._used - self._trusted]
        starts = [self._prefix + prefix for prefix in self._under]
        return single + [Compare(start, "MOD", self.revision + 1, "LESS", after(start)) for start in starts]

    def _compare(self, key: str, found: Kv | None) -> Compare:
        if key.startswith("s/") and key not in self._pinned:
            return Compare(self._prefix + key, "CREATE", found.created if found else 0)
        return Compare(self._prefix + key, "MOD", found.changed if found else 0)

    def _operations(self) -> list[Put | Delete]:
        passing = [key for key, event in self._events.items() if event.kind not in LASTING]
        writes = {**self._writes, **{key: rows.event_text(event) for key, event in self._events.items()}}
        if passing:
            writes[f"x/{self.op}"] = rows.dumps(passing)
        if self._events:
            writes[rows.LAST] = self.op
        return [
            Put(self._prefix + key, value) if value is not None else Delete(self._prefix + key)
            for key, value in writes.items()
        ]


class Runner:
    """Runs operations as transactions. Thread-safe."""

    def __init__(self, gateway: EtcdGateway, clock: Clock, total_s: float) -> None:
        self._gateway, self._clock, self._total_s = gateway, clock, total_s
        self._real = SystemClock()
        self.revision = 0
        """Of the last change that was told by an event and made here."""
        self._guard = threading.Lock()

    def read(self, operation: Callable[[Transaction], _Result]) -> _Result:
        """Run an operation whose writes, if it has any, are not wanted. Raises UnavailableError."""
        while True:
            try:
                return operation(Transaction(self._gateway, iso(self._clock.wall())))
            except RevisionCompactedError:
                continue

    def run(self, operation: Callable[[Transaction], _Result]) -> _Result:
        """Run an operation until its transaction is committed; what it raises changes nothing.

        Raises:
            UnavailableError: etcd does not answer, or others change the same all the time.
        """
        return self.run_at(operation)[0]

    def run_at(self, operation: Callable[[Transaction], _Result]) -> tuple[_Result, int]:
        """Do as `run`, and return the revision as well."""
        until = self._real.monotonic() + self._total_s
        while True:
            tx = Transaction(self._gateway, iso(self._clock.wall()))
            try:
                result = operation(tx)
                revision = tx.commit()
            except RevisionCompactedError:
                revision = 0
            if revision:
                if tx.told:
                    with self._guard:
                        self.revision = max(self.revision, revision)
                return result, revision
            if self._real.monotonic() > until:
                raise UnavailableError("others change the same all the time: try again")
            time.sleep(AGAIN_S * random.random())
