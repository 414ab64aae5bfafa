"""One component, two ULIDs: what the lab prefers, what stays known, what a holder and old programs see of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from filed import FiledPair
from madsci_registry import registry_json
from madsci_registry.types import OldLock
from madsci_registryd import database, fragments, merging
from madsci_registryd.adoption import adopt
from madsci_registryd.batch import Write
from madsci_registryd.bridge import FREE_S
from madsci_registryd.lab_conflicts import NOTED_A_TURN, Objections, Unapplied, note_conflict
from madsci_registryd.restore import restore_backup
from madsci_registryd.settings import Settings
from madsci_registryd.store import Store
from pair import Client, Pair

LABS, OTHER, THIRD = (f"01M86NDR2BZN87TH2B3SP1N00{n}" for n in range(3))
AT = "2026-01-01T00:00:00.000000Z"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "registry.db")
    yield pair
    pair.close()


@pytest.fixture
def filed(tmp_path: Path) -> Iterator[FiledPair]:
    pair = FiledPair(tmp_path)
    yield pair
    pair.close()


def made(client: Client, name: str = "arm") -> str:
    return str(client.resolve(name, acquire_lock=False).ok()["id"])


def prefer(pair: Pair, name: str, id: str, preferred: str = LABS) -> None:
    """The lab says that another ULID is preferred for a name."""
    note_conflict(pair.core, name, id, preferred)
    pair.commit()


def kinds(client: Client, name: str) -> list[str]:
    return [event["kind"] for event in client.send("history", name=name).ok()["events"]]


# what the lab prefers


def test_ulid_that_the_lab_prefers_is_taken_over_at_once_where_nobody_holds_the_name(pair: Pair) -> None:
    """A free name has the lab's ULID at once; the one that it had stays known for ever, as the same component."""
    a = pair.session("a")
    old = made(a)
    prefer(pair, "arm", old)
    component = a.get("arm")
    assert (component["id"], component["other_ids"], component["preferred_id"]) == (LABS, [old], None)
    assert made(a) == LABS
    for id in (LABS, old):
        assert a.send("whois", id=id).ok()["component"]["name"] == "arm"
    pair.restart()
    b = pair.session("b")
    assert b.send("whois", id=old).ok()["component"]["id"] == LABS
    assert database.faults_of(pair.core.db) == []


def test_holder_is_told_and_keeps_its_ulid_until_it_has_gone(pair: Pair) -> None:
    """Who holds the name is told of the conflict, once, and its ULID does not change under it, nor for others."""
    a, b = pair.session("a"), pair.session("b")
    grant = a.resolve("arm").ok()
    for _ in range(2):
        note_conflict(pair.core, "arm", grant["id"], LABS)
    for _ in range(2):
        prefer(pair, "arm", grant["id"])
    token = grant["fencing_token"]
    told = {"name": "arm", "instance": "i", "fencing_token": token, "id": grant["id"], "preferred": LABS}
    assert pair.told == [("a", {"op": "conflict", **told})]
    assert b.get("arm")["id"] == grant["id"] and b.get("arm")["preferred_id"] == LABS
    assert made(b) == grant["id"]
    assert kinds(a, "arm") == ["created", "granted", "conflict"]
    assert pair.core.store.preferred_count() == 1
    a.release("arm", token)
    assert b.resolve("arm").ok()["id"] == LABS
    assert pair.core.store.preferred_count() == 0


def test_holder_that_resolves_anew_has_the_preferred_ulid_with_its_lock(pair: Pair) -> None:
    """A resolve by the holder itself takes the ULID over; its lock and its token stay, and end by its release."""
    a = pair.session("a")
    grant = a.resolve("arm").ok()
    prefer(pair, "arm", grant["id"])
    again = a.resolve("arm").ok()
    assert (again["id"], again["fencing_token"]) == (LABS, grant["fencing_token"])
    assert a.get("arm")["state"] == "held"
    assert database.faults_of(pair.core.db) == []
    assert a.release("arm", grant["fencing_token"])
    assert pair.core.store.counts()[2] == 0


def test_lock_that_two_requests_share_is_shared_over_a_change_of_ulid(pair: Pair) -> None:
    """A request that is withdrawn does not end a lock that another one was answered with too, whatever its ULID."""
    a = pair.session("a")
    first = a.resolve("arm", seq=50).ok()
    a.resolve("arm", seq=51).ok()
    prefer(pair, "arm", first["id"])
    a.resolve("arm", seq=52).ok()
    for seq, state in ((50, "held"), (52, "held"), (51, "free")):
        pair.core.registrar.cancel(a.record, seq)
        pair.commit()
        assert a.get("arm")["state"] == state


