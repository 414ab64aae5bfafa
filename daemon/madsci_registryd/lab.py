"""Keeps what this host holds in step with what the lab says of it, and tells holders how their locks stand there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from madsci_registry.names import name_fault
from madsci_registryd import lab_answers as a
from madsci_registryd.lab_confirming import Confirming
from madsci_registryd.store import Row
from madsci_registryd.tenure import LOOK_S, Has, Tenure

LINES_A_TURN = 100
UNSTATED_MAX = 1000
"""So many are seen to after each keepalive: the lab tells the rest with the next."""


class Lab(Confirming):
    """The lab tier of a daemon. Belongs to the loop's thread; the link's listener."""

    on_came: Callable[[a.Mark | None], None] = staticmethod(lambda mark: None)
    on_gone: Callable[[], None] = staticmethod(lambda: None)

    def open(self) -> None:
        """Go on with what an earlier daemon held."""
        self._was_confirmed = self._was_gone = False
        self._store.is_lab_followed = True
        for name, _, _, term in self._store.lab_locks():
            if term is not None:
                self._tenures[name] = Tenure(name, Has.IT, term)
            else:
                self._unconfirmed.add(name)
        self._timers.every(LOOK_S, self._look)

    def doubt(self) -> None:
        """What was granted last may be forgotten here (an I/O error, a backup): no term of before is gone on with."""
        self._stale()
        self._link.end_session()

    def _look(self) -> None:
        for name in list(self._wanted):
            self._poll(name)

    def pump(self) -> None:
        if self._store.renames or self._renames:
            self._renames += self._store.renames
            self._store.renames.clear()
            self._follow_renames()
        if self._store.freed:
            for row in map(self._store.by_id, self._store.freed):
                if row is not None and row.lock is None:
                    self._unconfirmed.discard(row.name)
                    self._anew.discard(row.name)
                    self.contested.pop(row.name, None)
                    if row.name in self._tenures:
                        self._look_at(self._tenures[row.name])
            self._store.freed.clear()
        if self._to_give:
            self._give_some()
        if self._unconfirmed and self._link.is_up and self._link.session and not self._confirming:
            self._confirm_some()
        if self._was_confirmed != self._link.is_confirmed:
            self._was_confirmed = not self._was_confirmed
            self._to_tell += [tenure.name for tenure in self._tenures.values() if tenure.has is Has.IT]
            if self._link.is_up and not self._was_confirmed:
                self._link.ask_now()  # the machine slept
        if self._to_tell:
            self._tell_some()

    def counts(self) -> tuple[int, int]:
        """Return how many locks are confirmed, and how many are not."""
        held = self._store.lock_count()
        asked = self._unconfirmed | self._later | self._unheard | self._confirming.keys()
        unconfirmed = len(asked | {tenure.name for tenure in self._moved})
        confirmed = max(held - unconfirmed, 0) if self._link.is_confirmed else 0
        return confirmed, held - confirmed

    # what the link says

    def holds(self) -> dict[str, int]:
        return {t.told_as or t.name: t.term for t in self._tenures.values() if t.has is Has.IT}

    def began(self) -> None:
        """A session without locks: what is held here is taken again."""
        self._give_nothing()
        self._stale()

    def _stale(self) -> None:
        for tenure in self._tenures.values():
            if tenure.has is Has.IT:
                tenure.has, tenure.told_as = Has.STALE, None
                self._watch(tenure)
                self._to_tell.append(tenure.name)
        self._moved.clear()
        self._unconfirmed = {name for name, _, _, _ in self._store.lab_locks()}
        if self._is_in_doubt():
            self._anew |= self._unconfirmed

    def _is_in_doubt(self) -> bool:
        """Tell whether holders may still say what they hold, which is not known here."""
        return self._clock.monotonic() < self._service.no_grants_before

    def came(self, mark: a.Mark | None) -> None:
        self._unconfirmed |= self._later | self._unheard
        self._later.clear()
        self._unheard.clear()
        self._ahead.clear()
        if self._was_gone:
            self._was_gone = False
            self._forget_silence()
        for tenure in list(self._tenures.values()):
            self._go_on(tenure)
        self.on_came(mark)

    def gone(self) -> None:
        """Nobody waits for the lab any more."""
        self._was_gone = True
        self._give_nothing()
        for tenure in list(self._tenures.values()):
            self._serve(tenure)
        for name in list(self._wanted):
            self._poll(name)
            self._registrar.reconsider(name)
        self.on_gone()

    def kept(self, said: a.Kept, stated: dict[str, int]) -> None:
        for name, term in islice(said.unstated.items(), UNSTATED_MAX):
            if name_fault(name) is None:
                self._unstated(name, term, stated.get(name))
        for given in said.lost:
            tenure = self._stated(given.name, stated)
            if tenure is not None and given.term > tenure.term and given.host not in (None, self._link.host.name):
                self._lose(tenure, given.term, str(given.host))
        for name in said.missing:
            tenure = self._stated(name, stated)
            if tenure is not None and not tenure.is_asking:
                tenure.has, tenure.told_as = Has.STALE, None
                self._moved.discard(tenure)
                self._watch(tenure)
                self._unconfirmed.add(tenure.name)
                self._to_tell.append(tenure.name)

    def _stated(self, name: str, stated: dict[str, int]) -> Tenure | None:
        """Return the tenure that was stated under a name, if it is still as it was."""
        tenure = self._tenures.get(name)
        if tenure is None or tenure.told_as is not None:
            tenure = next((moved for moved in self._moved if moved.told_as == name), None)
        is_so = tenure is not None and tenure.has is Has.IT and tenure.term == stated.get(name)
        return tenure if is_so else None

    def _unstated(self, name: str, term: int, stated: int | None) -> None:
        """The lab has a name for us as we did not say: by a rename, an answer that was lost, or released just now."""
        tenure, row = self._tenures.get(name), self._store.by_name(name)
        if tenure is not None and tenure.is_asking:
            return
        if tenure is not None and tenure.has is Has.IT:
            if tenure.told_as is not None or stated == tenure.term:
                tenure.told_as = None  # the lab knows of the rename, or has renamed for another reason
                self._moved.discard(tenure)
                self._take(tenure, term)
            return
        moved = self._renamed_to(name)
        if moved is not None and moved.has is Has.IT and moved.term == term:
            self._tell_as(moved, name)  # of that rename the lab has not heard
        elif row is not None and row.lock is not None:
            self._take(self._tenure(name), term)
        elif not self._is_in_doubt():
            self._release(name, term)

    def _renamed_to(self, name: str) -> Tenure | None:
        """Return what the host has of the component that left this name."""
        before = self._store.name_row(name)
        row = self._store.by_id(before.renamed_id) if before and before.renamed_id else None
        return self._tenures.get(row.name) if row is not None and row.name != name else None

    def _tell_as(self, tenure: Tenure, name: str) -> None:
        tenure.told_as = name
        self._moved.add(tenure)
        self._watch(tenure)
        self._to_tell.append(tenure.name)

    def delivered(self, revision: int) -> None:
        """The lab has all changes up to a revision: it knows of renames, and of new names."""
        if self._moved:
            self._link.ask_now()
        if revision >= self._store.identity_revision:  # not each time: with many names that are many questions
            self._unconfirmed |= self._unheard
            self._unheard.clear()
        self.heard_changes()

    def _follow_renames(self) -> None:
        """A tenure goes with its component; the lab has it under the old name until it hears of the rename. Where
        something is just being asked about one of the names, the answer comes first."""
        while self._renames:
            tenures = [self._tenures.get(name) for name in self._renames[0]]
            if any(tenure is not None and tenure.is_asking for tenure in tenures):
                return
            old, new = self._renames.pop(0)
            for before, after in self._renames:
                new = after if before == new else new
            left, row, later = self._store.name_row(old), self._store.by_name(new), self._store.by_name(old)
            if left is not None and row is not None and row.id == left.renamed_id and new != old:
                self._follow(old, row)
                if later is not None and later.lock is not None:
                    self._unconfirmed.add(old)  # a new component, held already
            # else that transaction failed

    def _follow(self, old: str, row: Row) -> None:
        tenure = self._tenures.get(old)
        if tenure is None or tenure.has is Has.NOTHING:
            if row.lock is not None:
                self._unconfirmed.add(row.name)
            return
        there = self._tenures.pop(row.name, None)
        del self._tenures[old]
        self._tenures[row.name], tenure.name = tenure, row.name
        waiting, tenure.waiting = tenure.waiting + (there.waiting if there else []), []
        if tenure.has is Has.IT:
            self._tell_as(tenure, tenure.told_as or old)
        else:
            self._unconfirmed.add(row.name)
        for _, then in waiting:
            then()

    # what holders are told

    def _tell_some(self) -> None:
        """Tell holders how their locks stand in the lab, some with each turn."""
        now, self._to_tell = self._to_tell[:LINES_A_TURN], self._to_tell[LINES_A_TURN:]
        for row in map(self._store.by_name, now):
            if row is not None and row.lock is not None:
                self._registrar.tell(row.lock.owner.session, self._service.lab_line(row, row.lock.fencing_token))
        if self._to_tell:
            self._timers.after(0, lambda: None)
