"""What a lab's store on etcd promises besides the suite of all stores: replicas, lost answers, compaction, restores."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import etcd
from etcd import Cluster
from helpers import FakeClock, until
from lab_proxy import LabProxy, Mode
from lab_stores import LEASE_S, ULIDS, Host, state
from madsci_registry.errors import CompactedError, NotFoundError, SessionRequiredError, UnavailableError
from madsci_registry_lab import etcd_feed, etcd_reaper
from madsci_registry_lab.etcd_access import parse
from madsci_registry_lab.etcd_store import EtcdStore
from madsci_registry_lab.etcd_wire import Done, Put, Txn
from madsci_registry_lab.faults import Fault
from madsci_registry_lab.store import Change, Event, GivenAwayError, LabStore, Mark, Want

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)


def all_events(store: LabStore, cursor: str, limit: int = 7) -> list[Event]:
    """Read the feed to its end."""
    found: list[Event] = []
    while (page := store.changes(cursor, limit)).events:
        found += page.events
        cursor = page.cursor
    return found


def test_feed_goes_on_at_another_replica(replica: Callable[[], EtcdStore]) -> None:
    """A reader that changes the replica with each page sees every change of all replicas once, in order."""
    stores = [replica() for _ in range(3)]
    cursor = start = stores[0].changes(None, 1).cursor

    def write(n: int) -> None:
        host = Host(stores[n], f"host-{n}")
        for k in range(20):
            host.resolve(f"name-{n}-{k}", n * 20 + k)
            host.release(f"name-{n}-{k}", host.lock(f"name-{n}-{k}").term)

    events = 3 * (1 + 20 * 3)
    seen: list[Event] = []
    with ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(write, n) for n in range(3)]
        while len(seen) < events:
            page = random.choice(stores).changes(cursor, random.randint(1, 9))
            seen += page.events
            cursor = page.cursor
        for done in writing:
            done.result()
    assert [event.revision for event in seen] == sorted({event.revision for event in seen})
    for store in (*stores, replica()):
        assert all_events(store, start) == seen


def test_cursor_of_one_replica_is_known_to_another(replica: Callable[[], EtcdStore]) -> None:
    """A cursor that a replica has just given is good at each other one, also that of a replica which starts later."""
    first, second = replica(), replica()
    for n in range(20):
        before = second.changes(None, 1).cursor
        first.resolve("a", str(n), state(f"name-{n}", n), None, None)
        told = until(lambda before=before: second.changes(before, 9).events)  # type: ignore[misc] # bound
        assert [e.name for e in told] == [f"name-{n}"]
        third = replica() if n % 5 == 0 else first
        assert second.changes(third.changes(None, 1).cursor, 9).events == ()


def test_session_that_another_replica_hears_is_not_ended(replica: Callable[[], EtcdStore], clock: FakeClock) -> None:
    """A host that sends its keepalives to one replica lives for all of them; a silent one is ended once."""
    here, there = replica(), replica()
    host, _ = Host(here, "a"), Host(here, "silent")
    ended = 0
    for _ in range(int(LEASE_S) + 2):
        clock.advance(1)
        host.keep()
        ended += there.expire()
        ended += here.expire()
    assert ended == 1
    assert [s.host for s in there.sessions()] == ["a"]


def test_replica_that_looks_late_ends_nobody(replica: Callable[[], EtcdStore], clock: FakeClock) -> None:
    """A replica that saw nothing of a host for its lease, because it was paused, does not end it."""
    here, there = replica(), replica()
    host = Host(here, "a")
    there.expire()
    for _ in range(int(LEASE_S) + 1):
        clock.advance(1)
        host.keep()
        assert there._reaper.end_due() == 0  # without a look: it does not know of the keepalives
    assert host.keep().id == host.session.id


def test_failed_look_begins_every_lease_anew(etcd_url: str, clock: FakeClock) -> None:
    """Where etcd did not answer, nobody loses a session for the time of that."""
    with LabProxy(_port(etcd_url)) as proxy, closing(_behind(proxy, etcd_url, clock, alone=True, total_s=0.3)) as store:
        Host(store, "a")
        for _ in range(int(LEASE_S) - 1):
            clock.advance(1)
            assert store.expire() == 0
        proxy.mode = "refuse"
        with pytest.raises(UnavailableError):
            store.expire()
        proxy.mode = "pass"
        ended = []
        for _ in range(int(LEASE_S) + 1):
            ended.append(store.expire())
            clock.advance(1)
        assert ended == [0] * int(LEASE_S) + [1]


def test_locks_of_an_ended_session_are_free_at_once_and_told_once(
    replica: Callable[[], EtcdStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session ends with all its locks at once; what is left of them is cleared by any replica, each release told
    once."""
    here, there = replica(), replica()
    a, b = Host(here, "a"), Host(there, "b")
    names = [f"name-{n}" for n in range(60)]
    for n, name in enumerate(names):
        a.resolve(name, n)
    assert len(here.acquire("a", a.session.id, [(name, Want()) for name in names])) == 60
    cursor = there.changes(None, 1).cursor
    with monkeypatch.context() as patched:
        patched.setattr(etcd_reaper.Reaper, "clear", lambda *_: None)  # it dies just after the end of the session
        assert here.end("a", a.session.id)
    assert there.locks(a.session.id) == []
    assert there.entries("", 100)[0].lock is None
    assert there.find(name="name-0").lock is None
    assert b.lock("name-0").host == "b"
    there.expire()
    kinds = [(e.kind, e.name) for e in all_events(there, cursor, 1000)]
    assert sorted(name for kind, name in kinds if kind == "released" and name) == sorted(names)
    assert kinds[0] == ("ended", None)
    assert kinds[1:3] == [("released", "name-0"), ("granted", "name-0")]
    assert there.about().locks == 1


