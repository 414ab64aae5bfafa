"""What every store of a lab promises (store.py): the same tests over each of them, with a clock to turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import FakeClock, until
from lab_stores import LEASE_S, STORES, ULIDS, Host, Stores, state
from madsci_registry.errors import (
    CompactedError,
    ConflictError,
    HeldError,
    InvalidError,
    NotFoundError,
    RegistryError,
    SessionRequiredError,
    WrongTypeError,
)
from madsci_registry_lab.clock import iso
from madsci_registry_lab.store import (
    TERM_LIMIT,
    Applied,
    Change,
    Event,
    GivenAwayError,
    HeldInLabError,
    LabStore,
    Mark,
    OutOfOrderError,
    State,
    Want,
)


@pytest.fixture
def clock() -> FakeClock:
    """A clock that a test turns."""
    return FakeClock()


@pytest.fixture(params=STORES)
def stores(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> Iterator[Stores]:
    """A store that can be opened, closed and set back."""
    with STORES[request.param](tmp_path, clock) as made:
        yield made


@pytest.fixture
def store(stores: Stores) -> LabStore:
    """An open store."""
    return stores.open()


def batch(store: LabStore, host: str, after: int, *states: State, epoch: int = 1) -> Applied:
    """Send states as the changes that follow on revision `after`."""
    changes = [Change(after + n, s) for n, s in enumerate(states, 1)]
    return store.apply(host, epoch, after, after + len(states), changes)


def sync(store: LabStore, host: str, *states: State, upto: int | None = 100) -> Applied:
    """Send all that a host has."""
    return store.apply(host, 1, None, upto, [Change(0, s) for s in states])


def kinds(store: LabStore, cursor: str) -> list[tuple[str, str | None]]:
    """Return kind and name of all changes after a cursor."""
    return [(e.kind, e.name) for e in store.changes(cursor, 1000).events]


def pass_time(store: LabStore, clock: FakeClock, seconds: float, *, living: tuple[Host, ...] = ()) -> int:
    """Let time pass, looking each second as the lab does; return how many sessions ended."""
    ended = 0
    for _ in range(int(seconds)):
        clock.advance(1)
        for host in living:
            host.keep()
        ended += store.expire()
    return ended


# identities


def test_first_writer_of_a_name_wins_once(store: LabStore) -> None:
    """Of twenty that make one name at once, one ULID wins, all are told it, and one is told that it is new."""
    ready = threading.Barrier(20)

    def make(n: int) -> tuple[str, bool]:
        ready.wait()
        made = store.resolve(f"host-{n}", "op", state("arm", n), None, None)
        return made.entry.id, made.is_new

    with ThreadPoolExecutor(20) as pool:
        answers = [*pool.map(make, range(20))]
    assert len({id for id, _ in answers}) == 1
    assert [is_new for _, is_new in answers].count(True) == 1
    assert store.find(name="arm").id == answers[0][0]


def test_repeated_request_is_answered_as_the_first_time(store: LabStore) -> None:
    """The same request once more is answered with the same ULID, as new; another one of the host is not new."""
    for _ in range(2):
        again = store.resolve("host-a", "op-1", state("arm", 1), None, None)
        assert (again.entry.id, again.is_new) == (ULIDS[1], True)
    other = store.resolve("host-a", "op-2", state("arm", 2), None, None)
    assert (other.entry.id, other.is_new) == (ULIDS[1], False)


def test_resolve_refuses_another_type_and_a_foreign_ulid(store: LabStore) -> None:
    """A name of another type, and a ULID that is another component's, are refused; nothing changes."""
    store.resolve("a", "1", state("arm", 1), None, None)
    with pytest.raises(WrongTypeError):
        store.resolve("a", "2", state("arm", 2, component_type="manager"), None, None)
    with pytest.raises(ConflictError):
        store.resolve("a", "3", state("leg", 1), None, None)
    with pytest.raises(NotFoundError):
        store.find(name="leg")


