"""The loop's side of registry.json: what must be in it before somebody is answered, and what old programs wrote.

Rules
1. Nobody is answered with a name, or with the lock of a name, before the file shows it: the name with its ULID, the
   lock as our claim. So no old program can take the name, or make it another ULID, in between.
2. A claim is taken back when nobody has held or wanted its name for FREE_S: hand-overs do not touch the file.
3. What old programs wrote is taken in before anything that was asked in the same pass is answered.
4. Everything else (metadata, last_seen, a rename's old name) follows within SOON_S or SEEN_S.

Theory of operation
A request that needs the file waits in `_asked`. One pass over the file is under way at a time, in another thread; it
serves all that had asked when it began. Its Result comes back as one turn of the loop: first the changes that old
programs made, then the requests, in one batch. So the rules of locks know nothing of files: they see a name that is
ready, or one that an old program holds.
"""

from __future__ import annotations

import errno
import logging
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from madsci_registry.errors import BusyError, NoSpaceError, RegistryError
from madsci_registryd import fragments, messages
from madsci_registryd.clock import iso
from madsci_registryd.core import Core
from madsci_registryd.export import Export, Gone, Job, Outcome, Result, Want
from madsci_registryd.fragments import Identity
from madsci_registryd.intake import Intake
from madsci_registryd.merging import Refusal
from madsci_registryd.publication import BUSY_S, Publication
from madsci_registryd.registrar import RETRY_S
from madsci_registryd.registry_file import FileFault

log = logging.getLogger(__name__)

FREE_S = 10.0
"""How long nobody has had a name before old programs may have it."""
SOON_S = 0.2
SEEN_S = 1.0
"""A busy name shall not have the file written at each of its hand-overs."""
TEXTS_A_TURN = 200
"""Making the text of an entry takes some 10 us."""


class Asked:
    """The names of a request that waits for a pass, and what to do then; that is done once."""

    def __init__(self, wants: list[Want], then: Callable[[RegistryError | None], None]) -> None:
        self.wants = wants
        self._then: Callable[[RegistryError | None], None] | None = then

    @property
    def is_answered(self) -> bool:
        return self._then is None

    def answer(self, refusal: RegistryError | None) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(refusal)


