"""Many changes, locks or releases of a host on etcd, some in each transaction: etcd has a limit for one.

A batch of changes moves the host's mark with each transaction. So one that ends in the middle, because etcd does not
answer any more, is as if it had been two: sent again, what was taken in is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from madsci_registry.errors import NoSpaceError, RegistryError, UnavailableError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab import rules
from madsci_registry_lab.etcd_gateway import EtcdRefusedError
from madsci_registry_lab.etcd_identities import Identities
from madsci_registry_lab.etcd_rows import dumps
from madsci_registry_lab.etcd_transaction import Runner, Transaction
from madsci_registry_lab.store import Applied, Change, Lock, Mark, Unapplied, Want

AT_ONCE = 28
"""Changes or locks of one transaction: most read three keys, and etcd compares 128 at most."""


@dataclass
class _Piece:
    """What one transaction has taken in."""

    mark: Mark | None
    taken: int = 0
    changed: int = 0
    repeated: int = 0
    unapplied: list[Unapplied] = field(default_factory=list)


def take_in(
    runner: Runner, host: str, epoch: int, after: int | None, upto: int | None, changes: Sequence[Change]
) -> Applied:
    """See LabStore.apply."""
    done, first = _Piece(None), True
    while first or done.taken < len(changes):
        rest = changes[done.taken :]
        follows = after if first or after is None else changes[done.taken - 1].revision
        piece = runner.run(lambda tx, rest=rest, follows=follows: _piece(tx, host, epoch, follows, upto, rest))  # type: ignore[misc] # bound
        done = _Piece(
            piece.mark,
            done.taken + piece.taken,
            done.changed + piece.changed,
            done.repeated + piece.repeated,
            done.unapplied + piece.unapplied,
        )
        first = False
    return Applied(done.mark, done.changed, done.repeated, tuple(done.unapplied))


def _piece(
    tx: Transaction, host: str, epoch: int, after: int | None, upto: int | None, changes: Sequence[Change]
) -> _Piece:
    """Take in as many of the changes as one transaction holds."""
    text = tx.get(rows.mark_key(host))
    mark = Mark(*json.loads(text)) if text else None
    if after is not None:
        rules.check_order(mark, epoch, after)
    done, lab = _Piece(mark), Identities(tx)
    fresh = [c for c in changes if after is None or mark is None or c.revision > mark.revision]
    done.taken = done.repeated = len(changes) - len(fresh)
    lab.prefetch(fresh[:AT_ONCE])
    for change in fresh[:AT_ONCE]:
        verdict = lab.take_in(change.state, host, sync=after is None)
        done.taken += 1
        done.changed += verdict.do != "nothing"
        if verdict.reason:
            there = lab.names.taken(change.state.name)
            done.unapplied.append(Unapplied(change.state, verdict.reason, there.id if there else None))
        if tx.is_full:
            break
    reached = upto if done.taken == len(changes) else None if after is None else changes[done.taken - 1].revision
    if reached is not None:
        done.mark = Mark(epoch, max(reached, mark.revision) if mark and mark.epoch == epoch else reached)
        if done.mark != mark:
            tx.put(rows.mark_key(host), dumps([done.mark.epoch, done.mark.revision]))
    return done


def acquire(
    runner: Runner, host: str, session: str, wants: Sequence[tuple[str, Want]]
) -> list[Lock | RegistryError]:  # fmt: skip
    """See LabStore.acquire."""
    done: list[Lock | RegistryError] = []
    for n in range(0, len(wants), AT_ONCE):
        part = wants[n : n + AT_ONCE]
        done += runner.run(lambda tx, part=part: _acquire(tx, host, session, part))  # type: ignore[misc] # bound
    return done


def _acquire(tx: Transaction, host: str, session: str, wants: Sequence[tuple[str, Want]]) -> list[Lock | RegistryError]:
    tx.fetch(rows.META, rows.session_key(session), *_keys([name for name, _ in wants]))
    locks, done = Identities(tx).locks, list[Lock | RegistryError]()
    for name, want in wants:
        try:
            done.append(locks.acquire(host, session, name, want))
        except RegistryError as error:
            if isinstance(error, (UnavailableError, NoSpaceError, EtcdRefusedError)):
                raise
            done.append(error)
    return done


def release(runner: Runner, host: str, session: str, terms: Sequence[tuple[str, int | None]]) -> list[str]:
    """See LabStore.release."""
    done: list[str] = []
    for n in range(0, len(terms), AT_ONCE):
        part = terms[n : n + AT_ONCE]
        done += runner.run(lambda tx, part=part: _release(tx, host, session, part))  # type: ignore[misc] # bound
    return done


def _release(tx: Transaction, host: str, session: str, terms: Sequence[tuple[str, int | None]]) -> list[str]:
    tx.fetch(rows.session_key(session), *_keys([name for name, _ in terms]))
    locks, done = Identities(tx).locks, list[str]()
    for name, term in terms:
        lock = locks.of_name(name)
        if lock is not None and (lock.host, lock.session) == (host, session) and term in (None, lock.term):
            locks.drop(lock)
            done.append(name)
    return done


def _keys(names: Sequence[str]) -> list[str]:
    return [key for name in names for key in (f"n/{name}", rows.lock_key(name))]
