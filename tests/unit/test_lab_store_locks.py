"""What every store of a lab promises of locks, terms and sessions: over each of them, with a clock to turn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from helpers import FakeClock
from lab_stores import LEASE_S, ULIDS, Host, Stores, batch, pass_time, state
from madsci_registry.errors import (
    ConflictError,
    HeldError,
    NotFoundError,
    SessionRequiredError,
)
from madsci_registry_lab.store import (
    TERM_LIMIT,
    GivenAwayError,
    HeldInLabError,
    LabStore,
    Want,
)

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