class Bridge(Publication):
    """One registry.json. Belongs to the loop's thread; `send` gives a job to the thread that makes passes."""

    def __init__(self, core: Core, export: Export, send: Callable[[Job], None]) -> None:
        super().__init__(core, Intake(core))
        self._intake.repair = self.repair
        self._registrar = core.registrar
        self._export = export
        self._send = send
        self._is_serving = False
        self._is_running = False
        self._retry_at = 0.0
        self._asked: list[Asked] = []
        self._in_flight: list[Asked] = []
        self._asked_names: Counter[str] = Counter()
        """How many requests of `_asked` and `_in_flight` want a name in the file."""
        self._wanted: set[str] = set()
        """Names to claim for who waits for them, or holds them though they are not claimed."""
        self._free_since: dict[str, float] = {}
        """Claimed names that nobody holds."""
        self._drop: set[str] = set()
        self._sent: set[str] = set()
        """What of `_wanted` is in the pass under way."""
        self._names: dict[str, str] = {}
        """Ids to the names that the file is to have them under."""
        self._dirty: dict[str, None] = {}
        """Ids whose text is to be made anew."""
        self._moved: set[str] = set()
        """Ids whose lock or last_seen changed."""
        self._put: dict[str, Identity | Gone] = {}
        self._due = math.inf
        self._contested: set[str] = set()
        """Names that a new and an old program hold both: where the file was not kept, or an old one woke too late."""
        self._exported = 0
        self._fault: FileFault | None = None
        self._is_busy = False
        self._written_at: str | None = None
        self._aside: str | None = None

    # start and stop

    def open(self) -> None:
        """Bring file and database together, before anybody is served and before passes are made elsewhere."""
        rows = self._store.components(limit=-1)
        self._exported = int(self._store.meta("exported") or 0)
        changed = self._store.changed_after(self._exported)
        others = self._store.all_other_ids()
        old = {row.name: row.old_lock for row in rows if row.old_lock is not None}
        self._export.begin(
            {row.name: fragments.of_row(row, others.get(row.id, ())) for row in rows},
            old,
            changed | {row.name for row in rows if row.id in changed},
        )
        self._names = {row.id: row.name for row in rows}
        self._store.touched.clear()
        self._store.seen.clear()
        self._wanted = set(self._store.locked_names())
        for name in old:
            self._intake.watch(name, self._export.until[name])
        self.done(self._export.run(self._job()), was_asked=True)
        self._registrar.commit()
        self._is_serving = True
        self._timers.every(1.0, self._drop_free)

    def close(self) -> None:
        """Write what is not written yet, and let old programs have what is free. No pass may be under way."""
        self._notice()
        self._look_who_is_free()
        self._build(len(self._dirty))
        free = {name for name in self.claimed if self._is_free(name)}
        result = self._export.run(Job(put=self._put, drop=free))
        if result.busy or result.fault is not None:
            text = "registry.json is as it was before the last changes; the next start writes it"
            log.warning(text, extra=messages.REGISTRY_JSON_BEHIND())
        self._export.close()

    # what waits for the file

    def want(self, name: str) -> None:
        if not self.ready(name):
            self._wanted.add(name)

    def is_asked(self, name: str) -> bool:
        return self._asked_names[name] > 0

    def prepare(self, wants: list[Want], then: Callable[[RegistryError | None], None]) -> None:
        if not wants:
            then(None)
            return
        asked = Asked(wants, then)
        self._asked.append(asked)
        self._asked_names.update(want.name for want in wants)
        self._timers.after(BUSY_S, lambda: self._give_up(asked))

    def _give_up(self, asked: Asked) -> None:
        if asked.is_answered:
            return
        if asked in self._in_flight and self._export.has_lock:
            self._timers.after(BUSY_S, lambda: self._give_up(asked))  # it is being done
            return
        if asked in self._asked:
            self._asked.remove(asked)
            self._forget(asked)  # else the pass under way will
        asked.answer(self._refusal())

    def _forget(self, asked: Asked) -> None:
        for want in asked.wants:
            self._asked_names[want.name] -= 1
            if not self._asked_names[want.name]:
                del self._asked_names[want.name]

    def _refusal(self) -> RegistryError:
        path = str(self._export.path)
        if self._fault is None:
            return BusyError(f"{path} is locked by an old program for longer than {BUSY_S:g} s; try again")
        kind = NoSpaceError if _is_full(self._fault) else BusyError  # "unavailable" would be no daemon at all
        return kind(f"{path} has to be written first, and cannot be: {self._fault}", path=path)

    # what goes into the file

    def pump(self) -> None:
        """Begin a pass if there is something to do and none is under way. For every turn of the loop."""
        self._notice()
        now = self._clock.monotonic()
        is_asked = bool(self._asked or self._wanted)
        if self._is_running or now < self._retry_at or not (is_asked or now >= self._due):
            return
        self._build(TEXTS_A_TURN)
        if self._dirty and not is_asked:
            self._timers.after(0, self.pump)  # others first
            return
        self._is_running = True
        self._send(self._job())

    def _notice(self) -> None:
        """See what the last commits changed."""
        touched, seen = self._store.touched, self._store.seen
        if not touched and not seen:
            return
        self._be_due(self._clock.monotonic() + (SOON_S if touched else SEEN_S))
        for id in touched:
            row = self._store.by_id(id)
            if row is None:
                continue  # rolled back
            self._dirty[row.id] = None
            self.minted.pop(row.name, None)
            self.shown.discard(row.name)
            before = self._names.pop(id, None)  # that ULID may be one that it had
            self._names[row.id] = row.name
            if before not in (None, row.name):
                self.repair(before, row.id)
        self._moved |= seen
        touched.clear()
        seen.clear()

    def _be_due(self, at: float) -> None:
        if at < self._due:
            self._due = at
            self._timers.after(at - self._clock.monotonic(), self.pump)

    def _build(self, count: int) -> None:
        """Make the texts of at most `count` components that changed."""
        if self._moved:
            self._look_who_is_free()
        while self._dirty and count > 0:
            id, _ = self._dirty.popitem()
            row = self._store.by_id(id)
            count -= 1
            if row is not None:
                self._put[row.name] = self._identity_of(row)

    def repair(self, name: str, id: str | None) -> None:
        row = self._store.by_name(name)
        if row is not None:
            self._dirty[row.id] = None
        elif id is not None:
            owner = self._store.by_id(id)
            self._put[name] = Gone((id,) if owner is None else (owner.id, *self._store.other_ids(owner.id)))
            self.claimed.discard(name)
            self._free_since.pop(name, None)
        if id is not None and self._store.by_id(id) is not None:
            self._dirty[id] = None
        self._be_due(self._clock.monotonic() + SOON_S)

    def _job(self) -> Job:
        self._in_flight, self._asked = self._asked, []
        wants = [want for asked in self._in_flight for want in asked.wants]
        for name in self._wanted:
            row = self._store.by_name(name)
            if row is not None:
                wants.append(Want(name, self._identity_of(row), lock=True))
        self._sent = self._wanted
        job = Job(self._put, wants, self._drop, None if self._dirty else self._store.identity_revision)
        self._put, self._wanted, self._drop = {}, set(), set()
        if not self._dirty:
            self._due = math.inf
        return job

    def _is_free(self, name: str) -> bool:
        row = self._store.by_name(name)
        return (row is None or row.lock is None) and not self._service.queues.count(name)

    def _look_who_is_free(self) -> None:
        """Look once at what may have changed hands many times: that is no part of a hand-over."""
        now = self._clock.monotonic()
        for id in self._moved:
            self._dirty[id] = None
            row = self._store.by_id(id)
            if row is None or row.name not in self.claimed:
                continue
            if row.lock is None:
                self._free_since[row.name] = now
            else:
                self._free_since.pop(row.name, None)
        self._moved.clear()

    def _drop_free(self) -> None:
        self._look_who_is_free()
        now = self._clock.monotonic()
        for name, since in list(self._free_since.items()):
            if now - since < FREE_S:
                continue
            del self._free_since[name]
            if self._is_free(name):
                self.claimed.discard(name)
                self._drop.add(name)
                self._be_due(now)

    # what came of a pass

    def done(self, result: Result, was_asked: bool) -> None:
        """Take what a pass found and did; `was_asked`: it was made for a job of ours."""
        was_off = self.is_off
        self._note_state(result)
        asked: list[Asked] = []
        if was_asked:
            self._is_running = False
            asked, self._in_flight = self._in_flight, []
        if result.merge is not None:
            # Whoever waits for this pass, or has a ULID made for the next, must find what old programs made.
            is_waited_for = bool(asked or self._asked) or not self._is_serving
            self._intake.merge(result.merge, result.until, at_once=is_waited_for)
            for name in result.merge.claims - self.claimed:
                self._claim(name)
        for name, outcome in result.outcomes.items():
            self._take_outcome(name, outcome)
        for each in asked:
            is_done = self.is_off or all(want.name in result.outcomes for want in each.wants)
            if not is_done and result.fault is None and not each.is_answered:
                self._asked.append(each)
                continue
            self._forget(each)
            each.answer(None if is_done else self._refusal())
        if result.failed:
            self._retry_at = self._clock.monotonic() + (RETRY_S if result.fault is not None else 0.0)
            self._wanted |= self._sent if was_asked else set()
            self._be_due(self._retry_at)
        elif was_off:
            self._wanted |= {name for name in self._store.locked_names() if name not in self.claimed}
        self._note_exported(result.revision)

    def _take_outcome(self, name: str, outcome: Outcome) -> None:
        minted = self.minted.get(name)
        if minted is not None:
            self.shown.add(name)
            if minted.id != outcome.id and self._store.by_id(outcome.id) is None:
                self.minted[name] = minted._replace(id=outcome.id)  # what the file shows goes before what we had made
        if outcome.claimed:
            self._claim(name)
            return
        row = self._store.by_name(name)
        if outcome.held and row is not None and row.lock is not None and name not in self._contested:
            self._contested.add(name)
            text, extra = "%r is held by a new program and by %s", messages.HELD_TWICE(name=name)
            log.error(text, name, outcome.held.label, extra=extra)
            self._intake.refuse(Refusal("lock", name, "a new program has it; both go on", outcome.held))

    def _note_exported(self, revision: int | None) -> None:
        if revision is not None and revision != self._exported:
            self._exported = revision
            self._registrar.insist(lambda tx: self._store.set_meta("exported", self._exported))

    def _claim(self, name: str) -> None:
        self.claimed.add(name)
        self._drop.discard(name)
        self._contested.discard(name)
        row = self._store.by_name(name)
        if row is None or row.lock is None:
            self._free_since[name] = self._clock.monotonic()
            self._registrar.reconsider(name)

    def _note_state(self, result: Result) -> None:
        if not result.busy:
            if str(result.fault or "") != str(self._fault or ""):
                kind = messages.REGISTRY_JSON_FAILING if result.fault else messages.REGISTRY_JSON_KEPT_AGAIN
                log.warning("registry.json: %s", result.fault or "it is written again", extra=kind())
            self._fault = result.fault
            self.is_off = result.fault is not None and result.fault.lasting
        self._is_busy = result.busy
        if result.written:
            self._written_at = iso(self._clock.wall())
        if result.aside is not None:
            self._aside = result.aside
            text = "registry.json was not whole: it is %s now, and written from the database"
            log.error(text, result.aside, extra=messages.REGISTRY_JSON_PUT_ASIDE(path=result.aside))

    def status(self) -> dict[str, Any]:
        """Say how it stands with the file, and which old programs were seen to write it since the daemon began."""
        return {
            "path": str(self._export.path),
            "state": "stopped" if self.is_off else "failing" if self._fault else "on",
            "fault": str(self._fault) if self._fault else None,
            "busy": self._is_busy,
            "written_at": self._written_at,
            "claims": len(self.claimed),
            "refused": self._intake.refused,
            "put_aside": self._aside,
            "old_programs": [
                {"host": host, "pid": pid, "instance": instance, "seen_at": at}
                for (host, pid, instance), at in self._intake.writers.items()
            ],
        }

    def degraded(self) -> list[str]:
        """Say what is not as it should be."""
        if self.is_off:
            return [f"registry.json is not kept, and old programs are not kept apart: {self._fault}"]
        if self._fault is not None:
            return [f"registry.json cannot be written: {self._fault}"]
        contested = [f"{name!r} is held by a new and by an old program" for name in sorted(self._contested)]
        return [*contested, "registry.json is locked by an old program"] if self._is_busy else contested


def _is_full(fault: FileFault) -> bool:
    return isinstance(fault.__cause__, OSError) and fault.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
