"""What a lab decides, whatever its store: pure, no SQL, no clock.

A host's word about a component is a whole *state*, not a command: taking in the same one twice changes nothing. What
contradicts the lab (one name with two ULIDs, above all) never changes an entry; it becomes a conflict for a person.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from madsci_registry.errors import ConflictError, WrongTypeError
from madsci_registry_lab.store import (
    TERM_LIMIT,
    Entry,
    GivenAwayError,
    HeldInLabError,
    Lock,
    Mark,
    OutOfOrderError,
    Reason,
    State,
    Want,
)


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a state."""

    do: Literal["nothing", "create", "alias", "update", "rename", "split", "conflict"]
    """alias: a conflict, and the ULID is known as the same component from now on. split: a ULID that is not preferred
    leaves for a name of its own."""
    reason: Reason | Literal["newer"] | None = None


NOTHING = Verdict("nothing")


def judge(given: State, host: str, by_id: Entry | None, by_name: Entry | None, *, sync: bool) -> Verdict:
    """Decide what a host's word does to the lab.

    Args:
        given: the word.
        host: whose.
        by_id: the entry to which the ULID belongs, preferred or not.
        by_name: the entry of the name.
        sync: the word may be older than what the lab has.
    """
    if by_id is None:
        return Verdict("create") if by_name is None else Verdict("alias", "two_ids")
    is_alias, renamed = given.id != by_id.id, given.name != by_id.name
    if is_alias and not renamed:
        return Verdict("nothing", "two_ids")  # told already; a person decides, or has decided
    if not is_alias and given.component_type != by_id.component_type:
        return Verdict("conflict", "wrong_type")
    if not renamed and _same(given, by_id):
        return NOTHING
    if sync and given.changed_at <= by_id.changed_at:
        return Verdict("nothing", "newer")
    if not renamed:
        return Verdict("update")
    if by_name is not None:
        return Verdict("conflict", "name_taken")
    if is_alias:
        return Verdict("split")
    if by_id.lock is not None and by_id.lock.host != host:
        return Verdict("conflict", "held")
    return Verdict("rename")


def _same(given: State, entry: Entry) -> bool:
    return given.retired == entry.retired and given.metadata == entry.metadata


def resolved(given: State, host: str, there: Entry | None, *, is_known: bool) -> Entry | None:
    """Return what a resolve leaves under a name, where it changes something: made, or revived; None: it stays as it is.

    Args:
        given: the name, its type, and the ULID that it has if it is new.
        host: whose request it is.
        there: the entry of the name.
        is_known: whether that ULID is a component's already.

    Raises:
        ConflictError, WrongTypeError: see LabStore.resolve.
    """
    if there is None:
        if is_known:
            raise ConflictError(f"{given.id} is another component's", name=given.name, id=given.id)
        return fresh(given, host)
    if there.component_type != given.component_type:
        raise WrongTypeError(
            f"{given.name!r} is a {there.component_type}",
            name=given.name, id=there.id, component_type=there.component_type, given=given.component_type,
        )  # fmt: skip
    if not there.retired:
        return None
    return replace(there, retired=False, changed_at=max(there.changed_at, given.changed_at), host=host)


def grant(name: str, session: str, host: str, held: Lock | None, last: tuple[int, str | None], want: Want) -> int:
    """Return the term of the lock that a session gets.

    Args:
        name: which name.
        session: who asks.
        host: the session's host.
        held: the lock that a living session has on it.
        last: the last term given for the name, and the host that it was given to.
        want: what is asked for.

    Raises:
        HeldInLabError, GivenAwayError: see LabStore.acquire.
        ConflictError: the name has had all its terms.
    """
    if held is not None and held.session == session:
        return held.term
    term, last_host = last
    # More than the lab has ever given: it was set back. Whoever has the highest term had the name last.
    is_ahead = want.term is not None and want.term > term
    if held is not None and not is_ahead:
        raise HeldInLabError(
            f"{name!r} is held by {held.host} since {held.since}",
            name=name, host=held.host, term=held.term, since=held.since, lab_holder=held.holder,
        )  # fmt: skip
    if want.term is not None and (is_ahead or (want.term, host) == last):
        return want.term
    if want.term is not None:
        raise GivenAwayError(
            f"{name!r} was given to {last_host or 'nobody'} with term {term}, after term {want.term}",
            name=name, host=last_host, term=term, reason="given away",
        )  # fmt: skip
    return next_term(name, term, want.proposal)


def next_term(name: str, last: int, proposal: int) -> int:
    """Return the term of a lock that goes to another session. Raises ConflictError where there is none left."""
    term = max(last, proposal) + 1
    if term >= TERM_LIMIT:
        raise ConflictError(f"{name!r} has had all its terms", name=name)
    return term


def moved_term(name: str, lock: Lock, last: int) -> int:
    """Return the term of a lock that a rename takes to another name, whose last term is `last`."""
    return lock.term if lock.term > last else next_term(name, last, 0)


def as_of(given: State, now: str) -> State:
    """Return a word as it is kept: what it says was changed in the future, it says now. (It is judged as it came.)"""
    return replace(given, changed_at=min(given.changed_at, now))


def updated(entry: Entry, given: State, host: str) -> Entry:
    """Return the entry with what a state says of it."""
    later = max(entry.changed_at, given.changed_at)
    return replace(
        entry, name=given.name, retired=given.retired, metadata=given.metadata, changed_at=later, host=host
    )  # fmt: skip


def fresh(state: State, host: str) -> Entry:
    """Return the entry that a state makes of a new name."""
    return Entry(
        name=state.name,
        id=state.id,
        component_type=state.component_type,
        retired=state.retired,
        metadata=state.metadata,
        created_at=state.created_at,
        changed_at=state.changed_at,
        host=host,
        term=0,
    )


def state_of(entry: Entry) -> State:
    """Return an entry as what its host said last."""
    return State(
        id=entry.id,
        name=entry.name,
        component_type=entry.component_type,
        retired=entry.retired,
        metadata=entry.metadata,
        created_at=entry.created_at,
        changed_at=entry.changed_at,
    )


def kind_of(before: Entry, after: Entry) -> str:
    """Name the change between two states of an entry that keeps its name."""
    if before.retired != after.retired:
        return "retired" if after.retired else "revived"
    return "metadata"


def check_order(mark: Mark | None, epoch: int, after: int) -> None:
    """Raise OutOfOrderError where changes after that revision do not follow on what the lab has of their host."""
    has = f"has revision {mark.revision} of epoch {mark.epoch}" if mark else "has nothing"
    if mark is None and after == 0 or mark is not None and mark.epoch == epoch and after <= mark.revision:
        return
    raise OutOfOrderError(
        f"changes after revision {after} of epoch {epoch} do not follow: the lab {has} of this host",
        epoch=mark.epoch if mark else None,
        revision=mark.revision if mark else None,
    )
