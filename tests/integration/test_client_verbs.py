"""The client's verbs on identities and on the whole registry. A real daemon."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DaemonProcess
from madsci_registry import (
    ConflictError,
    HeldError,
    InvalidError,
    NameTakenError,
    NotFoundError,
    Registration,
    RegistryClient,
    TooLargeError,
    WrongTypeError,
)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RegistryClient]:
    with RegistryClient(daemon.registry) as made:
        yield made


def make(client: RegistryClient, name: str) -> str:
    return client.resolve(name, "node", acquire_lock=False).id


def test_lookup_answers_the_id_and_none_for_absent_alone(client: RegistryClient) -> None:
    """A lookup gives a known name's ULID and None for an absent one; get and whois name what they did not find."""
    id = make(client, "a b/ü")
    assert (client.lookup("a b/ü"), client.lookup("x")) == (id, None)
    assert client.whois(id) == client.get("a b/ü")
    with pytest.raises(NotFoundError):
        client.get("x")
    with pytest.raises(NotFoundError):
        client.whois("01ARZ3NDEKTSV4RRFFQ69G5FAV")


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "a\nb", "e\u0301", "\ud800", "x" * 256, 7])
def test_resolve_of_a_name_that_is_none_is_invalid(client: RegistryClient, name: Any) -> None:
    """A name that may not be is refused with its field, and nothing is made."""
    with pytest.raises(InvalidError) as caught:
        client.resolve(name, "node")
    assert caught.value.field == "name"
    assert client.list() == []


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": "\ud800"}, {1: 2}, {"x": object()}, {"x": "\0"}, [1]])
def test_resolve_with_metadata_that_is_no_json_is_invalid(client: RegistryClient, bad: Any) -> None:
    """Metadata that is no JSON object is refused with its field; the connection lives on."""
    with pytest.raises(InvalidError) as caught:
        client.resolve("a", "node", bad)
    assert str(caught.value.field).startswith("metadata")
    with pytest.raises(TooLargeError):
        client.resolve("a", "node", {"x": "y" * 17000})
    assert client.lookup("a") is None


def test_rename_moves_the_id_and_the_old_name_says_where(client: RegistryClient) -> None:
    """A rename takes the ULID along; the old name says where it went, and mints a new ULID with a warning."""
    id = make(client, "old")
    assert client.rename("old", "new").id == id
    assert (client.lookup("old"), client.lookup("new")) == (None, id)
    with pytest.raises(NotFoundError) as caught:
        client.get("old")
    assert caught.value.renamed_to == "new"
    again = client.resolve("old", "node", acquire_lock=False)
    assert again.id != id
    assert "new" in again.warnings[0]
    with pytest.raises(NameTakenError):
        client.rename("old", "new")
    with pytest.raises(ConflictError):
        client.rename("old", "other", id=id)


def test_retire_keeps_the_id_and_revive_brings_it_back(client: RegistryClient) -> None:
    """A retired name keeps its ULID: revive and resolve bring back the same one; a held name is not retired."""
    mine = client.resolve("a", "node")
    with pytest.raises(HeldError):
        client.retire("a")
    mine.release()
    assert client.retire("a").state == "retired"
    assert client.list() == []
    assert [c.id for c in client.list(include_retired=True)] == [mine.id]
    assert client.revive("a").state == "free"
    client.retire("a")
    assert client.resolve("a", "node").id == mine.id


def test_set_metadata_replaces_and_drops_keys(client: RegistryClient) -> None:
    """set_metadata replaces the keys it is given and drops those of unset; the rest stays."""
    client.resolve("a", "node", {"x": {"deep": 1}, "y": 2, "z": 3})
    assert client.set_metadata("a", {"x": 1}, ["y"]).metadata == {"x": 1, "z": 3}


def test_resolve_many_answers_each_by_itself(client: RegistryClient) -> None:
    """Each of many names gets its own answer, in order; a refused one spoils no other."""
    make(client, "n3")
    items: list[Any] = [(f"n{i}", "node", {"i": i, "pad": "x" * 900}) for i in range(1300)]
    items[3] = ("n3", "module")
    items[4] = ("n4", "robot")
    items[5] = ("\n", "node")
    answers = client.resolve_many(items)
    assert isinstance(answers[3], WrongTypeError)
    assert isinstance(answers[4], InvalidError)
    assert isinstance(answers[5], InvalidError)
    held = [a for a in answers if isinstance(a, Registration)]
    assert [r.name for r in held[:4]] == ["n0", "n1", "n2", "n6"]
    assert len(held) == 1297
    assert all(r.held and r.fencing_token for r in held)
    assert [c.name for c in client.list("n12[0-9]?", state="held")] == sorted(f"n{i}" for i in range(1200, 1300))
    assert client.status()["held"] == 1297


def test_export_and_import_carry_every_identity(client: RegistryClient, registry_path: Path) -> None:
    """What export gives, import takes in elsewhere, entry by entry; a repeat and a dry run change nothing."""
    answers = client.resolve_many([(f"n{i}", "node", {"pad": "x" * 900}) for i in range(1300)], acquire_lock=False)
    ids = {a.name: a.id for a in answers if isinstance(a, Registration)}
    whole = client.export()
    assert {name: entry["id"] for name, entry in whole["entries"].items()} == ids
    with (
        DaemonProcess(registry_path.with_name("copy.json")),
        RegistryClient(registry_path.with_name("copy.json")) as copy,
    ):
        assert copy.import_entries(whole["entries"], dry_run=True).count("added") == 1300
        assert copy.list() == []
        assert copy.import_entries(whole["entries"]).count("added") == 1300
        assert copy.import_entries(whole["entries"]).count("same") == 1300
        report = copy.import_entries([("n1", whole["entries"]["n1"]), ("bad", {"id": "x"})], mode="replace")
        assert (report.count("same"), report.count("invalid"), report.count("retired")) == (1, 1, 1299)
        assert copy.lookup("n7") == ids["n7"]


def test_backup_is_a_whole_database(client: RegistryClient, registry_path: Path) -> None:
    """A backup is a complete database, readable by its user alone, with nothing beside it."""
    id = make(client, "a")
    folder = registry_path.parent / "elsewhere"
    folder.mkdir()
    file = folder / "backup.db"
    assert client.backup(file) == file.stat().st_size
    assert (file.stat().st_mode & 0o777, [p.name for p in folder.iterdir()]) == (0o600, ["backup.db"])
    with sqlite3.connect(file) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert id in "\n".join(copy.iterdump())
    copy.close()


def test_history_and_watch_tell_every_change_in_order(client: RegistryClient) -> None:
    """The verbs history and watch give events in the order of growing revisions; an idle watch ends empty."""
    make(client, "a")
    client.rename("a", "b")
    events = client.history("b")
    assert [e.kind for e in events if e.kind in ("created", "renamed")] == ["created", "renamed"]
    revisions = [e.revision for e in client.history()]
    assert revisions == sorted(set(revisions))
    assert [e.revision for e in client.watch(revisions[0])] == revisions[1:]
    assert client.watch(revisions[-1], 0.05) == []