@pytest.mark.parametrize("mode", ["drop", "mute", "cut"])
def test_change_whose_answer_was_lost_counts_once(
    etcd_url: str, clock: FakeClock, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that took effect, though its answer never came, is repeated and answered as it was done: made once, by
    this request, granted once, released, and told once."""
    with LabProxy(_port(etcd_url)) as proxy, closing(_behind(proxy, etcd_url, clock)) as store:
        cursor, gateway, lost = store.changes(None, 1).cursor, store._gateway, list[Txn]()
        plain = gateway.txn

        def losing(request: Txn) -> Done:
            if any(isinstance(op, Put) for op in request.then):
                gateway._turn = 0  # the proxy's, which passes it on and loses the answer
                lost.append(request)
            return plain(request)

        monkeypatch.setattr(gateway, "txn", losing)
        proxy.mode = mode
        assert store.resolve("a", "1", state("arm", 1), None, None).is_new
        host = Host(store, "a")
        lock = host.lock("arm")
        assert host.keep().locks == 1
        assert host.release("arm", lock.term)
        assert store.apply("a", 1, 0, 1, [Change(1, state("leg", 1))]).changed == 1
        assert store.mark("a") == Mark(1, 1)
        assert [e.kind for e in all_events(store, cursor)] == [
            "created",
            "registered",
            "granted",
            "released",
            "renamed",
        ]
        assert len(lost) == 6


def test_batch_that_ends_in_the_middle_goes_on_where_it_was(etcd_url: str, clock: FakeClock) -> None:
    """Of a batch that etcd answered in part, each change counts once when it is sent again."""
    changes = [Change(n + 1, state(f"name-{n}", n)) for n in range(90)]
    with LabProxy(_port(etcd_url)) as proxy, closing(_behind(proxy, etcd_url, clock, alone=True, total_s=0.5)) as store:
        cursor = store.changes(None, 1).cursor
        before = proxy.requests["POST /v3/kv/txn"]
        cutter = threading.Thread(target=_cut_after, args=(proxy, before + 5))
        cutter.start()
        with pytest.raises(UnavailableError):
            store.apply("a", 1, 0, 90, changes)
        cutter.join()
        proxy.mode = "pass"
        mark = store.mark("a")
        assert mark is not None and 0 < mark.revision < 90
        done = store.apply("a", 1, 0, 90, changes)
        assert (done.repeated, done.changed) == (mark.revision, 90 - mark.revision)
        until(lambda: len(all_events(store, cursor)) == 90)


def test_compacted_changes_are_told_as_such(tmp_path: Path, clock: FakeClock) -> None:
    """A cursor from before etcd's compaction is refused by a replica that has not seen those changes, and goes on at
    one that has; the list is whole."""
    with Cluster(tmp_path) as cluster, closing(EtcdStore(parse(cluster.url), clock)) as old:
        start = old.changes(None, 1).cursor
        for n in range(10):
            old.resolve("a", str(n), state(f"name-{n}", n), None, None)
        middle = old.changes(None, 1).cursor
        cluster.control("compact", str(int(middle.partition(".")[2]) // 128))
        with closing(EtcdStore(parse(cluster.url), clock)) as new:
            with pytest.raises(CompactedError):
                new.changes(start, 10)
            assert new.changes(middle, 10).events == ()
            assert len(new.entries("", 100)) == 10
            assert len(old.changes(start, 10).events) == 10
            new.resolve("b", "1", state("leg", 50), None, None)
            assert [e.name for e in new.changes(middle, 10).events] == ["leg"]


def test_feed_keeps_so_many_events(replica: Callable[[], EtcdStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is older than the events that a replica keeps is compacted, never left out."""
    monkeypatch.setattr(etcd_feed, "KEPT_EVENTS", 20)
    store = replica()
    cursors = [store.changes(None, 1).cursor]
    for n in range(60):
        store.resolve("a", str(n), state(f"name-{n}", n), None, None)
        cursors.append(store.changes(None, 1).cursor)
    told: list[int] = []
    for n, cursor in enumerate(cursors):
        try:
            found = [e.name for e in store.changes(cursor, 100).events]
        except CompactedError:
            told.append(n)
        else:
            assert found == [f"name-{k}" for k in range(n, 60)]
    assert told == [*range(len(told))]
    assert 60 - len(told) >= 20


def test_passing_events_are_trimmed_and_lasting_ones_stay(
    replica: Callable[[], EtcdStore], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of locks and hosts beyond those that are kept are trimmed, oldest first; identities keep their history."""
    store = replica()
    host = Host(store, "a")
    host.resolve("arm", 1)
    for _ in range(10):
        host.release("arm", host.lock("arm").term)
    last = store.history("arm", 0, 100)[-4:]
    monkeypatch.setattr(etcd_reaper, "KEPT_EVENTS", 4)
    clock.advance(4)
    host.keep()
    clock.advance(etcd_reaper.TRIM_EACH_S)
    store.expire()
    assert store.history("arm", 0, 1)[0].kind == "created"
    assert [e for e in store.history("arm", 0, 100) if e.kind != "created"][-3:] == last[-3:]
    assert len(store.history("arm", 0, 100)) <= 5


def test_history_is_paged_within_one_transaction(replica: Callable[[], EtcdStore]) -> None:
    """Events of one transaction are told apart: pages of one event each are the whole history."""
    store = replica()
    host = Host(store, "a")
    store.apply("a", 1, 0, 3, [Change(n, state(name, 1)) for n, name in enumerate(("arm", "leg", "eye"), 1)])
    host.lock("eye")
    store.apply("a", 1, 3, 4, [Change(4, state("ear", 1))])
    whole = store.history("ear", 0, 100)
    assert [e.kind for e in whole] == ["created", "renamed", "renamed", "granted", "moved", "renamed"]
    paged: list[Event] = []
    while page := store.history("ear", paged[-1].revision if paged else 0, 1):
        paged += page
    assert paged == whole


def test_store_that_is_set_back_under_a_replica_needs_a_new_start(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that finds its store older than it was says so, at the second look."""
    with Cluster(tmp_path) as cluster:
        with closing(EtcdStore(parse(cluster.url), clock)) as store:
            store.expire()
            assert store.broken == ""
            monkeypatch.setattr(store._reaper, "_revision", 1 << 40)
            store.expire()
            assert store.broken == ""
            store.expire()
            assert "set back" in store.broken


def test_term_of_a_host_that_another_replica_gave_away_is_refused(replica: Callable[[], EtcdStore]) -> None:
    """Terms are one sequence over all replicas."""
    here, there = replica(), replica()
    a, b = Host(here, "a"), Host(there, "b")
    a.resolve("arm", 1)
    term = a.lock("arm").term
    a.release("arm", term)
    given = b.lock("arm").term
    assert given > term
    b.release("arm", given)
    with pytest.raises(GivenAwayError):
        a.lock("arm", term=term)


def test_component_of_many_ulids_is_renamed_whole(replica: Callable[[], EtcdStore]) -> None:
    """A component that eighty hosts made apart keeps all its ULIDs through a rename, though etcd takes but so many
    operations."""
    store = replica()
    store.apply("a", 1, 0, 1, [Change(1, state("arm", 0))])
    for n in range(1, 81):
        store.apply(f"host-{n}", 1, 0, 1, [Change(1, state("arm", n))])
    store.apply("a", 1, 1, 2, [Change(2, state("leg", 0))])
    assert set(store.find(name="leg").other_ids) == set(ULIDS[1:81])
    assert {store.find(id=ULIDS[n]).name for n in range(81)} == {"leg"}
    assert store.about().conflicts == 80


def test_session_ended_elsewhere_is_not_kept(replica: Callable[[], EtcdStore]) -> None:
    """A replica that remembers a session does not keep it once another one has ended it."""
    here, there = replica(), replica()
    host = Host(here, "a")
    host.keep()
    assert there.end("a", host.session.id)
    with pytest.raises(SessionRequiredError):
        host.keep()
    with pytest.raises(NotFoundError):
        here.find(name="none")


def test_etcd_that_does_not_answer_is_a_fault_at_the_start(clock: FakeClock) -> None:
    """Without an etcd a lab registry does not start, and says so."""
    (port,) = etcd.free_ports(1)
    with pytest.raises(Fault, match="does not answer"):
        EtcdStore(parse(f"etcd://127.0.0.1:{port}"), clock, total_s=0.3)


def _port(etcd_url: str) -> int:
    return int(etcd_url.rpartition("/")[0].rpartition(":")[2])


def _behind(
    proxy: LabProxy, etcd_url: str, clock: FakeClock, *, alone: bool = False, total_s: float = 8.0
) -> EtcdStore:
    """Open a store that asks by the proxy first and, not `alone`, the member itself next; watches go past the proxy."""
    store = EtcdStore(parse(etcd_url.replace("etcd://", f"etcd://127.0.0.1:{proxy.port},")), clock, total_s=total_s)
    if alone:
        access = store._gateway.access
        store._gateway.access = replace(access, endpoints=access.endpoints[:1])
    return store


def _cut_after(proxy: LabProxy, count: int) -> None:
    until(lambda: proxy.requests["POST /v3/kv/txn"] >= count)
    proxy.mode = "refuse"
