"""All of a lab in etcd read, as of one revision, and written into an etcd that has none.

A copy is `unfinished` until it has been read again and compared: no lab registry serves it, and it is no source of
another one. Every write compares that it is still this copy's: so whatever an earlier one, which was killed, had under
way comes too late, and of two at once at most one goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from ulid import ULID

from madsci_registry.errors import NoSpaceError, RegistryError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.copying import Everything
from madsci_registry_lab.etcd_access import EtcdAccess
from madsci_registry_lab.etcd_epochs import FORMAT
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_rows import dumps, loads
from madsci_registry_lab.etcd_wire import Compare, Delete, Kv, Put, Range, Txn, after
from madsci_registry_lab.faults import BAD_CONFIGURATION, CANNOT_CREATE, DAMAGED, DISK_FULL, IN_USE, IO_ERROR, Fault
from madsci_registry_lab.records import ConflictRow, IdRow, NameRow
from madsci_registry_lab.store import LASTING, Event, Lock, Session

PAGE = 500
"""Keys that are read in one request."""
AT_ONCE = 100
"""Keys that are written in one transaction."""
PIECE_BYTES = 512 * 1024
_UNFINISHED = 0
"""The format of a lab whose copy is not whole: no lab registry serves it."""
_UNFINISHED_META = re.compile(rf'\{{"format":{_UNFINISHED}[,}}]')


def read(access: EtcdAccess) -> Everything:
    """Read all that a lab keeps. Raises Fault: also where something was written meanwhile."""
    with _faults(), closing(EtcdGateway(access)) as gateway:
        try:
            return _Reader(gateway, FORMAT).everything()
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise Fault(DAMAGED, f"what stands under {access.prefix} in etcd is no lab: {error!r}") from error


def write(access: EtcdAccess, given: Everything) -> None:
    """Write all, where no lab is, and compare it; what is left of an unfinished copy is deleted. Raises Fault."""
    with _faults(), closing(EtcdGateway(access)) as gateway:
        _Writer(gateway).write(given)


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except RegistryError as error:
        raise Fault(DISK_FULL if isinstance(error, NoSpaceError) else IO_ERROR, error.message) from error


class _Reader:
    def __init__(self, gateway: EtcdGateway, format: int) -> None:
        self._gateway, self._prefix = gateway, gateway.access.prefix
        found = gateway.range(Range(self._prefix + rows.META))
        if not found.kvs:
            raise Fault(BAD_CONFIGURATION, f"etcd has no lab under {self._prefix}")
        self._meta, self._revision = json.loads(found.kvs[0].value), found.revision
        if self._meta["format"] == _UNFINISHED != format:
            raise Fault(DAMAGED, f"under {self._prefix} in etcd is a copy that was not finished")
        if self._meta["format"] != format:
            raise Fault(DAMAGED, f"this lab in etcd has format {self._meta['format']}, this program knows {format}")

    def everything(self) -> Everything:
        living = {session.id: session for session in (loads(Session, kv.value) for _, kv in self._all("s/"))}
        names = [loads(NameRow, kv.value) for kind in ("n/", "v/") for _, kv in self._all(kind)]
        locks = [loads(Lock, kv.value) for _, kv in self._all("l/")]
        events = [(rows.event_revision(kv.key, kv.created), kv) for _, kv in self._all("h/")]
        events.sort(key=lambda event: event[0])
        found = Everything(
            epoch=self._meta["epoch"],
            names=tuple(
                replace(row, told=(), other_ids=tuple(sorted(row.other_ids)))
                for row in sorted(names, key=lambda row: row.name)
            ),
            ids=tuple((id, loads(IdRow, kv.value)) for id, kv in self._all("i/")),
            conflicts=tuple((*_pair(key), loads(ConflictRow, kv.value)) for key, kv in self._all("c/")),
            marks=tuple((host, *json.loads(kv.value)) for host, kv in self._all("m/")),
            sessions=tuple(living[id] for id in sorted(living)),
            locks=tuple(lock for lock in locks if lock.session in living),
            events=tuple(replace(rows.event_of(kv.key, 0, kv.value), revision=0) for _, kv in events),
        )
        self._check_still()
        return found

    def _all(self, kind: str) -> Iterator[tuple[str, Kv]]:
        """Return each key of a kind, without what all have in common, in order."""
        start = self._prefix + kind
        key, end = start, after(start)
        while kvs := self._gateway.range(Range(key, end, limit=PAGE, revision=self._revision)).kvs:
            for kv in kvs:
                yield kv.key.removeprefix(start), kv
            key = kvs[-1].key + "\0"

    def _check_still(self) -> None:
        unchanged = Compare(self._prefix, "MOD", self._revision + 1, "LESS", after(self._prefix))
        if not self._gateway.txn(Txn((unchanged,), (Range(self._prefix),), (Range(self._prefix),))).succeeded:
            raise Fault(IN_USE, "this lab in etcd was written meanwhile: stop its lab registries first")


class _Writer:
    def __init__(self, gateway: EtcdGateway) -> None:
        self._gateway, self._prefix = gateway, gateway.access.prefix
        self._meta = self._prefix + rows.META

    def write(self, given: Everything) -> None:
        self._mine = self._begin()
        told: dict[str, list[str]] = {}
        for event in given.events:
            if event.name is not None and event.id is not None and event.id not in told.setdefault(event.name, []):
                told[event.name].append(event.id)
        self._write_events(given.events)
        for name in told.keys() - {row.name for row in given.names}:  # it has history, and never had a component
            self._put(iter([(f"v/{name}", dumps(NameRow(name=name, told=tuple(told[name]))))]))
        self._put(self._rows(given, told))
        given.check_copy(_Reader(self._gateway, _UNFINISHED).everything())
        self._write_meta(self._mine, (), dumps({"format": FORMAT, "epoch": given.epoch + 1}))

    def _begin(self) -> Compare:
        """See to it that there is nothing, and that what is there from now on serves no lab; return what it is then."""
        first, meta = self._gateway.txn(
            Txn(then=(Range(self._prefix, after(self._prefix), limit=1), Range(self._meta)))
        ).found
        if first.kvs and not (meta.kvs and _UNFINISHED_META.match(meta.kvs[0].value)):
            raise Fault(CANNOT_CREATE, f"etcd has a lab under {self._prefix}: it was left as it is")
        unchanged = Compare(self._prefix, "MOD", first.revision + 1, "LESS", after(self._prefix))
        all_else = (Delete(self._prefix, self._meta), Delete(self._meta + "\0", after(self._prefix)))
        mine = dumps({"format": _UNFINISHED, "epoch": 0, "copy": str(ULID())})
        assert _UNFINISHED_META.match(mine)
        return Compare(self._meta, "MOD", self._write_meta(unchanged, all_else, mine))

    def _write_meta(self, compare: Compare, then: tuple[Delete, ...], value: str) -> int:
        """Write what this copy is, if it is as it was; return the revision. Done by an earlier try, it is done."""
        done = self._gateway.txn(Txn((compare,), (*then, Put(self._meta, value)), (Range(self._meta),)))
        if done.succeeded:
            return done.revision
        for kv in done.found[0].kvs:
            if kv.value == value:
                return kv.changed
        raise self._in_use()

    def _in_use(self) -> Fault:
        return Fault(IN_USE, f"somebody else writes under {self._prefix} in etcd: this copy ends, unfinished")

    def _send(self, puts: list[Put]) -> None:
        """Write keys, if this copy is still the one: sent twice, they are the same."""
        if not self._gateway.txn(Txn((self._mine,), tuple(puts))).succeeded:
            raise self._in_use()

    def _put(self, pairs: Iterator[tuple[str, str]]) -> None:
        """Write keys, many in a transaction."""
        piece: list[Put] = []
        size = 0
        for key, value in pairs:
            piece.append(Put(self._prefix + key, value))
            size += len(value.encode())
            if len(piece) >= AT_ONCE or size > PIECE_BYTES:
                self._send(piece)
                piece, size = [], 0
        if piece:
            self._send(piece)

    def _write_events(self, events: tuple[Event, ...]) -> None:
        """Write history in its order: each piece is a transaction, whose revision is above those before."""
        for n in range(0, len(events), AT_ONCE):
            op, passing, puts = str(ULID()), list[str](), list[Put]()
            for k, event in enumerate(events[n : n + AT_ONCE]):
                key = rows.event_key(event.id, op, k)
                puts.append(Put(self._prefix + key, rows.event_text(event)))
                passing += [key] if event.kind not in LASTING else []
            if passing:
                puts.append(Put(f"{self._prefix}x/{op}", dumps(passing)))
            self._send(puts)

    def _rows(self, given: Everything, told: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
        for row in given.names:
            yield rows.name_key(row), dumps(replace(row, told=tuple(told.get(row.name, ()))))
        for id, known in given.ids:
            yield rows.id_key(id), dumps(known)
        for name, id, found in given.conflicts:
            yield rows.conflict_key(name, id), dumps(found)
            for key in rows.open_keys(name, id) if found.decided_at is None else ():
                yield key, ""
        for host, epoch, revision in given.marks:
            yield rows.mark_key(host), dumps([epoch, revision])
        for session in given.sessions:
            yield rows.session_key(session.id), dumps(session)
            yield rows.host_key(session.host), session.id
        for lock in given.locks:
            yield rows.lock_key(lock.name), dumps(lock)
            yield rows.owned_key(lock.session, lock.name), dumps(lock)


def _pair(key: str) -> tuple[str, str]:
    name, _, id = key.partition("\0")
    return name, id
