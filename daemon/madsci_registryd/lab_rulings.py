"""What the lab says of names and locks, as refusals, and as steps of a transaction.

The rules are those of service.py, which adds the verbs of locks to this class.
"""

from __future__ import annotations

from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import BusyError, WrongTypeError
from madsci_registryd.identities import TOKENS_A_TERM, Identities
from madsci_registryd.locks import Session, Verdict
from madsci_registryd.store import Row
from madsci_registryd.transaction import Told, Tx


class LabRulings(Identities):
    """Between the verbs of identities and those of locks. Belongs to the thread that owns the database."""

    def _check_with_lab(self, r: p.Resolve) -> None:
        """Refuse a name that is not known here and may not be made. Raises: RegistryError."""
        refusal, found = self.lab.refusal(r.name), self.lab.found(r.name)
        if refusal is not None and refusal.code != "held":  # if held, it is the lock that is refused
            raise refusal
        if found is not None and found.component_type != r.component_type:
            raise WrongTypeError(
                f"in the lab, {r.name!r} is a {found.component_type}, not a {r.component_type}",
                name=r.name,
                id=found.id,
                component_type=found.component_type,
                given=r.component_type,
            )

    def _later_by_lab(self, name: str, *, may_wait: bool) -> Verdict:
        """Judge a name that the lab has not given this host. Raises: RegistryError, that of the lab."""
        refusal = self.lab.refusal(name)
        if refusal is not None and not (may_wait and refusal.code == "held"):
            raise refusal
        if not may_wait:
            raise BusyError(f"the lab has not said yet whether {name!r} is free; try again")
        self.lab.want(name)
        return Verdict.QUEUE

    def confirm_in_lab(self, tx: Tx, name: str, term: int) -> None:
        """Note that the lab has given this host a name that is held here already; its token grows to the lab's term."""
        row = self.store.by_name(name)
        if row is None or row.lock is None:
            return
        old = row.lock.fencing_token
        token = old if old // TOKENS_A_TERM == term else self._next_token(tx, row.last_token, term)
        if token // TOKENS_A_TERM != term:
            return  # it has grown beyond that meanwhile
        self.store.confirm_lock(row.id, name, token, term)
        if token != old:
            tx.durable = True
            self._event(
                tx, self.session(row.lock.owner.session), "granted", row, fencing_token=token, was=old, by="lab"
            )
        tx.told.append(Told(row.lock.owner.session, self.lab_line(self._get(name), old)))

    def lab_line(self, row: Row, old_token: int) -> dict[str, Any]:
        """Return what a holder is told of how its lock stands in the lab."""
        assert row.lock is not None
        return {
            "op": "lab",
            "name": row.name,
            "instance": row.lock.owner.instance,
            "old_token": old_token,
            "fencing_token": row.lock.fencing_token,
            "lab": self.lab.standing(row),
        }

    def lose_to_lab(self, tx: Tx, name: str, term: int, host: str) -> None:
        """End the lock of a name that the lab has given to another host with a higher term, and tell the holder."""
        row = self.store.by_name(name)
        if row is None or row.lock is None or row.lock.fencing_token // TOKENS_A_TERM >= term:
            return
        holder = self.session(row.lock.owner.session)
        assert holder is not None
        reason = f"the lab gave it to {host}, which has a higher term, while this host was cut off"
        line = {
            "op": "lost",
            "name": name,
            "instance": row.lock.owner.instance,
            "fencing_token": row.lock.fencing_token,
            "reason": reason,
            "by": {"host": host},
        }
        tx.told.append(Told(holder.id, line))
        self._end_lock(tx, holder, row, "ended", reason=reason, by="lab", lab_host=host)
        tx.durable = True  # a lost lock must not come back with a power loss of the record

    def _end_lock(self, tx: Tx, who: Session, row: Row, kind: str, **why: Any) -> None:
        assert row.lock is not None
        self.store.drop_lock(row.id, tx.now)
        who.shares.pop(row.id, None)
        self._event(tx, who, kind, row, fencing_token=row.lock.fencing_token, **why)
        tx.lock_ends.append((kind, why.get("reason", "")))
        tx.freed.append(row.name)