def test_change_is_told_as_events(pair: Pair) -> None:
    """`preferred` says which ULID a component has had, and by whose word it has another one; the history of the name
    is that of all its ULIDs."""
    a = pair.session("a")
    old = made(a)
    prefer(pair, "arm", old)
    a.send("retire", name="arm", id=LABS).ok()
    events = a.send("history", name="arm").ok()["events"]
    assert [(e["kind"], e["id"]) for e in events] == [
        ("created", old),
        ("conflict", old),
        ("preferred", LABS),
        ("retired", LABS),
    ]
    assert events[1]["why"] == {"preferred": LABS, "by": "lab"}
    assert events[2]["why"] == {"was": old, "by": "lab"}
    a.send("rename", old="arm", new="leg", id=LABS).ok()
    assert kinds(a, "leg") == ["created", "conflict", "preferred", "retired", "renamed"]


def test_lab_that_prefers_the_first_ulid_again_is_followed(pair: Pair) -> None:
    """A person may decide the other way: the ULIDs change places, and both stay known."""
    a = pair.session("a")
    old = made(a)
    prefer(pair, "arm", old)
    prefer(pair, "arm", LABS, old)
    assert (a.get("arm")["id"], a.get("arm")["other_ids"]) == (old, [LABS])
    prefer(pair, "arm", old, THIRD)
    assert (a.get("arm")["id"], a.get("arm")["other_ids"]) == (THIRD, sorted([old, LABS]))


def test_conflict_that_was_decided_for_the_present_ulid_is_over(pair: Pair) -> None:
    """Where the lab prefers the ULID that the holder has after all, it stays the component's own."""
    a = pair.session("a")
    grant = a.resolve("arm").ok()
    prefer(pair, "arm", grant["id"])
    prefer(pair, "arm", grant["id"], grant["id"])
    assert a.get("arm")["preferred_id"] is None
    a.release("arm", grant["fencing_token"])
    assert a.resolve("arm").ok()["id"] == grant["id"]


def test_ulid_of_another_component_is_not_taken_over(pair: Pair) -> None:
    """A ULID that is another component's here, under whatever name, is nobody else's: nothing changes."""
    a = pair.session("a")
    arm, leg = made(a, "arm"), made(a, "leg")
    prefer(pair, "leg", leg)
    revision = pair.core.store.revision
    for taken in (leg, LABS):
        prefer(pair, "arm", arm, taken)
        assert a.get("arm")["id"] == arm and a.get("arm")["preferred_id"] is None
    assert pair.core.store.revision == revision


def test_ulid_that_became_anothers_meanwhile_is_not_taken_over(pair: Pair) -> None:
    """What the lab preferred and is another component's by the time of the next resolve stays that one's."""
    a = pair.session("a")
    grant = a.resolve("arm").ok()
    prefer(pair, "arm", grant["id"])
    assert imported(a, leg={"id": LABS, "component_type": "node"}) == [("leg", "added", "")]
    a.release("arm", grant["fencing_token"])
    assert a.resolve("arm").ok()["id"] == grant["id"]
    assert a.get("leg")["id"] == LABS


def test_two_words_of_the_lab_in_one_turn_are_judged_one_after_the_other(pair: Pair) -> None:
    """The second word about a ULID that the first one has changed is out of date."""
    a = pair.session("a")
    arm = made(a)
    note_conflict(pair.core, "arm", arm, LABS)
    prefer(pair, "arm", arm, THIRD)
    assert (a.get("arm")["id"], a.get("arm")["other_ids"]) == (LABS, [arm])


def test_word_of_the_lab_about_a_component_that_has_changed_is_nothing(pair: Pair) -> None:
    """What the lab said of a name with a ULID that it has no longer, or of an unknown name, changes nothing."""
    a = pair.session("a")
    arm = made(a)
    prefer(pair, "arm", THIRD)
    prefer(pair, "unknown", THIRD)
    assert a.get("arm")["id"] == arm


