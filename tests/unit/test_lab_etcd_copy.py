"""A lab that moves from SQLite to etcd and back, and what is said of an etcd."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import etcd
from etcd import Cluster
from helpers import FakeClock, until
from lab_stores import ULIDS, Host, state
from madsci_registry.errors import CompactedError, NoSpaceError
from madsci_registry_lab import checking, copying, etcd_copy, sqlite_copy
from madsci_registry_lab.checking import check, is_supported
from madsci_registry_lab.copying import copy
from madsci_registry_lab.etcd_access import parse
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_store import EtcdStore
from madsci_registry_lab.etcd_wire import Done, Put, Range, Txn, after
from madsci_registry_lab.faults import Fault
from madsci_registry_lab.sqlite_store import SqliteStore
from madsci_registry_lab.store import Change, Event, LabStore, Mark

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)


@pytest.fixture
def source(tmp_path: Path, clock: FakeClock) -> Path:
    """The file of a lab that has something of everything."""
    path = tmp_path / "lab.db"
    with closing(SqliteStore(path, clock)) as store:
        fill(store)
    return path


def fill(store: LabStore) -> None:
    """Do something of everything."""
    a, b = Host(store, "a"), Host(store, "b")
    for n in range(10, 30):
        a.resolve(f"nämè/{n}", n)
    words = [state("arm", 1), state("leg", 1), state("eye", 2, metadata='{"deep":[1,{"a":"ü"}]}')]
    store.apply("a", 7, 0, 3, [Change(n, word) for n, word in enumerate(words, 1)])
    store.apply("b", 9, 0, 2, [Change(1, state("leg", 3)), Change(2, state("eye", 4))])
    store.merge("b", "eye", ULIDS[4])
    a.lock("leg", proposal=4_000_000_000)
    b.release("eye", b.lock("eye").term)
    store.apply("a", 7, 3, 4, [Change(4, state("gone", 2))])


def all_of(store: LabStore) -> dict[str, object]:
    """Return all that a store tells of a lab."""

    def plain(event: Event) -> tuple[object, ...]:
        return (event.at, event.kind, event.name, event.id, event.host, event.why)

    entries = store.entries("", 1000)
    return {
        "entries": entries,
        "ids": [store.find(id=id).name for id in ULIDS[1:5]],
        "conflicts": store.conflicts(decided=True, after=("", ""), limit=99),
        "marks": [store.mark(host) for host in ("a", "b", "c")],
        "sessions": store.sessions(),
        "given": store.given([*(e.name for e in entries), "arm", "gone"]),
        "history": [[plain(event) for event in store.history(e.name, 0, 100)] for e in entries],
        "open": store.about().conflicts,
    }


def test_lab_moves_to_etcd_and_back_whole(source: Path, etcd_url: str, tmp_path: Path, clock: FakeClock) -> None:
    """All that a lab knows is the same after a move to etcd, and back to SQLite; what follows is above it: terms,
    epochs; hosts keep their sessions and locks, and a cursor from before is refused."""
    with closing(SqliteStore(source, clock)) as store:
        before, epoch = all_of(store), store.about().epoch
        cursor = store.changes(None, 1).cursor
    counts = copy(f"sqlite:{source}", etcd_url)
    assert counts["locks"] == 1 and counts["names"] > 20 and counts["events"] > 30
    with closing(EtcdStore(parse(etcd_url), clock)) as there:
        assert all_of(there) == before
        assert there.about().epoch > epoch
        with pytest.raises(CompactedError):
            there.changes(cursor, 1)
        (a, b) = there.sessions()
        assert there.keep(a.host, a.id, a.boot).locks == 1
        (lock,) = there.locks(a.id)
        assert there.release("a", a.id, {"leg": lock.term}) == ["leg"]
        given = Host(there, b.host).lock("leg").term
        assert given > lock.term >= 4_000_000_000
        assert there.apply("a", 7, 4, 5, [Change(5, state("new", 5))]).mark == Mark(7, 5)
        between, epoch, cursor = all_of(there), there.about().epoch, there.changes(None, 1).cursor
    back = tmp_path / "back.db"
    copy(etcd_url, f"sqlite:{back}")
    with closing(SqliteStore(back, clock)) as store:
        assert all_of(store) == between
        assert store.about().epoch > epoch
        with pytest.raises(CompactedError):
            store.changes(cursor, 1)


def test_copy_of_a_copy_is_the_same(source: Path, etcd_url: str) -> None:
    """What is read of both kinds of store is the same, down to the last value."""
    copy(f"sqlite:{source}", etcd_url)
    copy(etcd_url, f"{etcd_url}-2")
    first, second = etcd_copy.read(parse(etcd_url)), etcd_copy.read(parse(f"{etcd_url}-2"))
    assert first.epoch + 1 == second.epoch
    assert [getattr(first, part) for part in first.counts()] == [getattr(second, part) for part in first.counts()]


def test_target_that_is_not_empty_is_left_as_it_is(
    source: Path, etcd_url: str, tmp_path: Path, clock: FakeClock
) -> None:
    """A store that holds a lab is not copied over, in either direction; nor is a store copied onto itself."""
    other = tmp_path / "other.db"
    with closing(SqliteStore(other, clock)) as store:
        Host(store, "z").resolve("z", 9)
    copy(f"sqlite:{source}", etcd_url)
    for pair in ((f"sqlite:{other}", etcd_url), (etcd_url, f"sqlite:{other}"), (etcd_url, etcd_url)):
        with pytest.raises(Fault):
            copy(*pair)
    with closing(SqliteStore(other, clock)) as store:
        assert [entry.name for entry in store.entries("", 99)] == ["z"]


def test_source_must_be_there_and_still(
    source: Path, etcd_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is served, is not there, or is written while it is read, is not copied."""
    for missing in (etcd_url, "sqlite:none.db"):
        with pytest.raises(Fault):
            copy(missing, f"{etcd_url}-2")
    with closing(SqliteStore(source, clock)), pytest.raises(Fault):
        copy(f"sqlite:{source}", etcd_url)
    copy(f"sqlite:{source}", etcd_url)
    plain = etcd_copy._Reader._all
    with closing(EtcdStore(parse(etcd_url), clock)) as store:

        def meanwhile(self: etcd_copy._Reader, kind: str) -> Iterator[object]:
            if kind == "m/":
                store.resolve("z", "1", state("meanwhile", 60), None, None)
            return plain(self, kind)

        monkeypatch.setattr(etcd_copy._Reader, "_all", meanwhile)
        with pytest.raises(Fault, match="written meanwhile"):
            copy(etcd_url, f"{etcd_url}-2")


