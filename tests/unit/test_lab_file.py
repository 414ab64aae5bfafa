"""The SQLite file of a lab: what is refused, what a full or failed disk does, what a killed lab and a backup leave."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from ulid import ULID

from helpers import FakeClock
from lab_stores import state
from madsci_registry.errors import CompactedError, NoSpaceError, UnavailableError
from madsci_registry_lab import sqlite_feed
from madsci_registry_lab.faults import Fault
from madsci_registry_lab.sqlite_store import SqliteStore
from madsci_registry_lab.store import Change, Lock, Want


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """A store in a file of its own."""
    with closing(SqliteStore(tmp_path / "lab.db", FakeClock())) as made:
        yield made


def test_file_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    """Another program's database, one of a newer schema, and a file that is none, are refused with 65 and unchanged."""
    foreign, newer, text = tmp_path / "foreign.db", tmp_path / "newer.db", tmp_path / "text.db"
    with closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE theirs (x)")
    SqliteStore(newer).close()
    with closing(sqlite3.connect(newer)) as db:
        db.execute("PRAGMA user_version = 99")
    text.write_text("no database" * 1000)
    for path, said in ((foreign, "another program"), (newer, "schema 99"), (text, "no database of ours")):
        before = path.read_bytes()
        with pytest.raises(Fault, match=said) as fault:
            SqliteStore(path)
        assert fault.value.status == 65
        assert path.read_bytes() == before