def test_resolve_of_a_retired_name_revives_it(store: LabStore) -> None:
    """A retired component that is resolved again has the same ULID and is not retired."""
    batch(store, "a", 0, state("arm", 1), state("arm", 1, retired=True))
    assert store.find(name="arm").retired
    entry = store.resolve("b", "1", state("arm", 2), None, None).entry
    assert (entry.id, entry.retired) == (ULIDS[1], False)


def test_refused_lock_makes_nothing(store: LabStore) -> None:
    """Get-or-create whose lock is refused changes nothing."""
    cursor = store.changes(None, 1).cursor
    with pytest.raises(SessionRequiredError):
        store.resolve("a", "1", state("arm", 1), "no-session", Want())
    assert kinds(store, cursor) == []


def test_changes_count_once_in_order(store: LabStore) -> None:
    """A batch that is sent twice counts once, also in part; the mark says how far the lab has a host's changes."""
    first, second, third = state("arm", 1), state("arm", 1, metadata='{"a":1}'), state("leg", 1, metadata='{"a":1}')
    cursor = store.changes(None, 1).cursor
    assert batch(store, "a", 0, first, second).changed == 2
    again = batch(store, "a", 0, first, second, third)
    assert (again.changed, again.repeated, again.mark) == (1, 2, Mark(1, 3))
    assert kinds(store, cursor) == [("created", "arm"), ("metadata", "arm"), ("renamed", "leg")]
    assert store.mark("a") == Mark(1, 3)
    assert store.mark("b") is None


@pytest.mark.parametrize(("epoch", "after"), [(1, 3), (2, 2), (2, 0)])
def test_changes_that_do_not_follow_are_refused(store: LabStore, epoch: int, after: int) -> None:
    """A gap, and another numbering, are refused with what the lab has; nothing changes."""
    batch(store, "a", 0, state("arm", 1), state("leg", 2))
    with pytest.raises(OutOfOrderError) as refused:
        batch(store, "a", after, state("eye", 3), epoch=epoch)
    assert (refused.value.epoch, refused.value.revision) == (1, 2)
    assert store.mark("a") == Mark(1, 2)


def test_first_changes_of_a_host_follow_on_nothing(store: LabStore) -> None:
    """A host that the lab does not know begins with revision 0, or with a sync."""
    with pytest.raises(OutOfOrderError) as refused:
        batch(store, "a", 5, state("arm", 1))
    assert refused.value.epoch is None
    sync(store, "a", state("arm", 1), upto=5)
    assert batch(store, "a", 5, state("leg", 2)).mark == Mark(1, 6)


def test_sync_keeps_the_later_word(store: LabStore) -> None:
    """A sync takes in what is new and what changed later, and leaves what another host changed after that."""
    batch(store, "a", 0, state("arm", 1, at=1), state("arm 2", 1, at=9), state("leg", 2, at=1))
    done = sync(store, "b", state("arm", 1, at=5), state("leg", 2, at=5, retired=True), state("eye", 3))
    assert [(u.state.name, u.reason) for u in done.unapplied] == [("arm", "newer")]
    assert store.find(id=ULIDS[1]).name == "arm 2"
    assert store.find(name="leg").retired
    assert store.find(name="eye").id == ULIDS[3]


def test_sync_of_renames_goes_in_any_order(store: LabStore) -> None:
    """A host that has renamed components, each to the name that another one had, syncs them in any order and in pieces;
    nothing is left for a person to decide."""
    batch(store, "a", 0, state("arm", 1), state("leg", 2), state("eye", 3))
    moved = [state("leg", 1, at=1), state("eye", 2, at=1), state("ear", 3, at=1)]
    for word in moved:
        sync(store, "a", word, upto=None)
    assert {e.name: e.id for e in store.entries("", 9)} == {"leg": ULIDS[1], "eye": ULIDS[2], "ear": ULIDS[3]}
    assert store.about().conflicts == 0