def test_lab_cannot_give_a_component_ulids_without_end(pair: Pair) -> None:
    """A component has a hundred other ULIDs at most, whatever a lab says."""
    a = pair.session("a")
    id = made(a)
    for n in range(merging.OTHER_IDS_MAX + 5):
        prefer(pair, "arm", id, f"01M86NDR2BZN87TH2B3SP1{n:04}")
        id = a.get("arm")["id"]
    assert len(a.get("arm")["other_ids"]) == merging.OTHER_IDS_MAX
    assert len(a.send("history", name="arm").ok()["events"]) == 50


def test_rename_ends_a_conflict_that_is_not_taken_over_yet(pair: Pair) -> None:
    """The lab's ULID is preferred for a name: a component that has left that name keeps its own."""
    a = pair.session("a")
    grant = a.resolve("arm").ok()
    prefer(pair, "arm", grant["id"])
    a.send("rename", old="arm", new="leg", id=grant["id"], force=True).ok()
    a.release("leg", grant["fencing_token"])
    assert a.resolve("leg").ok()["id"] == grant["id"]
    assert a.get("leg")["preferred_id"] is None


# who names the other ULID


def test_verbs_take_either_ulid(pair: Pair) -> None:
    """Who expects a ULID that is not preferred any more means that component: rename, retire, revive, metadata."""
    a = pair.session("a")
    old = made(a)
    prefer(pair, "arm", old)
    assert a.send("set_metadata", name="arm", id=old, set={"x": 1}).ok()["component"]["metadata"] == {"x": 1}
    assert a.send("retire", name="arm", id=old).ok()["changed"]
    assert a.send("revive", name="arm", id=old).ok()["changed"]
    for changed in (True, False):
        assert a.send("rename", old="arm", new="leg", id=old).ok()["changed"] is changed
    assert a.send("retire", name="leg", id=THIRD).code == "conflict"


def test_old_name_leads_to_the_component_whatever_its_ulid(pair: Pair) -> None:
    """Where a name went by a rename is known though the component has another ULID since."""
    a = pair.session("a")
    old = made(a)
    a.send("rename", old="arm", new="leg", id=old).ok()
    prefer(pair, "leg", old)
    error = a.send("get", name="arm").error()
    assert (error.renamed_to, error.id) == ("leg", LABS)  # type: ignore[attr-defined]


def imported(client: Client, **entries: dict[str, Any]) -> list[tuple[str, ...]]:
    return list(client.send("import", upload="u", entries=list(entries.items()), last=True).ok()["report"])


def test_import_of_either_ulid_is_the_same_component(pair: Pair) -> None:
    """An entry that has a ULID which is not preferred is that component, and no conflict."""
    a = pair.session("a")
    old = made(a)
    prefer(pair, "arm", old)
    for id in (old, LABS):
        assert imported(a, arm={"id": id, "component_type": "node"}) == [("arm", "same", "")]
    assert imported(a, leg={"id": old, "component_type": "node"})[0][1] == "conflict"


def test_export_and_import_carry_all_ulids(pair: Pair, tmp_path: Path) -> None:
    """What one registry exports another one imports with all its ULIDs; a component that has one says so alone."""
    a = pair.session("a")
    old = made(a)
    made(a, "plain")
    prefer(pair, "arm", old)
    entries = a.send("export").ok()["entries"]
    assert entries["arm"]["other_ids"] == [old] and "other_ids" not in entries["plain"]
    there = Pair(tmp_path / "there.db")
    b = there.session("b")
    imported(b, **entries)
    assert b.send("whois", id=old).ok()["component"]["id"] == LABS
    there.close()


@pytest.mark.parametrize("others", ["no list", [1, None], ["\n"], [{}], [LABS], None, {}])
def test_other_ulids_that_are_none_are_left_out(pair: Pair, others: Any) -> None:
    """What an entry calls its other ULIDs is taken in only where it can be one, and is not known already."""
    a = pair.session("a")
    entry = {"id": LABS, "component_type": "node", "other_ids": others}
    assert imported(a, arm=entry) == [("arm", "added", "")]
    assert a.get("arm")["other_ids"] == []


def test_other_ulid_that_is_anothers_stays_anothers(pair: Pair) -> None:
    """An imported entry takes no ULID from a component that has it."""
    a = pair.session("a")
    leg = made(a, "leg")
    imported(a, arm={"id": LABS, "component_type": "node", "other_ids": [leg, OTHER]})
    assert a.get("arm")["other_ids"] == [OTHER]
    assert a.send("whois", id=leg).ok()["component"]["name"] == "leg"


