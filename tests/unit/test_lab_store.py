"""What every store of a lab promises of names, ULIDs and conflicts: over each of them, with a clock to turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import FakeClock
from lab_stores import ULIDS, Host, batch, kinds, state, sync
from madsci_registry.errors import (
    ConflictError,
    HeldError,
    NotFoundError,
    SessionRequiredError,
    WrongTypeError,
)
from madsci_registry_lab.clock import iso
from madsci_registry_lab.store import (
    LabStore,
    Mark,
    OutOfOrderError,
    Want,
)

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
