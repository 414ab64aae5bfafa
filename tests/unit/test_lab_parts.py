"""The parts of a lab, each by itself: settings, tokens, its SQLite file, and the thread that looks for silent hosts."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers import FakeClock, until
from lab_stores import state
from madsci_registry.errors import CompactedError, NoSpaceError, UnavailableError
from madsci_registry_lab import registry as registry_module
from madsci_registry_lab import settings, sqlite_feed
from madsci_registry_lab.faults import Fault
from madsci_registry_lab.feed import Feed
from madsci_registry_lab.registry import LabRegistry, open_store
from madsci_registry_lab.sqlite_store import SqliteStore
from madsci_registry_lab.store import Page
from madsci_registry_lab.tokens import read_tokens, token_in


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """A store in a file of its own."""
    with closing(SqliteStore(tmp_path / "lab.db", FakeClock())) as made:
        yield made


# settings


def test_option_goes_before_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a setting that is given in several places, the option counts, else the environment, else the file."""
    config = tmp_path / "lab.toml"
    config.write_text('listen = "127.0.0.1:1"\nstore = "sqlite:file.db"\nlog_level = "error"\n')
    monkeypatch.setenv("MADSCI_REGISTRY_LAB_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("MADSCI_REGISTRY_LAB_LOG_LEVEL", "debug")
    loaded = settings.load({"listen": "[::1]:3", "log_level": None}, config)
    assert (loaded.address, loaded.log_level, loaded.store) == (("::1", 3), "debug", "sqlite:file.db")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lissten = 1", "the nearest known one is listen"),
        ("listen = '127.0.0.1'", "HOST:PORT"),
        ("listen = '127.0.0.1:99999'", "HOST:PORT"),
        ("listen = '0.0.0.0:1'", "may be reached from other hosts"),
        ("listen = '[::]:1'", "may be reached from other hosts"),
        ("listen = 'lab.example:1'", "may be reached from other hosts"),
        ("tls_cert = '/x.pem'", "one is of no use without the other"),
        ("log_level = 'loud'", "log_level"),
        ("listen =", "is no TOML"),
    ],
)
def test_bad_setting_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """A setting that is unknown or cannot be is a fault with status 78 that says why."""
    (tmp_path / "lab.toml").write_text(text)
    with pytest.raises(Fault, match=said) as fault:
        settings.load({}, tmp_path / "lab.toml")
    assert fault.value.status == 78


def test_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is a fault that names it and the nearest setting."""
    monkeypatch.setenv("MADSCI_REGISTRY_LAB_TOKENFILE", "x")
    with pytest.raises(Fault, match="TOKENFILE; the nearest known one is token_file"):
        settings.load({}, None)


@pytest.mark.parametrize("url", ["", "sqlite:", "postgres:x", "lab.db"])
def test_store_that_there_is_not_is_refused(url: str) -> None:
    """A store setting of an unknown kind is a fault with status 78."""
    with pytest.raises(Fault, match="must be sqlite:PATH") as fault:
        open_store(url, FakeClock())
    assert fault.value.status == 78


# tokens


@pytest.mark.parametrize("line", ["lab3 short", "lab3", "lab3 SECRET-long-enough SECRET", "lab3 token-of-lab1-01234"])
def test_bad_token_file_is_refused_without_telling_it(tmp_path: Path, line: str) -> None:
    """A line that is no host with a token, or has another's, is a fault that says which line, and not what it holds."""
    path = tmp_path / "tokens"
    path.write_text(f"# all\nlab1 token-of-lab1-01234  # mine\n\n{line}\n")
    with pytest.raises(Fault, match="line 4") as fault:
        read_tokens(path)
    assert fault.value.status == 78
    assert not {"SECRET", "short", "token-of-lab1-01234"} & set(str(fault.value).split())


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"\xff\xfe"])
def test_token_file_without_tokens_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """No file, an empty one, and one that is no text, are faults: a lab is never open by mistake."""
    if content is not None:
        (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(Fault, match="token_file"):
        read_tokens(tmp_path / "tokens")


def test_token_is_found_in_either_scheme(tmp_path: Path) -> None:
    """A token is known as a bearer's and as the password of basic authentication; a host may have two; others are
    nobody's."""
    (tmp_path / "tokens").write_text("a token-1-0123456789\na token-2-0123456789\nb token-3-0123456789\n")
    tokens = read_tokens(tmp_path / "tokens")
    assert [tokens.host_of(f"token-{n}-0123456789") for n in (1, 2, 3, 4)] == ["a", "a", "b", None]
    assert token_in("Bearer abc") == "abc"
    assert token_in("basic YTpiOmM=") == "b:c"
    assert [token_in(text) for text in ("", "Basic !", "Digest x", "Basic /w==")] == [None] * 4


# the file


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
    assert (tmp_path / "lab.db").stat().st_mode & 0o777 == 0o600


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


# the feed


class Late(SqliteStore):
    """A store in which somebody writes just after a reader has found nothing."""

    def changes(self, cursor: str | None, limit: int) -> Page:
        page = super().changes(cursor, limit)
        if cursor is not None and not page.events:
            self.resolve("a", "1", state("arm", 1), None, None)
        return page


def test_change_that_comes_just_after_the_look_is_not_slept_through(tmp_path: Path) -> None:
    """A reader that has found nothing, and is not waiting yet when a change comes, hears of it at once."""
    with closing(Late(tmp_path / "lab.db")) as late:
        feed, cursor = Feed(late), late.changes(None, 1).cursor
        page = asyncio.run(feed.changes(cursor, 10, 20.0))
    assert [event.name for event in page.events] == ["arm"]
    assert feed.waiting == 0


# the registry


def test_silent_host_is_ended_by_the_registry_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lab that runs ends the session of a host that is silent for its lease, and the feed tells it."""
    monkeypatch.setattr(registry_module, "LOOK_S", 0.005)
    clock = FakeClock()
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db", clock=clock)) as lab:
        cursor = lab.store.changes(None, 1).cursor
        lab.store.register("a", "boot-1", 15.0, "")
        looked = threading.Event()
        real = lab.store.expire

        def expire() -> int:
            ended = real()
            looked.set()
            return ended

        monkeypatch.setattr(lab.store, "expire", expire)
        for second in range(15):
            assert len(lab.store.sessions()) == 1, f"ended after {second} s"
            clock.advance(1)
            looked.clear()
            looked.wait(10)
        until(lambda: not lab.store.sessions(), "for the session to end")
        assert [(e.kind, e.host) for e in lab.store.changes(cursor, 9).events] == [
            ("registered", "a"),
            ("expired", "a"),
        ]


def test_failed_store_is_unhealthy_and_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that has failed is told by the health, and is what the program ends for; a full disk is not."""
    monkeypatch.setattr(registry_module, "LOOK_S", 0.005)
    answers: list[Any] = [NoSpaceError("no space"), UnavailableError("the disk failed")]
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db")) as lab:
        looked = threading.Event()

        def expire() -> int:
            looked.set()
            raise answers[0]

        monkeypatch.setattr(lab.store, "expire", expire)
        assert looked.wait(10)
        assert lab.failed == ""
        del answers[0]
        until(lambda: lab.failed, "for the failure to be noticed")
        lab.store.close()
        assert lab.health()["healthy"] is False
        assert lab.identify()["service"] == "madsci-registry-lab"


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