# registry.json and old programs


def test_registry_json_has_the_preferred_ulid_and_the_others(filed: FiledPair) -> None:
    """The file follows within a second, and an old program that comes then has the preferred ULID."""
    old = made(filed.session("new"))
    prefer(filed, "arm", old)
    filed.wait(1.0)
    assert (filed.entry("arm")["id"], filed.entry("arm")["other_ids"]) == (LABS, [old])
    filed.wait(FREE_S + 2)
    filed.wait(1.0)
    assert filed.old().resolve("arm") == LABS


def test_old_program_that_writes_the_old_ulid_means_the_same_component(filed: FiledPair) -> None:
    """An old ULID that is written back is no conflict: its lock counts, its metadata come in, the file is repaired."""
    new = filed.session("new")
    old = made(new)
    prefer(filed, "arm", old)
    filed.wait(1.0)
    filed.wait(FREE_S + 2)
    filed.wait(1.0)
    program = filed.old()
    program.resolve("arm", metadata={"x": 1})

    def write_back(entries: dict[str, Any]) -> None:
        entries["arm"]["id"] = old
        entries["arm"]["metadata"] = {"x": 2}
        del entries["arm"]["other_ids"]

    program.edit(write_back)
    filed.turn()
    filed.wait(1.0)
    assert (filed.entry("arm")["id"], filed.entry("arm")["other_ids"]) == (LABS, [old])
    component = new.get("arm")
    assert (component["id"], component["metadata"], component["state"]) == (LABS, {"x": 2}, "held")
    assert "refused" not in kinds(new, "arm")
    assert filed.bridge.status()["refused"] == 0


def test_old_program_that_renames_with_the_old_ulid_renames_the_component(filed: FiledPair) -> None:
    """One name gone and one new with a ULID that is not preferred is a rename; the file has the preferred one again."""
    new = filed.session("new")
    old = made(new)
    prefer(filed, "arm", old)
    filed.wait(1.0)

    def rename(entries: dict[str, Any]) -> None:
        entries["leg"] = {**entries.pop("arm"), "id": old}

    filed.edit(rename)
    filed.turn()
    filed.wait(1.0)
    assert new.get("leg")["id"] == LABS
    assert filed.entry("leg")["id"] == LABS and "arm" not in filed.old().read()["entries"]
    assert filed.bridge.status()["refused"] == 0


def test_old_program_that_does_not_know_of_other_ulids_loses_none(filed: FiledPair) -> None:
    """MADSci's own model drops the member when it writes: here nothing changes, and our next write has it again."""
    new = filed.session("new")
    old = made(new)
    prefer(filed, "arm", old)
    filed.wait(1.0)

    def forget(entries: dict[str, Any]) -> None:
        del entries["arm"]["other_ids"]

    filed.edit(forget)
    filed.turn()
    assert new.get("arm")["other_ids"] == [old]
    assert filed.bridge.status()["refused"] == 0
    made(new, "leg")
    filed.wait(1.0)
    assert filed.entry("arm")["other_ids"] == [old]


@pytest.mark.parametrize("turns", [0, 1])
def test_renamed_component_with_another_ulid_is_in_the_file_once(filed: FiledPair, turns: int) -> None:
    """A rename just after a change of ULID leaves nothing of the old name, whether or not the file has the new ULID."""
    new = filed.session("new")
    old = made(new)
    filed.wait(1.0)
    prefer(filed, "arm", old)
    filed.wait(1.0 * turns)
    new.send("rename", old="arm", new="leg", id=LABS).ok()
    filed.wait(1.0)
    filed.wait(1.0)
    entries = filed.old().read()["entries"]
    assert {name: entry["id"] for name, entry in entries.items()} == {"leg": LABS}


def test_change_of_ulid_and_rename_in_one_commit_leave_nothing_of_the_old_name(filed: FiledPair) -> None:
    """The file, which has the old name with the old ULID still, has neither afterwards."""
    new = filed.session("new")
    old = made(new)
    filed.wait(1.0)
    filed.hold_passes = True
    asked = new.send("rename", old="arm", new="leg", id=old)
    note_conflict(filed.core, "arm", old, LABS)
    filed.bridge.done(filed.export.run(filed.jobs.pop()), was_asked=True)
    filed.hold_passes = False
    filed.turn()
    assert asked.ok()["component"]["id"] == LABS
    filed.wait(1.0)
    filed.wait(1.0)
    assert {name: entry["id"] for name, entry in filed.old().read()["entries"].items()} == {"leg": LABS}


