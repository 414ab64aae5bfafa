"""LocalRegistryManager against a real daemon: what it reads, renames, cleans, exports and imports."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from classic import OTHER_ULID, ULID, Classic
from conftest import Workers
from helpers import DaemonProcess, until
from madsci_registry import (
    LocalRegistry,
    LocalRegistryManager,
    RegistryClient,
    RegistryEntry,
    RegistryError,
    RegistryLockError,
    UnavailableError,
)
from madsci_registry.errors import InvalidError, NameTakenError, NotFoundError

# reading


def test_lookup_is_the_ulid_or_none(classic: Classic) -> None:
    """Lookup gives the ULID of a known name, held or not, and None for one that nobody has."""
    manager = classic.manager()
    id = manager.resolve("arm", "node")
    assert manager.lookup("arm") == classic.manager().lookup("arm") == id
    assert manager.lookup("nobody") is None


def test_reads_that_cannot_be_answered_raise(
    classic: Classic, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None and [] mean absent: where the daemon is not there, all reads raise; none answers as if all were empty."""
    monkeypatch.setenv("MADSCI_REGISTRY_AUTOSTART", "0")
    monkeypatch.setattr("madsci_registry.local_registry.LocalRegistryManager.FILE_LOCK_TIMEOUT", 0.5)
    classic.manager().resolve("arm", "node", acquire_lock=False)
    daemon.kill()
    manager = classic.manager()
    reads: list[Any] = [lambda: manager.lookup("arm"), lambda: manager.get_entry("arm"), manager.list_entries]
    for read in (*reads, manager.export, manager.clean_stale, lambda: manager.rename("arm", "leg")):
        with pytest.raises(RegistryError) as unanswered:
            read()
        assert unanswered.value.code == "unavailable"


@pytest.mark.parametrize("autostart", ["0", "1"])
def test_registry_that_does_not_exist_yet_is_empty(
    registry_path: Path, monkeypatch: pytest.MonkeyPatch, autostart: str
) -> None:
    """Where there is no registry yet, reads say so by None and empty answers; they start no daemon and make no file."""
    monkeypatch.setenv("MADSCI_REGISTRY_AUTOSTART", autostart)
    monkeypatch.setattr("madsci_registry.local_registry.LocalRegistryManager.FILE_LOCK_TIMEOUT", 0.5)
    with Classic(registry_path.parent / "sub" / "registry.json") as classic:
        manager = classic.manager()
        assert (manager.lookup("arm"), manager.get_entry("arm"), manager.list_entries()) == (None, None, [])
        assert manager.clean_stale() == [] and manager.export()["entries"] == {}
        manager.release("arm")
    assert not list(registry_path.parent.iterdir())


