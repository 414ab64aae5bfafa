"""What could go wrong in a lab on etcd: leases while etcd is full, quiet labs, foreign clusters, big conflicts."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import etcd
from etcd import Cluster
from helpers import FakeClock, until
from lab_stores import LEASE_S, Host, state
from madsci_registry.errors import CompactedError, NoSpaceError, UnavailableError
from madsci_registry_lab import etcd_gateway, etcd_reaper, etcd_store
from madsci_registry_lab.checking import check
from madsci_registry_lab.etcd_access import parse
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_store import EtcdStore
from madsci_registry_lab.etcd_wire import Delete, Done, Put, Range, Txn
from madsci_registry_lab.store import Change, State, Want

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)

_numbers = itertools.count()


# leases


def test_host_that_registers_among_others_and_dies_is_ended(replica: Callable[[], EtcdStore], clock: FakeClock) -> None:
    """A host whose registration was overtaken by another change at the same replica, and that is never heard again,
    loses its session after its lease."""
    store = replica()
    store._runner.revision = 1 << 40  # as if another thread's change had been answered just now
    Host(store, "a")
    clock.advance(4)
    assert store.expire() == 0
    for _ in range(int(LEASE_S)):
        clock.advance(1)
        store.expire()
    assert store.sessions() == []


def test_etcd_that_is_full_ends_no_host(
    replica: Callable[[], EtcdStore], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While etcd takes no writes, keepalives among them, though it answers reads, no lease runs out: once there is
    space again, hosts have a whole lease to be heard."""
    store = replica()
    host = Host(store, "a")
    plain = store._gateway.txn

    def full(request: Txn) -> Done:
        if any(isinstance(op, (Put, Delete)) for op in request.then):
            raise NoSpaceError("full")
        return plain(request)

    with monkeypatch.context() as patched:
        patched.setattr(store._gateway, "txn", full)
        for _ in range(int(LEASE_S) * 2):
            clock.advance(1)
            with pytest.raises(NoSpaceError):
                host.keep()
            try:
                store.expire()
            except NoSpaceError:
                failed = True
    assert failed
    for _ in range(int(LEASE_S) // 2):
        assert store.expire() == 0
        clock.advance(1)
    assert host.keep().id == host.session.id


def test_look_that_fails_while_it_clears_begins_every_lease_anew(
    replica: Callable[[], EtcdStore], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where etcd stops to answer in the middle of a look, nobody loses a session for the time of that."""
    store = replica()
    host, other = Host(store, "a"), Host(store, "b")
    with monkeypatch.context() as patched:
        patched.setattr(etcd_reaper.Reaper, "clear", lambda *_: None)
        store.end("b", other.session.id)
    for _ in range(int(LEASE_S) - 1):
        clock.advance(1)
        store._reaper.end_due()
    with monkeypatch.context() as patched:
        patched.setattr(etcd_reaper, "_clear", _unavailable)
        patched.setattr(store._gateway, "range", _unavailable)
        with pytest.raises(UnavailableError):
            store.expire()
    clock.advance(2)
    assert store.expire() == 0
    assert host.keep().id == host.session.id


def test_session_that_ended_elsewhere_during_an_outage_costs_nothing(
    replica: Callable[[], EtcdStore], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that did not hear of the end of a session, as etcd did not answer, does not ask for it for ever."""
    here, there = replica(), replica()
    host = Host(here, "a")
    with monkeypatch.context() as patched:
        patched.setattr(here._gateway, "txn", _unavailable)
        with pytest.raises(UnavailableError):
            here.expire()
    there.end("a", host.session.id)
    here.expire()
    for _ in range(int(LEASE_S) + 1):
        clock.advance(1)
        assert here._reaper._leases.due() == []


def test_end_of_a_host_with_many_locks_keeps_nobody_waiting(
    replica: Callable[[], EtcdStore], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever meets a due session, or ends one, waits for its end alone: the locks are free at once, and what is left
    of them is cleared away by the next looks, each release told once."""
    store = replica()
    monkeypatch.setattr(etcd_store, "CLEARED_MAX", 25)
    words = [replace(state("x", 1), id=f"01M86NDR2BZN87TH2B3SP1{n:04}", name=f"name-{n}") for n in range(120)]
    store.apply("z", 1, 0, 120, [Change(n, word) for n, word in enumerate(words, 1)])
    cursor, plain, sent = store.changes(None, 1).cursor, store._gateway.txn, list[Txn]()

    def count(request: Txn) -> Done:
        sent.append(request)
        return plain(request)

    monkeypatch.setattr(store._gateway, "txn", count)
    for turn in range(2):
        host = Host(store, "a")
        assert len(store.acquire("a", host.session.id, [(word.name, Want()) for word in words])) == 120
        other = Host(store, "b")
        if turn:
            for _ in range(int(LEASE_S)):
                assert store.expire() == 0
                clock.advance(1)
                other.keep()
        sent.clear()
        if turn:
            assert other.lock("name-60").host == "b"
        else:
            assert store.end("a", host.session.id)
        assert len(sent) < 12
        assert store.locks(host.session.id) == []
        store.expire()
        assert store.about().locks == turn
    told = [event for event in store.changes(cursor, 1000).events if event.kind == "released" and event.host == "a"]
    assert len(told) == len({(event.name, event.why["term"]) for event in told}) == 240


def test_trim_that_is_interrupted_leaves_nothing_behind(
    replica: Callable[[], EtcdStore], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that a killed replica had begun to trim are trimmed by the next one."""
    store = replica()
    host = Host(store, "a")
    names = ["arm", "leg", "eye"]
    for n, name in enumerate(names):
        host.resolve(name, n)
    for _ in range(10):
        store.acquire("a", host.session.id, [(name, Want()) for name in names])
        store.release("a", host.session.id, dict.fromkeys(names))
    monkeypatch.setattr(etcd_reaper, "KEPT_EVENTS", 0)
    plain, sent = store._gateway.txn, itertools.count()

    def once(request: Txn) -> Done:
        if any(isinstance(op, Delete) for op in request.then) and next(sent) == 1:
            raise UnavailableError("killed")
        return plain(request)

    with monkeypatch.context() as patched:
        patched.setattr(etcd_reaper, "TRIM", 4)  # of three events each: two requests
        patched.setattr(store._gateway, "txn", once)
        with pytest.raises(UnavailableError):
            store._reaper._trim()
    store._reaper._trim()
    assert {event.kind for name in names for event in store.history(name, 0, 100)} == {"created"}


# the feed


def test_quiet_lab_is_not_compacted(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing happened for longer than etcd keeps revisions, but keepalives, a cursor is still good."""
    monkeypatch.setattr(etcd_gateway, "QUIET_S", 0.2)
    never = ("--experimental-watch-progress-notify-interval", "1h")  # as by default: seldom
    with Cluster(tmp_path, 1, *never) as cluster, closing(EtcdStore(parse(cluster.url), clock)) as store:
        host = Host(store, "a")
        host.resolve("arm", 1)
        cursor = store.changes(None, 1).cursor
        for _ in range(5):
            host.keep()
        head = store._gateway.range(Range("x")).revision
        cluster.control("compact", str(head))
        until(lambda: store._feed._next >= head)
        threading.Event().wait(0.5)
        assert store.changes(cursor, 9).events == ()
        host.resolve("leg", 2)
        assert [event.name for event in store.changes(cursor, 9).events] == ["leg"]


def test_replica_that_missed_what_was_compacted_goes_on(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica whose watch was away, while events came that etcd does not keep any more, knows where the feed is, and
    says `compacted` to who asks for them."""
    with (
        Cluster(tmp_path) as cluster,
        closing(EtcdStore(parse(cluster.url), clock)) as away,
        closing(EtcdStore(parse(cluster.url), clock)) as store,
    ):
        cursor = away.changes(None, 1).cursor
        with monkeypatch.context() as patched:
            patched.setattr(away._gateway, "watch", _unavailable)
            with away._gateway._guard:
                for connection in away._gateway._watching:
                    connection.shutdown(2)
            until(lambda: not away._gateway._watching)
            store.resolve("a", "1", state("arm", 1), None, None)
            for _ in range(5):
                store.apply("b", 1, None, next(_numbers) + 1, [])
            cluster.control("compact", str(store._gateway.range(Range("x")).revision))
        with pytest.raises(CompactedError):
            until(lambda: away.changes(cursor, 9).events)
        assert away.changes(away.changes(None, 1).cursor, 9).events == ()


@pytest.mark.parametrize("line", ["[]", "null", '"x"', "{}", '{"result":7}', '{"result":{"events":[{}]}}'])
def test_watch_that_brings_what_etcd_does_not_say_ends(line: str) -> None:
    """A line that is none of etcd's ends a watch, which is begun anew; it does not end the feed."""
    with pytest.raises(UnavailableError):
        etcd_gateway._news_of(line)


# who answers


def test_another_cluster_is_as_good_as_silent(etcd_url: str, tmp_path: Path) -> None:
    """An endpoint of another cluster than the first one is passed over, and where no other is left, nothing is
    answered."""
    with Cluster(tmp_path) as foreign:
        both = parse(etcd_url.replace("etcd://", f"etcd://{foreign.url.removeprefix('etcd://')},"))
        with closing(EtcdGateway(both, total_s=1.0)) as gateway:
            gateway._turn = 1
            gateway.txn(Txn(then=(Put(f"{both.prefix}a", "1"),)))
            gateway._turn = 0
            assert gateway.range(Range(f"{both.prefix}a")).kvs[0].value == "1"
            gateway.access = replace(both, endpoints=both.endpoints[:1])
            with pytest.raises(UnavailableError, match="another cluster"):
                gateway.range(Range(f"{both.prefix}a"))
            assert gateway.is_replaced
        found = [f"{f.weight} {f.text}" for f in check(both)]
    assert any(text.startswith("bad") and "another cluster" in text for text in found)


def test_cluster_that_was_made_anew_needs_a_new_start(
    replica: Callable[[], EtcdStore], etcd_url: str, tmp_path: Path
) -> None:
    """A lab registry that runs while its cluster is replaced by a restored one says that it needs a new start, also
    where the revisions of that are higher."""
    store = replica()
    with Cluster(tmp_path) as restored:
        store._gateway.access = replace(store._gateway.access, endpoints=parse(restored.url).endpoints)
        store._gateway._total_s = 0.5
        with pytest.raises(UnavailableError):
            store.expire()
        assert "set back" in store.broken


class _Bare(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(200)
        said = json.dumps({}).encode()
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bare() -> Iterator[str]:
    """What answers everything with an empty object; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Bare) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_what_is_no_etcd_is_passed_over(bare: str, etcd_url: str) -> None:
    """Who answers with success, and does not say what etcd says, has not answered: nothing is taken for absent."""
    with closing(EtcdGateway(parse(f"etcd://{bare}"), total_s=0.3)) as gateway:
        with pytest.raises(UnavailableError, match="no etcd"):
            gateway.range(Range("a"))
    with closing(EtcdGateway(parse(etcd_url.replace("etcd://", f"etcd://{bare},")))) as gateway:
        assert gateway.txn(Txn(then=(Put(f"{gateway.access.prefix}a", "1"),))).succeeded
    found = check(parse(f"etcd://{bare}"))
    assert [finding for finding in found if finding.weight == "good" and finding.text != "no alarm"] == []


# the limits of etcd


def test_component_of_more_ulids_than_etcd_compares_is_merged(replica: Callable[[], EtcdStore]) -> None:
    """A conflict of more hosts than a transaction of etcd has compares is decided, and all ULIDs are known."""
    store = replica()
    ids = [f"01M86NDR2BZN87TH2B3SP1{n:04}" for n in range(160)]
    for n, id in enumerate(ids):
        word = State(id=id, name="arm", component_type="node", created_at="", changed_at="")
        store.apply(f"host-{n}", 1, 0, 1, [Change(1, word)])
    assert store.merge("a", "arm", ids[7]).id == ids[7]
    assert {store.find(id=id).id for id in ids} == {ids[7]}
    assert store.about().conflicts == 0


def test_batch_of_renames_takes_few_transactions(
    replica: Callable[[], EtcdStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renames read more than other changes; still many of them go in at once."""
    store = replica()
    store.apply("a", 1, 0, 84, [Change(n + 1, state(f"old-{n}", n)) for n in range(84)])
    plain, sent = store._gateway.txn, list[Txn]()

    def count(request: Txn) -> Done:
        sent.extend([request] if any(isinstance(op, Put) for op in request.then) else [])
        return plain(request)

    monkeypatch.setattr(store._gateway, "txn", count)
    done = store.apply("a", 1, 84, 168, [Change(n + 85, state(f"new-{n}", n)) for n in range(84)])
    assert (done.changed, done.unapplied) == (84, ())
    assert len(sent) <= 12


def _unavailable(*_: object, **__: object) -> None:
    raise UnavailableError("etcd does not answer")