def test_unfinished_copy_serves_nobody_and_is_begun_anew(
    source: Path, etcd_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that was interrupted is no lab, neither to serve nor to copy, and the next one replaces it."""
    with monkeypatch.context() as patched:
        patched.setattr(etcd_copy._Writer, "_rows", lambda *_: iter([(1, 2)]))
        with pytest.raises(TypeError):
            copy(f"sqlite:{source}", etcd_url)
    with pytest.raises(Fault, match="format 0"):
        EtcdStore(parse(etcd_url), clock)
    with pytest.raises(Fault, match="not finished"):
        copy(etcd_url, f"{etcd_url}-2")
    assert copy(f"sqlite:{source}", etcd_url)["names"] > 20
    EtcdStore(parse(etcd_url), clock).close()


def test_copy_that_differs_is_told_and_serves_nobody(
    source: Path, etcd_url: str, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is read again: where it is not the same, the copy says so, and is no lab."""
    copy(f"sqlite:{source}", f"{etcd_url}-2")
    plain = etcd_copy._Writer._rows
    monkeypatch.setattr(etcd_copy._Writer, "_rows", lambda self, *given: itertools.islice(plain(self, *given), 5, None))
    with pytest.raises(Fault, match="are not those of the source"):
        copying.copy(f"sqlite:{source}", etcd_url)
    with pytest.raises(Fault, match="format 0"):
        EtcdStore(parse(etcd_url), clock)
    write = sqlite_copy._write
    monkeypatch.setattr(sqlite_copy, "_write", lambda db, given: write(db, replace(given, marks=())))
    back = tmp_path / "back.db"
    with pytest.raises(Fault, match="are not those of the source"):
        copy(f"{etcd_url}-2", f"sqlite:{back}")
    with closing(SqliteStore(back, clock)) as store:
        assert store.entries("", 10) == []


def test_of_two_copies_at_once_the_later_one_goes_on(
    source: Path, etcd_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy whose target another one has begun to write ends, and nothing of it is in the other one's; so does what a
    killed one had under way."""
    plain = etcd_copy._Writer._rows

    def meanwhile(self: etcd_copy._Writer, *given: Any) -> Iterator[tuple[str, str]]:
        monkeypatch.setattr(etcd_copy._Writer, "_rows", plain)
        copy(f"sqlite:{source}", etcd_url)
        yield "n/stray", "{}"

    monkeypatch.setattr(etcd_copy._Writer, "_rows", meanwhile)
    with pytest.raises(Fault, match="somebody else writes"):
        copy(f"sqlite:{source}", etcd_url)
    with closing(EtcdStore(parse(etcd_url), clock)) as store:
        assert "stray" not in [entry.name for entry in store.entries("", 1000)]


def test_copy_into_a_lab_that_begins_just_then_leaves_it(
    source: Path, etcd_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lab registry that starts on the target between the copy's look and its first write keeps its lab."""
    plain = etcd_copy._Writer._write_meta

    def meanwhile(self: etcd_copy._Writer, *given: Any) -> int:
        with closing(EtcdStore(parse(etcd_url), clock)) as store:
            store.resolve("z", "1", state("z", 9), None, None)
        return plain(self, *given)

    monkeypatch.setattr(etcd_copy._Writer, "_write_meta", meanwhile)
    with pytest.raises(Fault, match="somebody else writes"):
        copy(f"sqlite:{source}", etcd_url)
    with closing(EtcdStore(parse(etcd_url), clock)) as store:
        assert [entry.name for entry in store.entries("", 10)] == ["z"]


def test_copy_whose_answers_are_lost_is_whole(source: Path, etcd_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transaction of a copy may be sent twice."""
    plain = EtcdGateway.txn

    def twice(self: EtcdGateway, request: Txn) -> Done:
        plain(self, request)
        return plain(self, request)

    monkeypatch.setattr(EtcdGateway, "txn", twice)
    assert copy(f"sqlite:{source}", etcd_url)["names"] > 20


def test_copy_that_is_killed_is_no_lab_or_whole(tmp_path: Path, etcd_url: str, clock: FakeClock) -> None:
    """SIGKILL of a copy at any moment leaves what serves nobody, or all; the next one is whole."""
    path = tmp_path / "big.db"
    with closing(SqliteStore(path, clock)) as store:
        words = [replace(state("x", 1), id=f"01M86NDR2BZN87TH2B3SP1{n:04}", name=f"name-{n}") for n in range(3000)]
        for n in range(0, 3000, 1000):
            store.apply("a", 1, n, n + 1000, [Change(n + k + 1, words[n + k]) for k in range(1000)])
    command = [sys.executable, "-m", "madsci_registry_lab", "copy", "--from", f"sqlite:{path}", "--to", etcd_url]
    ends = []
    for keys in (1, 900, 4000, 7000):
        _kill_at(keys, etcd_url, command)
        try:
            EtcdStore(parse(etcd_url), clock).close()
        except Fault as fault:
            ends.append(fault.status)
        else:
            break
    assert ends
    assert set(ends) == {65}
    copy(f"sqlite:{path}", etcd_url)
    with closing(EtcdStore(parse(etcd_url), clock)) as store:
        assert store.about().names == 3000


def _kill_at(keys: int, etcd_url: str, command: list[str]) -> None:
    """Run a command and kill it as soon as there are so many keys that it has written."""
    with closing(EtcdGateway(parse(etcd_url))) as gateway, subprocess.Popen(command, stderr=subprocess.DEVNULL) as one:
        everything = Range(gateway.access.prefix, after(gateway.access.prefix), count_only=True)
        before = gateway.range(everything).revision

        def is_there() -> bool:
            found = gateway.range(everything)
            return one.poll() is not None or (found.revision > before + 2 and found.count >= keys)

        until(is_there)
        one.kill()


@pytest.mark.parametrize(
    ("key", "value"),
    [("meta", "x"), ("meta", "[]"), ("meta", "7"), ("meta", "{}"), ("meta", '{"format":2,"epoch":1}'), ("n/a", "x")],
)
def test_rubbish_under_the_prefix_is_a_fault(
    source: Path, etcd_url: str, clock: FakeClock, key: str, value: str
) -> None:
    """What no lab has written is told as such by whatever meets it, and left as it is."""
    with closing(EtcdGateway(parse(etcd_url))) as gateway:
        gateway.txn(Txn(then=(Put(gateway.access.prefix + key, value),)))
        for pair in ((etcd_url, f"{etcd_url}-2"), (f"sqlite:{source}", etcd_url)):
            with pytest.raises(Fault):
                copy(*pair)
        if key == "meta":
            assert any(finding.weight != "good" for finding in check(parse(etcd_url)))
            if value != "{}":
                with pytest.raises(Fault):
                    EtcdStore(parse(etcd_url), clock)
        assert gateway.range(Range(gateway.access.prefix + key)).kvs[0].value == value


def test_file_that_is_no_lab_is_a_fault(tmp_path: Path, etcd_url: str, source: Path) -> None:
    """A file that is damaged, a folder, or what is no file of a lab is told, not copied."""
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"x" * 8192)
    torn = tmp_path / "torn.db"
    torn.write_bytes(source.read_bytes()[:8192] + b"\xff" * 40_000)
    for path in (garbage, torn, tmp_path, tmp_path / "none.db"):
        with pytest.raises(Fault):
            copy(f"sqlite:{path}", etcd_url)
    with pytest.raises(Fault):
        copy(f"sqlite:{source}", f"sqlite:{garbage}")
    for store in ("", "sqlite:", "etcd:", "postgres://a", "etcd://"):
        for pair in ((store, etcd_url), (f"sqlite:{source}", store)):
            with pytest.raises(Fault):
                copy(*pair)


@pytest.mark.parametrize(
    ("version", "good"),
    [("3.4.23", False), ("3.5.27", False), ("3.5.28", True), ("3.6.8", False), ("3.6.9", True), ("3.7.0", True),
     ("4.0.0", True), ("garbage", False)],
)  # fmt: skip
def test_versions_that_get_fixes_are_known(version: str, good: bool) -> None:
    """A version with known holes, or without any more fixes, is warned about."""
    assert is_supported(version) == good


def _fill_up(etcd_url: str) -> None:
    with closing(EtcdGateway(parse(etcd_url))) as gateway:
        for n in range(100):
            gateway.txn(Txn(then=(Put(f"x{n}", "x" * 10_000),)))


def test_check_tells_what_a_person_should_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """Versions, members, quota, alarms, compaction and the lab are told, and what is wrong with them."""
    with Cluster(tmp_path, 1, "--quota-backend-bytes", "300000") as cluster:
        etcd_url = cluster.url
        EtcdStore(parse(etcd_url), clock).close()
        texts = "\n".join(f"{found.weight} {found.text}" for found in check(parse(etcd_url)))
        assert "warning 1 members, of which 0 may fail" in texts
        assert "good no alarm" in texts
        assert "format 1" in texts
        assert "revisions are kept and it has compacted none yet" in texts
        monkeypatch.setattr(checking, "UNCOMPACTED", 1)
        with pytest.raises(NoSpaceError):
            _fill_up(etcd_url)
        texts = "\n".join(f"{found.weight} {found.text}" for found in check(parse(etcd_url)))
        assert "bad alarm NOSPACE" in texts
        assert "warning" in texts and "of a quota of 0 MiB" in texts
        assert "auto-compaction" in texts
    down = [found.weight for found in check(parse(etcd_url))]
    assert set(down) == {"bad"}