def test_socket_without_a_daemon_is_no_empty_registry(registry_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only a socket is known and nobody serves it, a lookup cannot know that the name is absent, and raises."""
    monkeypatch.setenv("MADSCI_REGISTRY_SOCKET", str(registry_path.with_suffix(".sock")))
    monkeypatch.setattr("madsci_registry.local_registry.LocalRegistryManager.FILE_LOCK_TIMEOUT", 0.5)
    manager = LocalRegistryManager()
    assert manager.registry_path is None
    with pytest.raises(UnavailableError):
        manager.lookup("arm")


def test_get_entry_tells_all_about_a_name(classic: Classic) -> None:
    """get_entry has id, type, metadata, instants and the lock with its holder; None for a name that nobody has."""
    manager = classic.manager()
    id = manager.resolve("arm", "node", {"rack": 3})
    entry = manager.get_entry("arm")
    assert isinstance(entry, RegistryEntry) and (entry.id, entry.component_type) == (id, "node")
    assert entry.metadata == {"rack": 3} and entry.created_at <= entry.last_seen
    mine = manager.lock_manager
    assert entry.lock is not None and entry.is_locked() and entry.is_locked_by(mine.instance_id)
    assert (entry.lock.holder_pid, entry.lock.holder_host) == (mine.pid, mine.hostname)
    assert entry.lock.expires_at - entry.lock.heartbeat_at == mine.lock_ttl
    manager.release("arm")
    released = manager.get_entry("arm")
    assert released is not None and released.lock is None
    assert manager.get_entry("nobody") is None


def test_list_entries_is_all_by_name(classic: Classic) -> None:
    """list_entries gives (name, entry) in the order of names, of one type if asked."""
    manager = classic.manager()
    ids = {name: manager.resolve(name, kind) for name, kind in (("b", "node"), ("a", "module"), ("c", "node"))}  # type: ignore[arg-type]
    assert [(name, entry.id) for name, entry in manager.list_entries()] == sorted(ids.items())
    assert [name for name, _ in manager.list_entries("node")] == ["b", "c"]
    assert all(entry.is_locked() for _, entry in manager.list_entries())
    with pytest.raises(RegistryError, match="component_type"):
        manager.list_entries("robot")  # type: ignore[arg-type]


def test_list_entries_shows_what_a_crashed_holder_had(classic: Classic, workers: Workers) -> None:
    """The name of a holder that was killed is listed like any other, as free, at once."""
    worker = workers()
    worker.ask("resolve", "arm")
    manager = classic.manager()
    assert [(name, entry.is_locked()) for name, entry in manager.list_entries()] == [("arm", True)]
    worker.kill()
    until(lambda: [(n, e.is_locked()) for n, e in manager.list_entries()] == [("arm", False)])


# changing


def test_clean_stale_retires_and_keeps_the_ulid(classic: Classic, plain: RegistryClient) -> None:
    """clean_stale puts away what nobody holds and nobody has seen for so long; the ULID is kept, and resolving the name
    brings both back."""
    manager = classic.manager()
    ids = {name: manager.resolve(name, "node") for name in ("held", "old")}
    manager.release("old")
    assert manager.clean_stale() == [] == manager.clean_stale(7, True)
    assert manager.clean_stale(0, dry_run=True) == ["old"] and plain.get("old").state == "free"
    assert manager.clean_stale(older_than_days=0) == ["old"] and plain.get("old").state == "retired"
    assert manager.clean_stale(0) == []
    assert [name for name, _ in manager.list_entries()] == ["held"]
    assert [name for name, _ in manager.list_entries(include_stale=True)] == ["held", "old"]
    assert manager.lookup("old") == ids["old"] == manager.resolve("old", "node")
    assert [name for name, _ in manager.list_entries()] == ["held", "old"]


def test_clean_stale_counts_days(classic: Classic) -> None:
    """What was seen eight days ago is stale after seven, not after nine; a number of days that is none is refused."""
    manager, seen = classic.manager(), datetime.now(timezone.utc) - timedelta(days=8)
    manager.import_entries({"entries": {"arm": {"id": ULID, "component_type": "node", "last_seen": seen}}})
    assert (manager.clean_stale(9), manager.clean_stale(dry_run=True)) == ([], ["arm"])
    assert manager.clean_stale(400_000) == []  # in the year 931
    for wrong in ("soon", 10**12):
        with pytest.raises(InvalidError, match="older_than_days"):
            manager.clean_stale(wrong)  # type: ignore[arg-type]


def test_rename_moves_the_ulid(classic: Classic) -> None:
    """Rename gives the ULID another name and returns it; the old name is nobody's."""
    manager = classic.manager()
    id = manager.resolve("arm", "node", acquire_lock=False)
    assert manager.rename("arm", "leg") == id == manager.lookup("leg")
    assert manager.lookup("arm") is None


def test_rename_that_cannot_be_is_refused(classic: Classic) -> None:
    """A name that nobody has, or a new one that somebody has, the old one too, is a RegistryError, not one of locks."""
    manager = classic.manager()
    for name in ("arm", "leg"):
        manager.resolve(name, "node", acquire_lock=False)
    errors = {("nobody", "x"): NotFoundError, ("nobody", "nobody"): NotFoundError}
    errors |= {("arm", "leg"): NameTakenError, ("arm", "arm"): NameTakenError}  # type: ignore[dict-item]
    for names, error in errors.items():
        with pytest.raises(error) as refused:
            manager.rename(*names)
        assert not isinstance(refused.value, RegistryLockError)


def test_rename_of_a_held_name_needs_force_and_leaves_the_lock(classic: Classic) -> None:
    """A held name is refused, one's own too; with force the holder keeps the lock, under the new name."""
    manager, other = classic.manager(), classic.manager()
    id = manager.resolve("arm", "node")
    for who in (manager, other):
        with pytest.raises(RegistryLockError) as refused:
            who.rename("arm", "leg")
        assert refused.value.code == "held"
    assert other.rename("arm", "leg", force=True) == id
    entry = other.get_entry("leg")
    assert entry is not None and entry.is_locked_by(manager.lock_manager.instance_id)


def test_export_is_a_whole_registry(classic: Classic) -> None:
    """Export is a registry in the format of registry.json, held and retired names included."""
    manager = classic.manager()
    id = manager.resolve("arm", "node", {"rack": 3})
    manager.resolve("old", "module", acquire_lock=False)
    manager.clean_stale(0)
    whole = manager.export()
    assert set(whole) == {"version", "created_at", "updated_at", "entries"} and set(whole["entries"]) == {"arm", "old"}
    entry = LocalRegistry.model_validate(whole).entries["arm"]
    assert (entry.id, entry.metadata) == (id, {"rack": 3}) and entry.is_locked_by(manager.lock_manager.instance_id)


def test_import_adds_and_comes_back_from_an_export(classic: Classic, registry_path: Path) -> None:
    """What one registry exports another one takes in: ULIDs, instants, metadata and workcell, but not the locks."""
    manager = classic.manager()
    manager.resolve("arm", "node", {"rack": 3})
    extra = RegistryEntry(id=ULID, component_type="workcell", workcell_id="w1")
    manager.import_entries({"entries": {"cell": extra}})
    exported = manager.export()
    with Classic(registry_path.with_name("other.json")) as elsewhere:
        copy = elsewhere.manager()
        copy.import_entries(exported)
        copied = copy.export()["entries"]
        cell = copy.get_entry("cell")
        assert copied["arm"] == {**exported["entries"]["arm"], "lock": None}
        assert cell is not None and (cell.id, cell.workcell_id, cell.created_at) == (ULID, "w1", extra.created_at)
        assert elsewhere.manager().resolve("arm", "node") == exported["entries"]["arm"]["id"]


def test_import_never_rebinds(classic: Classic, caplog: pytest.LogCaptureFixture) -> None:
    """An entry that contradicts what is known is left out, with a warning; the rest is taken in."""
    manager = classic.manager()
    id = manager.resolve("arm", "node")
    entries = {"arm": {"id": ULID, "component_type": "node"}, "leg": {"id": OTHER_ULID, "component_type": "node"}}
    manager.import_entries({"entries": entries})
    assert (manager.lookup("arm"), manager.lookup("leg")) == (id, OTHER_ULID)
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "'arm' was left as it is" in r.message]