def test_instant_that_has_not_come_counts_as_now(store: LabStore, clock: FakeClock) -> None:
    """A host whose clock is ahead does not have the last word for ever: a later one of another host stands."""
    batch(store, "a", 0, state("arm", 1, changed_at="2099-01-01T00:00:00.000000Z"))
    clock.advance(1)
    now = iso(clock.wall())
    sync(store, "b", state("arm", 1, retired=True, changed_at=now))
    assert (store.find(name="arm").retired, store.find(name="arm").changed_at) == (True, now)


def test_sync_goes_in_though_the_clock_of_the_lab_is_behind(store: LabStore, clock: FakeClock) -> None:
    """The later of two words stands, also where the lab believes that neither has been said yet."""
    batch(store, "a", 0, state("arm", 1, at=1))
    clock.jump(-1e9)
    assert sync(store, "b", state("arm", 1, at=2, retired=True)).unapplied == ()
    assert store.find(name="arm").retired


def test_sync_that_comes_late_does_not_set_the_mark_back(store: LabStore) -> None:
    """A piece of a sync leaves the mark; its last one sets it, never back within an epoch."""
    sync(store, "a", state("arm", 1), upto=None)
    assert store.mark("a") is None
    sync(store, "a", upto=50)
    sync(store, "a", upto=20)
    assert store.mark("a") == Mark(1, 50)


def test_rename_moves_the_ulid_and_the_old_name_says_where_to(store: LabStore) -> None:
    """After a rename the ULID is under the new name, the old one says where it went, and may be used anew."""
    batch(store, "a", 0, state("arm", 1), state("right arm", 1), state("left arm", 1))
    assert store.find(id=ULIDS[1]).name == "left arm"
    with pytest.raises(NotFoundError) as absent:
        store.find(name="arm")
    assert absent.value.renamed_to == "left arm"
    assert store.resolve("b", "1", state("arm", 2), None, None).is_new


def test_entries_are_paged_by_name(store: LabStore) -> None:
    """Pages in the order of names hold every entry once, or those of one type."""
    names = ["zeta", "alpha", "Ärm", "a/b", "m"]
    for n, name in enumerate(names):
        store.resolve("a", str(n), state(name, n, component_type="node" if n % 2 else "module"), None, None)
    found: list[str] = []
    while page := store.entries(found[-1] if found else "", 2):
        found += [entry.name for entry in page]
    assert found == sorted(names)
    assert [e.name for e in store.entries("", 9, "node")] == ["a/b", "alpha"]


# conflicts


def test_two_ulids_of_one_name_are_both_known(store: LabStore) -> None:
    """A name that two hosts made apart keeps the lab's ULID; the other one is found too, and the conflict is recorded
    once, with what that host said."""
    batch(store, "a", 0, state("arm", 1))
    for after in (0, 1):
        done = batch(store, "b", after, state("arm", 2, metadata='{"rack":7}'))
        assert [(u.reason, u.preferred) for u in done.unapplied] == [("two_ids", ULIDS[1])]
    entry = store.find(id=ULIDS[2])
    assert (entry.name, entry.id, entry.other_ids) == ("arm", ULIDS[1], (ULIDS[2],))
    (conflict,) = store.conflicts(decided=False, after=("", ""), limit=10)
    assert (conflict.id, conflict.host, conflict.state.metadata) == (ULIDS[2], "b", '{"rack":7}')
    assert conflict.entry == entry
    assert store.about().conflicts == 1


def test_merge_prefers_one_and_keeps_both(store: LabStore) -> None:
    """A person's decision changes the ULID of the name, keeps both known, and can be taken back."""
    batch(store, "a", 0, state("arm", 1, metadata='{"of":"a"}'))
    batch(store, "b", 0, state("arm", 2, metadata='{"of":"b"}'))
    for n, other, metadata in ((2, 1, '{"of":"b"}'), (1, 2, '{"of":"a"}'), (2, 1, '{"of":"b"}')):
        entry = store.merge("a", "arm", ULIDS[n])
        assert (entry.id, entry.other_ids, entry.metadata) == (ULIDS[n], (ULIDS[other],), metadata)
        assert store.find(id=ULIDS[other]).id == ULIDS[n]
    assert store.conflicts(decided=False, after=("", ""), limit=10) == []
    decided = store.conflicts(decided=True, after=("", ""), limit=10)
    assert {c.id for c in decided} == {ULIDS[1], ULIDS[2]}
    assert all(c.decided_at for c in decided)
    with pytest.raises(NotFoundError):
        store.merge("a", "arm", ULIDS[3])