def test_rename_by_the_old_ulid_is_kept_from_old_programs(filed: FiledPair) -> None:
    """A rename that names the ULID which is not preferred is done, with the file, as any other."""
    new = filed.session("new")
    old = made(new)
    prefer(filed, "arm", old)
    filed.wait(1.0)
    assert new.send("rename", old="arm", new="leg", id=old).ok()["changed"]
    filed.wait(1.0)
    assert [*filed.old().read()["entries"]] == ["leg"]


def test_daemon_that_was_killed_before_the_file_had_the_preferred_ulid_brings_it_there(filed: FiledPair) -> None:
    """After a kill between the change of ULID and its write, the next daemon writes it and refuses nothing."""
    old = made(filed.session("new"))
    filed.wait(1.0)
    filed.hold_passes = True
    prefer(filed, "arm", old)
    filed.kill()
    filed.hold_passes = False
    filed.revive()
    filed.wait(1.0)
    assert filed.entry("arm")["id"] == LABS
    assert filed.session("again").get("arm")["other_ids"] == [old]
    assert filed.bridge.status()["refused"] == 0


def test_lost_database_has_all_ulids_again_from_registry_json(filed: FiledPair) -> None:
    """A new database that finds registry.json knows the ULIDs that are not preferred, too."""
    old = made(filed.session("new"))
    prefer(filed, "arm", old)
    filed.wait(1.0)
    filed.kill()
    for path in filed.path.parent.glob("registry.db*"):
        path.unlink()
    filed.revive()
    assert filed.session("again").send("whois", id=old).ok()["component"]["id"] == LABS


def test_name_that_a_file_brings_with_the_old_ulid_is_known(pair: Pair) -> None:
    """To take in a name again with a ULID that is not preferred is nothing new, and no conflict."""
    old = made(pair.session("a"))
    prefer(pair, "arm", old)
    results: list[Any] = []
    entry = {"id": old, "component_type": "node"}
    pair.core.registrar.submit(Write(lambda tx: adopt(pair.core.service, tx, "arm", entry), results.append))
    pair.commit()
    assert results == [None]


def test_old_lock_goes_with_its_component(pair: Pair) -> None:
    """A component that an old program holds is held by it under another ULID."""
    a = pair.session("a")
    old = made(a)
    at = {"acquired_at": AT, "heartbeat_at": AT, "expires_at": AT}
    lock = OldLock(holder_pid=1, holder_host="there", holder_instance="i", **at)
    with pair.core.db:
        pair.core.store.set_old_lock(old, lock)
        pair.core.store.change_id(old, LABS)
    assert a.get("arm")["old_lock"]["holder_host"] == "there"
    assert database.faults_of(pair.core.db) == []


def test_text_of_an_entry_has_its_other_ulids() -> None:
    """What the file said of other ULIDs is in what is written of it next."""
    entry = {"id": LABS, "component_type": "node", "other_ids": [OTHER, LABS, 7]}
    assert json.loads(b"{%b}" % fragments.of_entry(entry).text)["other_ids"] == [OTHER]


def test_difference_knows_other_ulids_of_what_it_compares() -> None:
    """A name that is new in the file, with a ULID that is not preferred, is its component's."""
    arm: dict[str, Any] = {"id": LABS, "component_type": "node", "other_ids": [OTHER], "lock": None, "metadata": {}}
    base = {"arm": arm}
    known = json.dumps({"version": 1, "entries": base}).encode()
    found = json.dumps({"version": 1, "entries": {**base, "leg": {**arm, "id": OTHER}}}).encode()
    merged = merging.merge(merging.difference(known, found), claimed=())
    assert [(refusal.what, refusal.name) for refusal in merged.refused] == [("id", "leg")]
    assert registry_json.parse(found).whole


# restore


def registry(folder: Path, name: str = "registry.db") -> Store:
    """Make a database, to be filled and closed."""
    folder.mkdir(exist_ok=True)
    return Store(database.open_database(folder / name))


def restored(folder: Path, backup: Path) -> tuple[list[str], Store]:
    report = restore_backup(Settings(registry=folder / "registry.json"), backup)
    return report, Store(database.open_database(folder / "registry.db"))