def test_import_in_place_retires_what_is_missing(classic: Classic, caplog: pytest.LogCaptureFixture) -> None:
    """merge=False retires what the import lacks, with its ULID kept; what is held stays, with a warning."""
    manager = classic.manager()
    manager.resolve("held", "node")
    id = manager.resolve("old", "node", acquire_lock=False)
    manager.import_entries({"entries": {"new": {"id": ULID, "component_type": "node"}}}, merge=False)
    assert [name for name, _ in manager.list_entries()] == ["held", "new"]
    assert manager.lookup("old") == id
    assert any("'held' was left as it is" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (5, "data"),
        ({"entries": 5}, "entries"),
        ({"entries": {"ok": {"id": ULID, "component_type": "node"}, "x": {"component_type": "node"}}}, "entries.x.id"),
        (
            {"entries": {"ok": {"id": ULID, "component_type": "node"}, "": {"id": ULID, "component_type": "node"}}},
            "name",
        ),
        ({"entries": {"x": {"id": ULID, "component_type": "robot"}}}, "component_type"),
        ({"entries": {"x": {"id": ULID, "component_type": "node", "metadata": {"y": object()}}}}, "entries"),
    ],
)
def test_import_of_what_is_no_registry_changes_nothing(classic: Classic, data: Any, why: str) -> None:
    """One entry that is none refuses the whole import, by name."""
    with pytest.raises(InvalidError, match=why):
        classic.manager().import_entries(data)
    assert classic.manager().list_entries() == []


def test_import_keeps_an_id_that_is_no_ulid(classic: Classic) -> None:
    """What MADSci's converter of old definitions imports keeps its id as it is, though it is no ULID."""
    manager, id = classic.manager(), "6c0e3b5e-5a5f-4d0c-9d5b-0c2f6d0f5a11"
    manager.import_entries({"version": 1, "entries": {"arm": {"id": id, "component_type": "node"}}})
    assert manager.lookup("arm") == manager.resolve("arm", "node") == id


def test_import_without_entries_replaces_nothing(classic: Classic) -> None:
    """Data without entries adds nothing, and does not pass for an empty registry that is to replace this one."""
    manager = classic.manager()
    manager.resolve("arm", "node", acquire_lock=False)
    manager.import_entries({})
    with pytest.raises(InvalidError, match="no entries"):
        manager.import_entries({}, merge=False)
    manager.import_entries({"entries": {}}, merge=False)
    assert manager.list_entries() == []