def test_rename_to_a_taken_name_is_a_conflict_that_a_merge_decides(store: LabStore) -> None:
    """A rename to a name that another component has changes nothing; merged, both are one component."""
    batch(store, "a", 0, state("arm", 1), state("leg", 2))
    for _ in range(2):
        assert sync(store, "b", state("leg", 1, at=1)).unapplied[0].reason == "name_taken"
    assert store.find(name="arm").id == ULIDS[1]
    assert [e.kind for e in store.history("leg", 0, 9)] == ["created", "conflict"]
    assert store.merge("b", "leg", ULIDS[1]).id == ULIDS[1]
    assert store.find(id=ULIDS[2]).id == ULIDS[1]
    with pytest.raises(NotFoundError) as absent:
        store.find(name="arm")
    assert absent.value.renamed_to == "leg"


def test_conflict_goes_along_with_a_rename(store: LabStore) -> None:
    """Where a component with an undecided ULID is renamed, that is decided under its new name."""
    batch(store, "a", 0, state("arm", 1))
    batch(store, "b", 0, state("arm", 2))
    batch(store, "a", 1, state("leg", 1))
    (conflict,) = store.conflicts(decided=False, after=("", ""), limit=9)
    assert (conflict.name, conflict.id, conflict.entry and conflict.entry.id) == ("leg", ULIDS[2], ULIDS[1])
    assert store.merge("a", "leg", ULIDS[2]).other_ids == (ULIDS[1],)
    assert store.find(name="leg").id == ULIDS[2]
    assert store.about().conflicts == 0


def test_conflict_ends_by_giving_one_its_own_name(store: LabStore) -> None:
    """A component of a conflict that its host renames is a component of its own, and nothing is left to decide."""
    batch(store, "a", 0, state("arm", 1))
    batch(store, "b", 0, state("arm", 2), state("arm of b", 2))
    assert store.find(id=ULIDS[2]).name == "arm of b"
    assert store.find(name="arm").other_ids == ()
    assert store.about().conflicts == 0


def test_other_type_is_a_conflict(store: LabStore) -> None:
    """A component that another host has with another type keeps the lab's, and the difference is recorded; once it was
    decided, the same word does not bring it back."""
    batch(store, "a", 0, state("arm", 1))
    for _ in range(2):
        assert sync(store, "b", state("arm", 1, component_type="module")).unapplied[0].reason == "wrong_type"
    assert store.find(name="arm").component_type == "node"
    assert store.about().conflicts == 1
    store.merge("a", "arm", ULIDS[1])
    sync(store, "b", state("arm", 1, component_type="module"))
    assert store.about().conflicts == 0
    sync(store, "b", state("arm", 1, component_type="workcell"))
    assert store.about().conflicts == 1
    assert [e.kind for e in store.history("arm", 0, 9)] == ["created", "conflict", "merged", "conflict"]


def test_merge_does_not_take_the_name_of_a_holder(store: LabStore) -> None:
    """A component that would lose its name while it is held under it is not merged."""
    host = Host(store, "a")
    batch(store, "a", 0, state("arm", 1), state("leg", 2))
    batch(store, "b", 0, state("leg", 1))
    host.lock("arm")
    with pytest.raises(HeldError):
        store.merge("b", "leg", ULIDS[2])
    assert store.find(name="arm").id == ULIDS[1]


# locks and terms


def test_held_name_is_refused_to_another_host(store: LabStore) -> None:
    """A name that a host holds is refused to another one, which is told by whom; the same one has the same lock."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1)
    lock = a.lock("arm")
    assert a.lock("arm") == lock
    with pytest.raises(HeldInLabError) as held:
        b.lock("arm")
    assert (held.value.host, held.value.term) == ("a", lock.term)
    assert a.release("arm", lock.term)
    assert b.lock("arm").term > lock.term


def test_release_compares_the_term(store: LabStore) -> None:
    """A lock is given back by its own term and session only; a repeat does nothing."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1)
    term = a.lock("arm").term
    assert not a.release("arm", term + 1)
    assert not b.release("arm", term)
    assert a.release("arm", term)
    assert not a.release("arm", term)