def test_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """A store under a file, and one that is a folder, are refused with 73."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "lab.db", tmp_path):
        with pytest.raises(Fault) as fault:
            SqliteStore(path)
        assert fault.value.status == 73


def test_open_store_is_served_by_one(store: SqliteStore, tmp_path: Path) -> None:
    """A file that is open is refused to a second store with 69."""
    with pytest.raises(Fault, match="open in another program") as fault:
        SqliteStore(tmp_path / "lab.db")
    assert fault.value.status == 69


def test_commits_are_synced_and_rules_are_kept(store: SqliteStore, tmp_path: Path) -> None:
    """The file is in WAL mode with `synchronous=FULL`, has our application_id, strict tables, and mode 600."""
    run = store._db.run
    found = [run(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert found == ["wal", 2, 1]
    assert run("SELECT count(*) FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND strict = 0 AND "
               "name NOT LIKE 'sqlite_%'").fetchone() == (0,)  # fmt: skip
    for file in ("lab.db", "lab.db-wal"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o600


def test_forked_child_has_no_store(store: SqliteStore) -> None:
    """A child that was forked from a lab is refused all, and does not close the file: it has none of its locks."""
    store.resolve("a", "1", state("arm", 1), None, None)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            store.find(name="arm")
        except UnavailableError:
            store.close()
            os.write(writing, b"refused")
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 100) == b"refused"
    os.close(reading)
    os.waitpid(child, 0)
    assert store.find(name="arm").name == "arm"


def test_backup_beside_what_a_killed_lab_left_is_refused(tmp_path: Path) -> None:
    """A file that was set back to a backup while the WAL of a killed lab lies beside it is refused with 65, both left
    as they are; once that WAL is removed, it is the backup."""
    path, wal, backup, killed = (tmp_path / name for name in ("lab.db", "lab.db-wal", "backup", "killed"))

    def fill(store: SqliteStore, host: str, count: int) -> None:
        words = [state(f"{host} {n}", 0, metadata=f'{{"a":"{"x" * 400}"}}') for n in range(count)]
        store.apply(host, 1, 0, count, [Change(n, replace(w, id=str(ULID()))) for n, w in enumerate(words, 1)])

    with closing(SqliteStore(path)) as store:
        fill(store, "before", 300)
    shutil.copy(path, backup)
    with closing(SqliteStore(path)) as store:
        fill(store, "after", 40)
        store._db.run("PRAGMA wal_checkpoint(PASSIVE)")
        fill(store, "last", 1)
        shutil.copy(wal, killed)
    shutil.copy(backup, path)
    shutil.copy(killed, wal)
    with pytest.raises(Fault, match=r"it is a backup, .*lab\.db-wal is not its own: remove that") as fault:
        SqliteStore(path)
    assert fault.value.status == 65
    assert (path.read_bytes(), wal.read_bytes()) == (backup.read_bytes(), killed.read_bytes())
    wal.unlink()
    with closing(SqliteStore(path)) as store:
        assert store.about().names == 300


def test_epochs_of_one_backup_differ_without_a_clock(tmp_path: Path) -> None:
    """A store that is set back to the same backup again and again, where the clock stands still, does not come to the
    same epoch: a cursor of one run is none of another."""
    SqliteStore(tmp_path / "lab.db", FakeClock()).close()
    epochs = set()
    for n in range(20):
        shutil.copy(tmp_path / "lab.db", tmp_path / f"{n}.db")
        with closing(SqliteStore(tmp_path / f"{n}.db", FakeClock())) as store:
            epochs.add(store.about().epoch)
    assert len(epochs) > 1


def test_damage_found_at_the_start_is_said(tmp_path: Path) -> None:
    """A file in which a start reads damaged pages is refused with 65."""
    with closing(SqliteStore(tmp_path / "lab.db")) as store:
        store.resolve("a", "1", state("arm", 1), None, None)
    with (tmp_path / "lab.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * ((tmp_path / "lab.db").stat().st_size - 4096))
    with pytest.raises(Fault, match="is damaged") as fault:
        SqliteStore(tmp_path / "lab.db")
    assert fault.value.status == 65


def test_full_disk_is_a_definite_no(store: SqliteStore) -> None:
    """Where there is no space a change is refused and undone, and reads go on; with space again, so do changes."""
    store.resolve("a", "1", state("arm", 1), None, None)
    cursor = store.changes(None, 1).cursor
    pages = store._db.run("PRAGMA page_count").fetchone()[0]
    store._db.run(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for n in range(90):
            store.resolve("a", f"2-{n}", state(f"leg-{n}" + "x" * 200, 2 + n), None, None)

    with pytest.raises(NoSpaceError):
        fill()
    before = store.changes(None, 1).cursor
    assert store.find(name="arm").name == "arm"
    store._db.run("PRAGMA max_page_count = 100000")
    store.resolve("a", "3", state("eye", 99), None, None)
    assert [event.name for event in store.changes(cursor, 1000).events][-1] == "eye"
    assert [event.name for event in store.changes(before, 10).events] == ["eye"]


def test_many_locks_are_one_commit(store: SqliteStore) -> None:
    """A request for many locks waits for the disk once, whether all are granted or not, and so does their release."""
    names = [f"name {n}" for n in range(50)]
    for n, name in enumerate(names):
        store.resolve("a", str(n), state(name, n), None, None)
    session = store.register("a", "boot-1", 15.0, "")
    commits: list[int] = []
    store.on_change(lambda: commits.append(1))
    locks = store.acquire("a", session.id, [(name, Want()) for name in [*names, "none"]])
    assert [isinstance(lock, Lock) for lock in locks] == [True] * 50 + [False]
    assert len(store.release("a", session.id, dict.fromkeys(names))) == 50
    assert len(commits) == 2


def test_store_that_failed_answers_nothing_more(store: SqliteStore, tmp_path: Path) -> None:
    """After an error of the disk every operation is unavailable, reads too, until the file is opened anew."""
    store.resolve("a", "1", state("arm", 1), None, None)
    store._db.run("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / "lab.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (tmp_path / "lab.db").stat().st_size)
    store._db.run("PRAGMA cache_size = 1")
    with pytest.raises(UnavailableError, match="has failed"):
        store.resolve("a", "2", state("leg", 2), None, None)
    assert store.broken
    with pytest.raises(UnavailableError, match="has failed"):
        store.about()


def test_passing_events_are_trimmed_and_cursors_know(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old events of locks and hosts are trimmed, those of identities never; a cursor from before is refused."""
    monkeypatch.setattr(sqlite_feed, "KEPT_EVENTS", 5)
    start = store.changes(None, 1).cursor
    store.resolve("a", "1", state("arm", 1), None, None)
    for n in range(10):
        store.end("h", store.register("h", f"boot-{n}", 15.0, "").id)
    store.expire()
    assert [e.kind for e in store.history("arm", 0, 10)] == ["created"]
    with pytest.raises(CompactedError):
        store.changes(start, 100)
    epoch, _, last = store.changes(None, 1).cursor.partition(".")
    assert len(store.changes(f"{epoch}.{int(last) - 5}", 100).events) == 5


def test_files_of_a_killed_lab_are_read(tmp_path: Path) -> None:
    """What was committed and not yet moved into the file is there after a crash; a cursor of what came after that, in
    the same run of the lab, is refused, however far the lab has gone on."""
    clock = FakeClock()
    with closing(SqliteStore(tmp_path / "lab.db", clock)) as store:
        store.resolve("a", "1", state("arm", 1), None, None)
        known = store.changes(None, 1).cursor
        (tmp_path / "copy").mkdir()
        for file in tmp_path.glob("lab.db*"):
            shutil.copy(file, tmp_path / "copy")
        store.resolve("a", "2", state("leg", 2), None, None)
        beyond = store.changes(None, 1).cursor
    with closing(SqliteStore(tmp_path / "copy" / "lab.db", clock)) as again:
        for n in (3, 4, 5):
            again.resolve("a", str(n), state(f"name-{n}", n), None, None)
        assert [e.name for e in again.changes(known, 9).events] == ["name-3", "name-4", "name-5"]
        with pytest.raises(CompactedError):
            again.changes(beyond, 9)
