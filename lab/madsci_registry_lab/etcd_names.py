"""Names and ULIDs in a transaction on etcd: their rows, and the events that name them."""

from __future__ import annotations

import json
from dataclasses import replace

from madsci_registry.errors import NotFoundError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.etcd_rows import dumps, loads
from madsci_registry_lab.etcd_transaction import Transaction
from madsci_registry_lab.records import IdRow, NameRow


class Names:
    """Rows of names and ULIDs as one transaction sees and leaves them."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx

    def fetch(self, *names: str) -> None:
        """Read names that will be needed, in one request."""
        self._tx.fetch(*(key for name in names for key in (f"n/{name}", f"v/{name}")))

    def row(self, name: str) -> NameRow:
        """Return a name's row; one that was never used has an empty one."""
        text = self._tx.get(f"n/{name}") or self._tx.get(f"v/{name}")
        return loads(NameRow, text) if text else NameRow(name=name)

    def taken(self, name: str) -> NameRow | None:
        """Return the row of a name that has a component."""
        row = self.row(name)
        return row if row.id is not None else None

    def put(self, row: NameRow) -> None:
        """Write a name's row; it has but one of its two keys."""
        key = rows.name_key(row)
        if self._tx.get(key) is None:
            other = rows.name_key(replace(row, id="" if row.id is None else None))
            if self._tx.get(other) is not None:
                self._tx.delete(other)
        self._tx.put(key, dumps(row))

    def id_row(self, id: str) -> IdRow | None:
        """Return what is known of a ULID."""
        text = self._tx.get(rows.id_key(id))
        return loads(IdRow, text) if text else None

    def put_id(self, id: str, row: IdRow) -> None:
        self._tx.put(rows.id_key(id), dumps(row))

    def of_id(self, id: str) -> NameRow | None:
        """Return the row of the component to which a ULID belongs."""
        row = self.id_row(id)
        return self.taken(row.name) if row else None

    def tell(self, kind: str, name: str, id: str | None, host: str | None, **why: object) -> None:
        """Write an event of a component, and that its ULID has history under the name."""
        row = self.row(name)
        if id is not None and id not in row.told:
            self.put(replace(row, told=(*row.told, id)))
        self._tx.tell(kind, name, id, host, **why)

    def absent(self, name: str | None, id: str | None = None) -> NotFoundError:
        """Return the error of a name or ULID without a component, with where a renamed one went."""
        moved_id = self.row(name).moved_id if name is not None else None
        now = self.id_row(moved_id) if moved_id else None
        moved = now.name if now else None
        where = f"; the component that had it is {moved!r} now" if moved else ""
        shown = name if name is not None else id
        return NotFoundError(f"the lab knows no {shown!r}{where}", name=name, id=id, renamed_to=moved)

    def epoch(self) -> int:
        """Return the epoch, above which every new term is."""
        text = self._tx.get(rows.META)
        return int(json.loads(text)["epoch"]) if text else 0