def test_many_locks_are_taken_and_given_back_at_once(store: LabStore) -> None:
    """Several names are locked at once, each with its own answer, and given back at once."""
    a, b = Host(store, "a"), Host(store, "b")
    for n, name in enumerate(("arm", "leg", "eye")):
        a.resolve(name, n)
    b.lock("leg")
    answers = store.acquire("a", a.session.id, [(name, Want()) for name in ("arm", "leg", "none", "eye", "arm")])
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["Lock", "HeldInLabError", "NotFoundError", "Lock", "Lock"]
    assert answers[0] == answers[4]
    assert store.release("a", a.session.id, {"arm": None, "leg": None, "eye": 1}) == ["arm"]


def test_unknown_name_is_not_locked(store: LabStore) -> None:
    """A name without an entry has no lock."""
    with pytest.raises(NotFoundError):
        Host(store, "a").lock("arm")


def test_terms_only_grow(stores: Stores) -> None:
    """Terms of a name grow over hosts, new sessions, restarts, and are above the epoch and what a host proposes."""
    store = stores.open()
    Host(store, "a").resolve("arm", 1)
    first = store.about().epoch
    terms = []
    for n in range(3):
        for name in ("a", "b"):
            host = Host(store, name)
            terms.append(host.lock("arm", proposal=n * 2 * 10**9).term)
            host.release("arm", terms[-1])
        terms.append(Host(store, "a").lock("arm").term)  # a boot: its session is new
        stores.close()
        store = stores.open()
        store.end("a", store.sessions()[0].id)
    assert terms == sorted(set(terms))
    assert terms[0] == first + 1
    assert terms[3] == 2 * 10**9 + 1


def test_terms_grow_though_the_store_was_set_back(stores: Stores, clock: FakeClock) -> None:
    """What a store gives after it was set back to a backup is above all that it had given, though it has forgotten
    that."""
    store = stores.open()
    a = Host(store, "a")
    a.resolve("arm", 1)
    a.release("arm", a.lock("arm").term)
    stores.close()
    stores.back_up()
    clock.advance(60)
    forgotten = Host(stores.open(), "b").lock("arm", proposal=77).term
    stores.close()
    stores.restore()
    clock.advance(60)
    assert Host(stores.open(), "c").lock("arm").term > forgotten


