"""The feed of a lab on etcd: what one replica has watched, kept in memory, and where a cursor leads.

A cursor is `epoch.revision`, the same on every replica: each start of one is an epoch, a key in etcd, and the epoch of
a revision is the last one that had begun. So a cursor is good if etcd knows its epoch, and that epoch has come as far:
after a restore of an older backup, either is not so. Revisions are etcd's, times 128, plus the event's place in its
transaction.

One thread watches epochs and events. Whole revisions come at once; after a break it goes on behind the last one, at
another member. A revision is passed by its own events alone: what an answer says of the store is ahead of the events
that it still has to bring. What is older than what is kept here, or was compacted by etcd while nobody watched, is
`compacted` to whoever asks for it.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable

from madsci_registry.errors import CompactedError, InvalidError, UnavailableError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.etcd_gateway import EtcdGateway, EtcdRefusedError
from madsci_registry_lab.etcd_wire import Kv, News, Range, Watch, after
from madsci_registry_lab.store import Event, Page

log = logging.getLogger(__name__)

KEPT_EVENTS = 50_000
"""In memory, about 25 MB. A host that was away for longer lists, as after a restore."""
LOOK_BACK = 50_000
"""Revisions that a start watches again: what hosts may have missed meanwhile."""
BEHIND_S = 5.0
"""How long a reader waits until this replica has seen what another one has answered."""
PAUSE_S = 0.1
"""Before a watch that has ended is begun anew."""


class EtcdFeed:
    """The events of a lab since this replica began to watch, and some before. Thread-safe."""

    def __init__(self, gateway: EtcdGateway, on_change: Callable[[], None]) -> None:
        """`start` begins to watch."""
        self._gateway = gateway
        self._prefix = gateway.access.prefix
        self._on_change = on_change
        self._news = threading.Condition()
        self._events: list[tuple[int, str, str]] = []
        """Revision, key and text of each, in order; the text is read when somebody wants it."""
        self._epochs: dict[int, int] = {}
        """Where each epoch begins, in etcd's revisions."""
        self.head = 0
        """The last revision of etcd of which the events are here."""
        self._next = 1
        """The revision from which the watch goes on."""
        self._oldest = 1
        """The first revision of etcd of which all events are here."""
        self._over = False
        self._thread = threading.Thread(target=self._follow, name="lab-feed", daemon=True)

    def start(self) -> None:
        """Read what epochs there are, and begin to watch. Raises UnavailableError."""
        found = self._gateway.range(Range(f"{self._prefix}e/", after(f"{self._prefix}e/")))
        self._epochs = {_epoch_of(kv.key): kv.created for kv in found.kvs}
        self._next = self._oldest = max(1, found.revision - LOOK_BACK)
        self._thread.start()

    def end(self) -> None:
        """Let go of who waits, and of the watch as soon as the gateway is closed."""
        with self._news:
            self._over = True
            self._news.notify_all()

    def join(self) -> None:
        """Wait until it has ended."""
        if self._thread.is_alive():
            self._thread.join()

    @property
    def epoch(self) -> int:
        """The last epoch that has begun."""
        return max(self._epochs, default=0)

    def changes(self, cursor: str | None, limit: int, own: int) -> Page:
        """See LabStore; `own` is the revision of etcd up to which this replica has made changes itself."""
        if cursor is None:
            return Page((), self.now())
        epoch, revision = _parsed(cursor)
        self._wait_for(own)
        if epoch not in self._epochs or revision // rows.EVENTS_MAX > self.head:
            self._catch_up(epoch, revision // rows.EVENTS_MAX)
        with self._news:
            self._check(epoch, revision)
            first = bisect.bisect_right(self._events, revision, key=lambda event: event[0])
            found = self._events[first : first + limit]
            last = found[-1][0] if found else max(revision, self._end(self.head))
            return Page(tuple(_event(*event) for event in found), self._cursor(last))

    def now(self) -> str:
        """Return the cursor behind all changes that anybody has been answered."""
        last = self._last()
        self._wait_for(last)
        with self._news:
            return self._cursor(self._end(last))

    def _last(self) -> int:
        """Return the revision of etcd of the last change, on whatever replica."""
        found = self._gateway.range(Range(self._prefix + rows.LAST)).kvs
        return found[0].changed if found else 0

    def _catch_up(self, epoch: int, revision: int) -> None:
        """Wait for what another replica knows and this one has not heard of yet, if there is such."""
        last = self._last()
        self._wait_for(last)
        if revision > last or epoch not in self._epochs:
            raise self._compacted()

    def _wait_for(self, revision: int) -> None:
        with self._news:
            if not self._news.wait_for(lambda: self.head >= revision or self._over, BEHIND_S):
                raise UnavailableError(f"the feed is behind: it has revision {self.head} of {revision}")

    def _check(self, epoch: int, revision: int) -> None:
        end = min((first for e, first in self._epochs.items() if e > epoch), default=self.head + 1)
        is_known = epoch in self._epochs and revision // rows.EVENTS_MAX < end
        if not is_known or revision < self._oldest * rows.EVENTS_MAX - 1:
            raise self._compacted()

    def _compacted(self) -> CompactedError:
        message = "what came after that cursor is not known (any more): list the entries"
        return CompactedError(message, oldest=self._oldest * rows.EVENTS_MAX)

    def _end(self, revision: int) -> int:
        """Return the place behind all events of a revision of etcd."""
        return revision * rows.EVENTS_MAX + rows.EVENTS_MAX - 1

    def _cursor(self, revision: int) -> str:
        reached = [e for e, first in self._epochs.items() if first <= revision // rows.EVENTS_MAX]
        return f"{max(reached, default=0)}.{revision}"

    def _follow(self) -> None:
        trouble = ""
        while not self._over:
            try:
                self._pass_quiet()
                request = Watch(f"{self._prefix}e/", after(f"{self._prefix}h/"), self._next)
                with self._gateway.watch(request) as news:
                    for answer in news:
                        self._take(answer)
                        if answer.compacted:
                            break
                        if answer.canceled:
                            raise UnavailableError(f"etcd ended a watch: {answer.canceled}")
                        trouble = ""
            except (UnavailableError, EtcdRefusedError) as error:
                if "timed out" not in error.message and error.message != trouble and not self._over:
                    trouble = error.message
                    log.warning("the feed begins to watch anew: %s", error.message)
            with self._news:
                self._news.wait_for(lambda: self._over, PAUSE_S)

    def _pass_quiet(self) -> None:
        """Go on behind what had no event. Else, where a lab was quiet for longer than etcd keeps revisions, the watch
        would begin with one that is compacted, as if something had been missed."""
        found = self._gateway.range(Range(self._prefix + rows.LAST))
        last = found.kvs[0].changed if found.kvs else 0
        if last < self._next <= found.revision + 1:
            with self._news:
                self._next = found.revision + 1
                self._oldest = min(self._oldest, last + 1)
                self.head = max(self.head, last)
                self._news.notify_all()

    def _take(self, answer: News) -> None:
        with self._news:
            if answer.compacted:
                log.warning("etcd has compacted what came between revisions %s and %s", self._next, answer.compacted)
                self._events.clear()
                self._next = self._oldest = answer.compacted
                return
            fresh = [kv for kv in answer.kvs if kv.changed >= self._next]
            self._keep(fresh)
            if fresh:
                self.head = max(kv.changed for kv in fresh)
                self._next = self.head + 1
            elif not answer.created and not answer.canceled and answer.revision >= self._next:
                self._next = answer.revision + 1  # all before it has come
            self._trim()
            self._news.notify_all()
        if fresh:
            self._on_change()

    def _keep(self, fresh: list[Kv]) -> None:
        told: list[tuple[int, str, str]] = []
        for kv in fresh:
            if kv.key.startswith(f"{self._prefix}e/"):
                self._epochs[_epoch_of(kv.key)] = kv.created
            else:
                told.append((rows.event_revision(kv.key, kv.changed), kv.key, kv.value))
        self._events += sorted(told)

    def _trim(self) -> None:
        if len(self._events) > KEPT_EVENTS * 1.1:
            cut = len(self._events) - KEPT_EVENTS
            self._oldest = self._events[cut - 1][0] // rows.EVENTS_MAX + 1
            del self._events[:cut]


def _event(revision: int, key: str, text: str) -> Event:
    return rows.event_of(key, revision // rows.EVENTS_MAX, text)


def _epoch_of(key: str) -> int:
    return int(key.rpartition("/")[2])


def _parsed(cursor: str) -> tuple[int, int]:
    epoch, _, revision = cursor.partition(".")
    if not (cursor.isascii() and len(cursor) < 40 and epoch.isdecimal() and revision.isdecimal()):
        raise InvalidError("cursor: is none of a lab", field="cursor", reason="is none of a lab")
    return int(epoch), int(revision)