def test_restore_of_an_older_backup_keeps_the_ulid_that_was_preferred_since(tmp_path: Path) -> None:
    """A backup from before the change of ULID adds nothing to a database that has made it."""
    for folder, other in ((tmp_path / "live", True), (tmp_path / "backup", False)):
        store = registry(folder)
        with store.db:
            store.add_component(OTHER, "arm", "node", AT, "{}")
            if other:
                store.change_id(OTHER, LABS)
        store.db.close()
    report, store = restored(tmp_path / "live", tmp_path / "backup" / "registry.db")
    assert "nothing to do" in report[0]
    assert [(row.name, row.id) for row in store.components(limit=10)] == [("arm", LABS)]
    store.db.close()


def test_restore_takes_over_the_ulid_that_a_newer_source_prefers(tmp_path: Path) -> None:
    """Where one side knows two ULIDs as one component and the other only the older, both are one after the restore."""
    for folder, other in ((tmp_path / "live", False), (tmp_path / "backup", True)):
        store = registry(folder)
        with store.db:
            store.add_component(OTHER, "arm", "node", AT, "{}")
            if other:
                store.change_id(OTHER, LABS)
                store.add_other_id(LABS, THIRD)
        store.db.close()
    report, store = restored(tmp_path / "live", tmp_path / "backup" / "registry.db")
    assert len(report) == 2 and not any("conflict" in line for line in report)
    assert [(row.name, row.id) for row in store.components(limit=10)] == [("arm", LABS)]
    assert store.other_ids(LABS) == sorted([OTHER, THIRD])
    assert store.events(0, 10)[0]["kind"] == "preferred"
    assert database.faults_of(store.db) == []
    store.db.close()


def test_restore_keeps_when_a_component_changed_last(tmp_path: Path) -> None:
    """A component that comes from a backup has changed when it did there, so that a later word of the lab stands."""
    live, backup = registry(tmp_path / "live"), registry(tmp_path / "backup")
    with backup.db:
        backup.add_component(LABS, "arm", "node", AT, "{}")
    for store in (live, backup):
        store.db.close()
    _, store = restored(tmp_path / "live", tmp_path / "backup" / "registry.db")
    row = store.by_name("arm")
    assert row is not None and row.changed_at == AT
    store.db.close()


# what the lab objects to


def test_objections_are_noted_some_a_turn_and_told_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """What the lab did not take over is counted each time, and logged once for each component and reason."""
    a = pair.session("a")
    made(a)
    objections = Objections(pair.core)
    for _ in range(2):
        objections.take([Unapplied(name=f"n{n}", id=LABS, reason="newer") for n in range(NOTED_A_TURN)])
        objections.take([Unapplied(name="n", id=OTHER, reason="invalid", why="name: is too long")])
    pair.turn()
    assert objections.counts == {"newer": NOTED_A_TURN}
    for _ in range(5):
        pair.turn()
    assert objections.counts == {"newer": 2 * NOTED_A_TURN, "invalid": 2}
    assert [r.rare.name for r in caplog.records] == ["lab_change_refused"] * 2  # type: ignore[attr-defined]
    assert "name: is too long" in caplog.text


def test_conflict_is_logged_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """A conflict has one line in the log, with both ULIDs, however often the lab says so."""
    id = pair.session("a").resolve("arm").ok()["id"]
    for _ in range(3):
        prefer(pair, "arm", id)
    assert [r.rare.name for r in caplog.records] == ["lab_conflict"]  # type: ignore[attr-defined]
    assert id in caplog.text and LABS in caplog.text


def test_change_that_is_rolled_back_leaves_both_as_they_were(pair: Pair) -> None:
    """A change of ULID is whole or not at all, and the deferred checks of the transaction hold again after it."""
    a = pair.session("a")
    grant = a.resolve("arm").ok()
    db, store = pair.core.db, pair.core.store
    db.execute("BEGIN")
    store.change_id(grant["id"], LABS)
    db.execute("ROLLBACK")
    assert store.by_id(LABS) is None
    row = store.by_id(grant["id"])
    assert row is not None and row.lock is not None
    db.execute("BEGIN")
    store.change_id(grant["id"], LABS)
    with pytest.raises(database.DatabaseError):
        db.execute("INSERT INTO old_locks VALUES ('nobody', 1, '', '', '', '', '')")
    db.execute("ROLLBACK")