def test_terms_end_below_their_limit(store: LabStore) -> None:
    """A term never reaches its limit: the lock is refused instead."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1)
    assert a.lock("arm", term=TERM_LIMIT - 1).term == TERM_LIMIT - 1
    a.release("arm", None)
    with pytest.raises(ConflictError):
        b.lock("arm")


def test_host_that_was_cut_off_goes_on_with_its_term(store: LabStore, clock: FakeClock) -> None:
    """Who comes back after its lease has the same term for a name that nobody took, and is refused what was given away,
    also when that is free again."""
    a, b = Host(store, "a"), Host(store, "b")
    for n, name in enumerate(("arm", "leg", "eye")):
        a.resolve(name, n)
    terms = {name: a.lock(name).term for name in ("arm", "leg", "eye")}
    assert pass_time(store, clock, LEASE_S, living=(b,)) == 1
    taken = b.lock("leg")
    b.release("eye", b.lock("eye").term)
    with pytest.raises(SessionRequiredError):
        a.keep()
    again = Host(store, "a")
    assert again.lock("arm", term=terms["arm"]).term == terms["arm"]
    with pytest.raises(HeldInLabError):
        again.lock("leg", term=terms["leg"])
    with pytest.raises(GivenAwayError) as lost:
        again.lock("eye", term=terms["eye"])
    assert (lost.value.host, lost.value.term) == ("b", terms["eye"] + 1)
    with pytest.raises(GivenAwayError):
        again.lock("eye", term=terms["eye"] + 1)  # the right term, of another host
    assert store.given(["arm", "leg", "none"]) == {"arm": (terms["arm"], "a"), "leg": (taken.term, "b")}


def test_new_session_without_holders_has_a_new_term(store: LabStore) -> None:
    """The same host that takes a name again after a boot has a higher term."""
    a = Host(store, "a")
    a.resolve("arm", 1)
    term = a.lock("arm").term
    assert Host(store, "a").lock("arm").term == term + 1


def test_rename_moves_the_lock(store: LabStore) -> None:
    """A held name that its own host renames is held under the new name, whose terms still grow."""
    a, b = Host(store, "a"), Host(store, "b")
    batch(store, "b", 0, state("leg", 1))
    for _ in range(5):
        b.release("leg", b.lock("leg").term)
    batch(store, "b", 1, state("leg 2", 1))
    batch(store, "a", 0, state("arm", 2))
    a.lock("arm")
    batch(store, "a", 1, state("leg", 2))
    (lock,) = store.locks(a.session.id)
    assert (lock.name, lock.term) == ("leg", store.about().epoch + 6)
    with pytest.raises(HeldInLabError):
        b.lock("leg")


def test_rename_of_what_another_host_holds_is_a_conflict(store: LabStore) -> None:
    """A component that another host holds keeps its name in the lab, and the rename is recorded."""
    a = Host(store, "a")
    a.resolve("arm", 1)
    a.lock("arm")
    assert batch(store, "b", 0, state("leg", 1)).unapplied[0].reason == "held"
    assert store.find(id=ULIDS[1]).name == "arm"
    with pytest.raises(HeldError):
        store.merge("b", "leg", ULIDS[1])
    a.release("arm", None)
    assert store.merge("b", "leg", ULIDS[1]).name == "leg"


def test_one_of_many_hosts_has_a_lock(store: LabStore) -> None:
    """Ten hosts that take and release three names at random never hold one at once, and no term comes twice."""
    hosts = [Host(store, f"host-{n}") for n in range(10)]
    names = ["arm", "leg", "eye"]
    for n, name in enumerate(names):
        hosts[0].resolve(name, n)
    holders: dict[str, list[str]] = {name: [] for name in names}
    grants: list[tuple[str, int]] = []
    faults: list[str] = []

    def work(host: Host) -> None:
        for n in range(30):
            name = names[n % 3]
            try:
                lock = host.lock(name)
            except HeldInLabError:
                continue
            holders[name].append(host.name)
            if len(holders[name]) != 1:
                faults.append(name)
            grants.append((name, lock.term))
            holders[name].remove(host.name)
            host.release(name, lock.term)

    with ThreadPoolExecutor(10) as pool:
        [*pool.map(work, hosts)]
    assert not faults
    assert len(set(grants)) == len(grants) > 10


# sessions


def test_silent_host_loses_its_locks_after_its_lease(store: LabStore, clock: FakeClock) -> None:
    """A host that is silent for its lease has lost its session and its locks, and not before; one that is heard keeps
    them."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1), a.resolve("leg", 2)
    a.lock("arm"), b.lock("leg")
    assert pass_time(store, clock, LEASE_S - 1, living=(b,)) == 0
    with pytest.raises(HeldInLabError):
        b.lock("arm")
    assert pass_time(store, clock, 1, living=(b,)) == 1
    b.lock("arm")
    assert [s.host for s in store.sessions()] == ["b"]
    for call in (a.keep, lambda: a.lock("leg")):
        with pytest.raises(SessionRequiredError):
            call()


def test_due_session_is_ended_by_who_wants_its_lock(store: LabStore, clock: FakeClock) -> None:
    """A lock whose host is overdue is given away without waiting for the next look."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1)
    a.lock("arm")
    pass_time(store, clock, LEASE_S - 1, living=(b,))
    clock.advance(1)
    assert b.lock("arm").host == "b"


def test_wall_clock_ends_no_lease(store: LabStore, clock: FakeClock) -> None:
    """A wall clock that jumps ends no session."""
    Host(store, "a")
    clock.jump(1e6)
    assert store.expire() == 0
    clock.jump(-2e6)
    assert store.expire() == 0


def test_lab_that_stood_still_gives_every_host_its_lease_anew(store: LabStore, clock: FakeClock) -> None:
    """Nobody loses a lock because the lab itself was paused: keepalives of that time were never read."""
    Host(store, "a")
    clock.advance(3600)
    assert store.expire() == 0
    assert pass_time(store, clock, LEASE_S - 1) == 0
    assert pass_time(store, clock, 1) == 1


def test_restart_gives_every_host_its_lease_anew(stores: Stores, clock: FakeClock) -> None:
    """After a restart of the lab all sessions and locks are there, each with its full lease, and no longer."""
    store = stores.open()
    a, _ = Host(store, "a"), Host(store, "silent")
    a.resolve("arm", 1)
    lock = a.lock("arm")
    stores.close()
    clock.advance(100)
    a.store = stores.open()
    assert pass_time(a.store, clock, LEASE_S - 1) == 0
    assert a.keep().locks == 1
    assert a.lock("arm") == lock
    assert pass_time(a.store, clock, 1) == 1
    assert [s.host for s in a.store.sessions()] == ["a"]


def test_session_is_its_hosts_alone(store: LabStore) -> None:
    """Nobody keeps, ends or uses the session of another host, or of another boot of the same."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1)
    assert not store.end("b", a.session.id)
    calls: list[Callable[[], Any]] = [
        lambda: store.keep("b", a.session.id, a.boot),
        lambda: store.keep("a", a.session.id, "boot-2"),
    ]
    for call in calls:
        with pytest.raises(SessionRequiredError):
            call()
    (refused,) = store.acquire("b", a.session.id, [("arm", Want())])
    assert isinstance(refused, SessionRequiredError)
    assert b.lock("arm").host == "b"


def test_copy_of_a_host_is_refused_while_it_lives(store: LabStore, clock: FakeClock) -> None:
    """A host that lives with one boot is not replaced by the same name with another one; when its lease is over, it
    is."""
    Host(store, "a", "boot-1")
    with pytest.raises(ConflictError):
        Host(store, "a", "boot-2")
    assert pass_time(store, clock, LEASE_S) == 1
    Host(store, "a", "boot-2")


def test_new_session_of_a_host_ends_its_old_one(store: LabStore) -> None:
    """A host that registers again has one session, and the locks of the old one are free."""
    a, b = Host(store, "a"), Host(store, "b")
    a.resolve("arm", 1)
    a.lock("arm")
    Host(store, "a")
    assert [s.host for s in store.sessions()] == ["a", "b"]
    assert b.lock("arm").host == "b"


# feed and history


def test_feed_tells_every_change_once_in_order(store: LabStore) -> None:
    """A reader that goes on from cursor to cursor sees every change once, in order, while others write."""
    cursor = start = store.changes(None, 1).cursor
    seen: list[Event] = []
    over = threading.Event()

    def write(n: int) -> None:
        for k in range(25):
            store.resolve(f"host-{n}", str(k), state(f"name-{n}-{k}", n * 25 + k), None, None)

    def read() -> None:
        nonlocal cursor
        while True:
            last = over.is_set()
            page = store.changes(cursor, 7)
            seen.extend(page.events)
            cursor = page.cursor
            if last and not page.events:
                return

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        [*pool.map(write, range(4))]
        over.set()
        reader.result(60)
    assert len({e.name for e in seen}) == len(seen) == 100
    cursor = start
    again: list[Event] = []
    while (page := store.changes(cursor, 7)).events:
        again += page.events
        cursor = page.cursor
    assert again == seen
    assert [e.revision for e in seen] == sorted(e.revision for e in seen)


def test_cursor_goes_on_after_a_restart(stores: Stores) -> None:
    """A cursor from before a restart goes on after it, without a gap."""
    store = stores.open()
    store.resolve("a", "1", state("arm", 1), None, None)
    cursor = store.changes(None, 1).cursor
    store.resolve("a", "2", state("leg", 2), None, None)
    stores.close()
    store = stores.open()
    store.resolve("a", "3", state("eye", 3), None, None)
    assert kinds(store, cursor) == [("created", "leg"), ("created", "eye")]


def test_cursor_of_a_store_that_was_set_back_is_refused(stores: Stores, clock: FakeClock) -> None:
    """A cursor that is newer than a restored backup is refused, however far the store has gone on; one from before the
    backup goes on."""
    store = stores.open()
    store.resolve("a", "1", state("arm", 1), None, None)
    old = store.changes(None, 1).cursor
    stores.close()
    stores.back_up()
    clock.advance(60)
    store = stores.open()
    restarted = store.changes(None, 1).cursor
    store.resolve("a", "2", state("leg", 2), None, None)
    newer = store.changes(None, 1).cursor
    stores.close()
    stores.restore()
    clock.advance(60)
    store = stores.open()
    for n in range(5):
        store.resolve("b", str(n), state(f"name-{n}", 10 + n), None, None)
    for cursor in (newer, restarted):
        with pytest.raises(CompactedError):
            store.changes(cursor, 10)
    assert len(kinds(store, old)) == 5


@pytest.mark.parametrize("cursor", ["", "x", "1", "1.", ".1", "1.2.3", "-1.0", "1.-1", "\u0661.\u0662"])
def test_what_is_no_cursor_is_invalid(store: LabStore, cursor: str) -> None:
    """Text that no lab gave as a cursor is refused as such."""
    with pytest.raises(InvalidError):
        store.changes(cursor, 1)


def test_cursor_of_the_future_is_refused(store: LabStore) -> None:
    """A cursor beyond the last change is of another store."""
    epoch = store.about().epoch
    for cursor in (f"{epoch}.1", f"{epoch + 1}.0", "0.0"):
        with pytest.raises(CompactedError):
            store.changes(cursor, 1)


def test_change_calls_back_and_reading_does_not(store: LabStore) -> None:
    """Whoever wants to hear of changes is called for each, not for what is read or refused."""
    calls: list[int] = []
    store.on_change(lambda: calls.append(1))
    store.resolve("a", "1", state("arm", 1), None, None)
    until(lambda: len(calls) == 1)
    store.resolve("a", "1", state("arm", 1), None, None)
    store.find(name="arm")
    store.expire()
    with pytest.raises(RegistryError):
        store.find(name="leg")
    assert len(calls) == 1


def test_history_follows_the_component_over_its_names(store: LabStore) -> None:
    """History tells all of a name and its component: earlier names, other ULIDs, locks; page by page."""
    host = Host(store, "a")
    batch(store, "a", 0, state("arm", 1), state("leg", 1), state("leg", 1, retired=True), state("leg", 1))
    batch(store, "b", 0, state("leg", 2))
    host.release("leg", host.lock("leg").term)
    told = ["created", "renamed", "retired", "revived", "conflict", "granted", "released"]
    found = store.history("leg", 0, 100)
    assert [e.kind for e in found] == told
    assert found[1].why == {"was": "arm"}
    first = store.history("leg", 0, 3)
    assert [*first, *store.history("leg", first[-1].revision, 100)] == found


def test_acknowledged_changes_survive_a_restart(stores: Stores) -> None:
    """Entries, other ULIDs, conflicts, marks and terms are the same after a restart."""
    store = stores.open()
    host = Host(store, "a")
    batch(store, "a", 0, state("arm", 1), state("leg", 2, metadata='{"a":[1,2]}'))
    batch(store, "b", 0, state("arm", 3))
    host.lock("arm", proposal=41)

    def all_of(store: LabStore) -> tuple[object, ...]:
        conflicts = store.conflicts(decided=True, after=("", ""), limit=9)
        return store.entries("", 9), conflicts, store.mark("a"), store.mark("b"), store.sessions()

    before = all_of(store)
    stores.close()
    assert all_of(stores.open()) == before
