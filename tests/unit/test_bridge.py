"""Old and new programs on one registry.json: real files, a clock to turn, passes in the turn that asks for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ulid

from filed import FiledPair
from madsci_registryd.bridge import FREE_S
from madsci_registryd.export import Job
from madsci_registryd.publication import BUSY_S
from old_program import TTL_S, OldHeldError

DAY_S = 86400.0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[FiledPair]:
    pair = FiledPair(tmp_path)
    yield pair
    pair.close()


# never held by both


def test_name_held_by_a_new_program_is_refused_to_an_old_one(pair: FiledPair) -> None:
    """As soon as a resolve is answered, an old program is refused the name and sees its ULID."""
    id = pair.session("new").resolve("arm").ok()["id"]
    with pytest.raises(OldHeldError):
        pair.old().resolve("arm")
    assert pair.old().resolve("arm", lock=False) == id


def test_name_held_by_an_old_program_is_refused_to_a_new_one(pair: FiledPair) -> None:
    """As soon as an old program has a name, a new one is refused it, and told who has it."""
    old = pair.old(pid=77)
    id = old.resolve("arm")
    asked = pair.session("new").resolve("arm")
    assert asked.code == "held"
    error = asked.error()
    assert error.id == id  # type: ignore[attr-defined]
    assert error.old_lock.holder_pid == 77 and error.old_lock.holder_instance == old.instance  # type: ignore[attr-defined]
    assert "an old program (pid 77 on old-host" in error.message


def test_name_goes_to_and_fro_without_a_pause(pair: FiledPair) -> None:
    """What an old program gives back a new one has at once; what a new one gives back an old one has after 10 s."""
    old, new = pair.old(), pair.session("new")
    id = old.resolve("arm")
    old.release("arm")
    grant = new.resolve("arm").ok()
    assert grant["id"] == id
    with pytest.raises(OldHeldError):
        old.resolve("arm")
    new.release("arm", grant["fencing_token"])
    pair.wait(1.0)
    pair.wait(FREE_S - 1)
    with pytest.raises(OldHeldError):
        old.resolve("arm")
    pair.wait(2.0)
    pair.wait(1.0)
    assert old.resolve("arm") == id
    assert new.resolve("arm").code == "held"


def test_hand_over_between_new_programs_does_not_touch_the_file(pair: FiledPair) -> None:
    """A name that goes from one new program to the next keeps its claim: no pass is made before it is answered."""
    a, b = pair.session("a"), pair.session("b")
    grant = a.resolve("arm").ok()
    pair.wait(5.0)
    pair.hold_passes = True
    a.release("arm", grant["fencing_token"])
    assert b.resolve("arm").code == "ok"
    assert not pair.jobs


def test_killed_daemon_leaves_its_claims(pair: FiledPair) -> None:
    """While no daemon is there, and with the next one, an old program is refused what a living new one holds."""
    pair.session("new").resolve("arm").ok()
    pair.kill()
    with pytest.raises(OldHeldError):
        pair.old().resolve("arm")
    pair.revive()
    pair.wait(FREE_S + 2)
    with pytest.raises(OldHeldError):
        pair.old().resolve("arm")


def test_claim_on_a_free_name_ends_with_the_next_daemon(pair: FiledPair) -> None:
    """A claim that a killed daemon left on a name that nobody holds is gone 10 s after the next one came."""
    new = pair.session("new")
    new.release("arm", new.resolve("arm").ok()["fencing_token"])
    pair.restart()
    pair.wait(FREE_S + 1)
    pair.wait(1.0)
    assert pair.old().resolve("arm")


def test_daemon_that_ends_in_order_leaves_free_names_to_old_programs(pair: FiledPair) -> None:
    """After a stop, old programs have every free name at once, and none that is held."""
    new = pair.session("new")
    new.release("free", new.resolve("free").ok()["fencing_token"])
    new.resolve("held").ok()
    pair.stop()
    assert pair.old().resolve("free")
    with pytest.raises(OldHeldError):
        pair.old().resolve("held")
    pair.revive()


def test_daemon_killed_between_file_and_commit_gives_no_second_ulid(pair: FiledPair) -> None:
    """A name that the file shows, though the daemon died before its commit, has that ULID for ever."""
    new = pair.session("new")
    pair.hold_passes = True
    asked = new.resolve("arm")
    pair.export.run(pair.jobs.pop())
    pair.kill()
    assert asked.reply is None
    id = pair.old().resolve("arm", lock=False)
    pair.hold_passes = False
    pair.revive()
    assert pair.session("again").resolve("arm").ok()["id"] == id


@pytest.mark.parametrize("step_s", [DAY_S, -DAY_S, 400 * DAY_S])
def test_step_of_the_clock_lets_nobody_in(pair: FiledPair, step_s: float) -> None:
    """After the clock was set, in either direction, nobody is granted what a living program of the other kind holds."""
    old, new = pair.old(), pair.session("new")
    old.resolve("by_old")
    new.resolve("by_new").ok()
    pair.wait(5.0)
    pair.clock.jump(step_s)
    assert new.resolve("by_old").code == "held"
    with pytest.raises(OldHeldError):
        old.resolve("by_new")
    pair.restart()
    new = pair.session("another")
    assert new.resolve("by_old").code == "held"
    with pytest.raises(OldHeldError):
        old.resolve("by_new")
    pair.wait(4.0)
    assert old.heartbeat("by_old")
    pair.turn()
    pair.wait(TTL_S - 1)
    assert new.resolve("by_old").code == "held"
    pair.wait(2.0)
    assert new.resolve("by_old").code == "ok"


def test_old_program_that_died_is_over_after_its_own_time(pair: FiledPair) -> None:
    """The lock of an old program that sends no heartbeat any more ends with the 30 s that it asked for."""
    pair.old().resolve("arm")
    new = pair.session("new")
    waiting = new.resolve("arm", wait_s=9.0, renew=True)
    assert waiting.reply is None
    for _ in range(4):
        pair.wait(5.0)
        new.resolve("arm", wait_s=9.0, renew=True, seq=1)
    assert pair.get_state("arm") == "held"
    pair.wait(5.0)
    last = new.resolve("arm", wait_s=9.0, renew=True, seq=1)
    pair.wait(5.5)
    assert last.code == "ok"


def test_waiter_has_the_name_when_the_old_program_gives_it_back(pair: FiledPair) -> None:
    """Who waits for a name that an old program holds is granted it when that gives it back, first come first served."""
    old = pair.old()
    old.resolve("arm")
    first = pair.session("a").resolve("arm", wait_s=9.0, renew=True)
    second = pair.session("b").resolve("arm", wait_s=9.0, renew=True)
    pair.wait(1.0)
    assert first.reply is None and second.reply is None
    old.release("arm")
    pair.turn()
    assert first.code == "ok" and second.reply is None
    with pytest.raises(OldHeldError):
        old.resolve("arm")


def test_lock_that_changes_hands_among_old_programs_stays_theirs(pair: FiledPair) -> None:
    """Heartbeats and hand-overs of old programs are followed, and the file is not written for them."""
    a, b = pair.old(1), pair.old(2)
    a.resolve("arm")
    pair.turn()
    pair.wait(20.0)
    a.heartbeat("arm")
    pair.wait(20.0)
    assert pair.session("n").resolve("arm").code == "held"
    a.release("arm")
    b.resolve("arm")
    before = pair.registry.stat().st_ino, pair.registry.read_bytes()
    asked = pair.session("m").resolve("arm")
    assert asked.error().old_lock.holder_pid == 2  # type: ignore[attr-defined]
    assert (pair.registry.stat().st_ino, pair.registry.read_bytes()) == before


# one ULID


def test_name_without_lock_is_in_the_file_before_it_is_answered(pair: FiledPair) -> None:
    """A new name, also without a lock or among many, is in the file when its resolve is answered."""
    new = pair.session("new")
    id = new.resolve("plain", acquire_lock=False).ok()["id"]
    items = [{"name": f"m{n}", "component_type": "node"} for n in range(3)]
    many = new.send("resolve_many", items=items, instance="i", acquire_lock=True).ok()["results"]
    entries = pair.old().read()["entries"]
    assert entries["plain"]["id"] == id and entries["plain"]["lock"] is None
    for n, result in enumerate(many):
        assert entries[f"m{n}"]["id"] == result["ok"]["id"]
        with pytest.raises(OldHeldError):
            pair.old().resolve(f"m{n}")


def test_name_that_an_old_program_made_has_its_ulid_everywhere(pair: FiledPair) -> None:
    """A name that an old program made just before is answered with the ULID that it has there, whatever verb asks."""
    old, new = pair.old(), pair.session("new")
    ids = {name: old.resolve(name, lock=False) for name in ("a", "b", "c")}
    assert new.resolve("a").ok()["id"] == ids["a"]
    assert new.resolve("b", acquire_lock=False).ok()["id"] == ids["b"]
    items = [{"name": "c", "component_type": "node"}]
    many = new.send("resolve_many", items=items, instance="i", acquire_lock=False).ok()["results"]
    assert many[0]["ok"]["id"] == ids["c"]
    pair.turn()
    assert new.send("lookup", name="c").ok()["id"] == ids["c"]


def test_many_held_by_old_programs_are_refused_one_by_one(pair: FiledPair) -> None:
    """Of many names, those that an old program holds are refused, and the others granted."""
    pair.old().resolve("x")
    items = [{"name": name, "component_type": "node"} for name in ("x", "y")]
    x, y = pair.session("n").send("resolve_many", items=items, instance="i", acquire_lock=True).ok()["results"]
    assert x["error"]["code"] == "held" and "ok" in y


def test_import_and_an_old_program_agree_on_the_ulid(pair: FiledPair) -> None:
    """An import is in the file before it is answered, and what an old program made meanwhile wins."""
    id = pair.old().resolve("both", lock=False)
    ulids = ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "01ARZ3NDEKTSV4RRFFQ69G5FAW")
    entries = [[name, {"id": u, "component_type": "node"}] for name, u in zip(("both", "only"), ulids, strict=True)]
    report = pair.session("n").send("import", upload="u", entries=entries, last=True).ok()["report"]
    assert [outcome for _, outcome, _ in report] == ["conflict", "added"]
    found = pair.old().read()["entries"]
    assert found["both"]["id"] == id and found["only"]["id"] == ulids[1]


def test_rename_is_in_the_file_before_it_is_answered(pair: FiledPair) -> None:
    """An old program finds neither the old nor the new name free while a rename is under way, and then the new one."""
    new = pair.session("new")
    id = new.resolve("before", acquire_lock=False).ok()["id"]
    pair.hold_passes = True
    asked = new.send("rename", old="before", new="after", id=id)
    pair.bridge.pump()
    result = pair.export.run(pair.jobs.pop())
    for name in ("before", "after"):
        with pytest.raises(OldHeldError):
            pair.old().resolve(name)
    pair.hold_passes = False
    pair.bridge.done(result, was_asked=True)
    pair.turn()
    assert asked.code == "ok"
    pair.wait(1.0)
    entries = pair.old().read()["entries"]
    assert "before" not in entries and entries["after"]["id"] == id
    pair.wait(FREE_S + 1)
    pair.wait(1.0)
    assert pair.old().resolve("after") == id


def test_refused_rename_leaves_no_second_name(pair: FiledPair) -> None:
    """A rename that is refused after the file had the new name takes that away again."""
    new, other = pair.session("new"), pair.session("other")
    id = new.resolve("arm").ok()["id"]
    assert other.send("rename", old="arm", new="leg", id=id).code == "held"
    pair.wait(3 * BUSY_S)
    pair.wait(1.0)
    assert list(pair.old().read()["entries"]) == ["arm"]
    fresh = other.resolve("leg").ok()["id"]
    assert fresh != id and pair.entry("leg")["id"] == fresh


def test_request_that_nobody_waits_for_any_more_keeps_its_ulid(pair: FiledPair) -> None:
    """Where the client is gone before its new name is committed, the ULID that the file shows stays all the same."""
    new = pair.session("new")
    pair.hold_passes = True
    new.resolve("arm")
    pair.bridge.pump()
    result = pair.export.run(pair.jobs.pop())
    new.drop()
    pair.hold_passes = False
    pair.bridge.done(result, was_asked=True)
    pair.turn()
    shown = pair.entry("arm")["id"]
    pair.wait(3 * BUSY_S)
    pair.wait(1.0)
    assert pair.session("other").resolve("arm").ok()["id"] == shown


# what old programs change


def test_metadata_is_merged_both_ways(pair: FiledPair) -> None:
    """Keys that an old program sets are set here, and those that a new one sets are in its file."""
    new = pair.session("new")
    id = new.resolve("arm", metadata={"a": 1, "b": 1}, acquire_lock=False).ok()["id"]
    pair.old().resolve("arm", metadata={"b": 2, "c": 3}, lock=False)
    pair.turn()
    assert new.get("arm")["metadata"] == {"a": 1, "b": 2, "c": 3}
    new.send("set_metadata", name="arm", id=id, set={"d": 4}, unset=["a"]).ok()
    pair.wait(1.0)
    assert pair.entry("arm")["metadata"] == {"b": 2, "c": 3, "d": 4}


def test_change_not_yet_exported_survives_a_killed_daemon(pair: FiledPair) -> None:
    """What was answered and not yet in the file when the daemon died is neither undone nor lost by the older file."""
    new = pair.session("new")
    id = new.resolve("arm", metadata={"a": 1}, acquire_lock=False).ok()["id"]
    other = new.resolve("old_name", acquire_lock=False).ok()["id"]
    pair.wait(2.0)
    pair.hold_passes = True
    new.send("set_metadata", name="arm", id=id, set={"a": 2}, unset=[]).ok()
    pair.hold_passes = False
    new.send("rename", old="old_name", new="new_name", id=other).ok()
    pair.kill()
    pair.old().resolve("arm", metadata={"z": 9}, lock=False)
    pair.revive()
    again = pair.session("again")
    assert again.get("arm")["metadata"] == {"a": 2, "z": 9}
    assert again.get("new_name")["id"] == other
    pair.wait(1.0)
    assert pair.entry("arm")["metadata"] == {"a": 2, "z": 9}
    assert pair.entry("new_name")["id"] == other and "old_name" not in pair.old().read()["entries"]


def test_deletion_is_refused_recorded_and_written_again(pair: FiledPair) -> None:
    """A name that an old program deletes stays, is in the file again, and history says what was refused."""
    new = pair.session("new")
    id = new.resolve("arm", acquire_lock=False).ok()["id"]
    pair.edit(lambda entries: entries.clear())
    pair.turn()
    assert pair.entry("arm")["id"] == id
    events = new.send("history", name="arm").ok()["events"]
    assert events[-1]["kind"] == "refused" and events[-1]["why"]["what"] == "deletion"
    assert pair.bridge.status()["refused"] == 1


def test_second_ulid_is_refused_and_recorded_with_its_writer(pair: FiledPair) -> None:
    """Where an old program gives a known name another ULID, the first stays, here and in the file."""
    new = pair.session("new")
    id = new.resolve("arm", acquire_lock=False).ok()["id"]
    old = pair.old(pid=55)

    def change(entries: dict[str, Any]) -> None:
        entries["arm"]["id"] = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
        old._lock(entries["arm"])

    pair.edit(change)
    pair.turn()
    assert pair.entry("arm")["id"] == id == new.send("lookup", name="arm").ok()["id"]
    why = new.send("history", name="arm").ok()["events"][-1]["why"]
    assert why["what"] == "id" and why["writer"]["holder_pid"] == 55
    assert pair.session("n").resolve("arm").code == "held", "its lock counts all the same"
    assert [w["pid"] for w in pair.bridge.status()["old_programs"]] == [55]


def test_rename_by_an_old_program_is_taken_over_if_the_name_is_free(pair: FiledPair) -> None:
    """One name gone and one new with its ULID is a rename; not so where a new program holds the name."""
    new = pair.session("new")
    free = new.resolve("free", acquire_lock=False).ok()["id"]
    held = new.resolve("held").ok()["id"]

    def change(entries: dict[str, Any]) -> None:
        entries["free2"] = entries.pop("free")
        entries["held2"] = {**entries.pop("held"), "lock": None}

    pair.edit(change)
    pair.turn()
    assert new.get("free2")["id"] == free and new.get("held")["id"] == held
    assert new.send("get", name="held2").code == "not_found"
    assert new.send("get", name="free").error().renamed_to == "free2"  # type: ignore[attr-defined]
    entries = pair.old().read()["entries"]
    assert sorted(entries) == ["free2", "held"]
    with pytest.raises(OldHeldError):
        pair.old().resolve("held")


def test_old_program_cannot_take_a_claim_away(pair: FiledPair) -> None:
    """A lock that an old program puts over a claim, or a claim that it deletes, changes nothing for the holder."""
    new = pair.session("new")
    grant = new.resolve("arm").ok()
    old = pair.old(pid=9)

    def steal(entries: dict[str, Any]) -> None:
        entries["arm"]["lock"] = None
        old._lock(entries["arm"])

    pair.edit(steal)
    pair.turn()
    assert new.get("arm")["fencing_token"] == grant["fencing_token"]
    assert not old.heartbeat("arm")
    pair.edit(lambda entries: entries["arm"].update(lock=None))
    pair.turn()
    with pytest.raises(OldHeldError):
        pair.old().resolve("arm")


def test_retired_name_stays_in_the_file_and_an_old_holder_revives_it(pair: FiledPair) -> None:
    """A retired name keeps its entry; an old program that takes it has the same ULID, and the name is in use again."""
    new = pair.session("new")
    id = new.resolve("arm", acquire_lock=False).ok()["id"]
    new.send("retire", name="arm", id=id).ok()
    pair.wait(2.0)
    old = pair.old()
    assert old.resolve("arm") == id
    pair.turn()
    assert new.get("arm")["state"] == "held"
    old.release("arm")
    pair.turn()
    assert new.get("arm")["state"] == "free"
    assert new.send("retire", name="arm", id=id).code == "ok"


def test_name_that_an_old_program_holds_is_neither_renamed_nor_retired(pair: FiledPair) -> None:
    """The lock of an old program keeps a name from being renamed, also by force, and retired."""
    id = pair.old().resolve("arm")
    pair.turn()
    new = pair.session("new")
    assert new.send("rename", old="arm", new="leg", id=id, force=True).code == "held"
    assert new.send("retire", name="arm", id=id).code == "held"
    pair.wait(3 * BUSY_S)
    pair.wait(1.0)
    assert "leg" not in pair.old().read()["entries"]


def test_ends_of_locks_set_last_seen_in_the_file(pair: FiledPair) -> None:
    """A second after a lock ended, the file has that instant as last_seen."""
    new = pair.session("new")
    token = new.resolve("arm").ok()["fencing_token"]
    pair.wait(60.0)
    new.release("arm", token)
    seen = new.get("arm")["last_seen"]
    pair.wait(1.1)
    assert pair.entry("arm")["last_seen"] == seen


# files that are not as they should be


def test_torn_file_frees_nothing_and_is_put_aside(pair: FiledPair) -> None:
    """A file cut off in mid-write is put aside and written anew: no ULID is lost, no lock is freed."""
    new = pair.session("new")
    old = pair.old()
    held = old.resolve("by_old")
    id = new.resolve("by_new").ok()["id"]
    pair.turn()
    pair.registry.write_bytes(pair.registry.read_bytes()[:90])
    pair.turn()
    entries = pair.old().read()["entries"]
    assert entries["by_old"]["id"] == held and entries["by_new"]["id"] == id
    assert new.resolve("by_old").code == "held" and old.heartbeat("by_old")
    with pytest.raises(OldHeldError):
        old.resolve("by_new")
    aside = [path for path in pair.registry.parent.iterdir() if ".broken-" in path.name]
    assert len(aside) == 1 and len(aside[0].read_bytes()) == 90
    assert pair.bridge.status()["put_aside"] == aside[0].name


def test_torn_file_gives_what_it_still_has(pair: FiledPair) -> None:
    """A name that an old program had just made is saved from a file that was cut off behind it."""
    new = pair.session("new")
    new.resolve("known", acquire_lock=False).ok()
    id = pair.old().resolve("made", lock=False)
    text = pair.registry.read_text()
    pair.registry.write_text(text[: text.rindex("}")].rstrip().rstrip("}"))
    pair.turn()
    assert new.send("lookup", name="made").ok()["id"] == id
    json.loads(pair.registry.read_text())


def test_deleted_file_is_written_again(pair: FiledPair) -> None:
    """A file that somebody deletes is there again, with every ULID and claim."""
    id = pair.session("new").resolve("arm").ok()["id"]
    pair.registry.unlink()
    pair.turn()
    assert pair.entry("arm")["id"] == id
    with pytest.raises(OldHeldError):
        pair.old().resolve("arm")


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_what_is_no_file_is_left_alone_and_the_daemon_serves_on(pair: FiledPair, kind: str) -> None:
    """A link, FIFO or folder in the file's place is not followed; names are given without it, and status says so."""
    new = pair.session("new")
    new.resolve("before").ok()
    pair.registry.unlink()
    elsewhere = pair.registry.parent / "elsewhere.json"
    elsewhere.write_text("precious")
    make = {
        "symlink": lambda: pair.registry.symlink_to(elsewhere),
        "fifo": lambda: os.mkfifo(pair.registry),
        "folder": pair.registry.mkdir,
    }
    make[kind]()  # type: ignore[no-untyped-call]
    pair.turn()
    assert new.resolve("during").code == "ok"
    assert pair.bridge.status()["state"] == "stopped" and pair.bridge.degraded()
    assert elsewhere.read_text() == "precious"
    pair.registry.rmdir() if kind == "folder" else pair.registry.unlink()
    pair.wait(1.0)
    assert pair.bridge.status()["state"] == "on" and not pair.bridge.degraded()
    pair.wait(1.0)
    for name in ("before", "during"):
        with pytest.raises(OldHeldError):
            pair.old().resolve(name)


def test_locked_file_is_busy_and_nothing_is_granted(pair: FiledPair) -> None:
    """While an old program keeps the file lock, a new name is refused as busy after 2 s; what is claimed is not."""
    new = pair.session("new")
    token = new.resolve("known").ok()["fencing_token"]
    new.release("known", token)
    pair.hold_passes = True
    asked = new.resolve("unknown")
    pair.wait(BUSY_S + 0.1)
    assert asked.code == "busy"
    assert new.resolve("known").code == "ok"
    pair.hold_passes = False
    pair.turn()
    assert new.resolve("unknown").code == "ok"


def test_empty_registry_of_madsci_init_is_taken_over(tmp_path: Path) -> None:
    """A file that says no more than {"entries": {}} is a registry without names."""
    (tmp_path / "registry.json").write_text('{"entries": {}}')
    pair = FiledPair(tmp_path)
    id = pair.session("n").resolve("arm").ok()["id"]
    assert pair.entry("arm")["id"] == id
    assert not [path for path in tmp_path.iterdir() if "broken" in path.name]
    pair.close()


def test_many_names_come_in_a_few_at_a_time_and_have_their_ulids_at_once(pair: FiledPair) -> None:
    """Of thousands of names that an old program adds, some come in with each turn, and who asks for one of the others
    meanwhile has the ULID that it has in the file, or is refused what an old program holds."""
    new = pair.session("n")
    old = pair.old()
    free = {f"n{n:04}": str(ulid.ULID()) for n in range(1000)}

    def add(entries: dict[str, Any]) -> None:
        for name, id in free.items():
            entries[name] = {"id": id, "component_type": "node", "metadata": {}, "lock": None}
        old._lock(entries["n0998"])

    pair.edit(add)
    pair.bridge.done(pair.export.run(Job()), was_asked=False)
    pair.core.registrar.commit()
    assert pair.core.store.id_of("n0000") is not None and pair.core.store.id_of("n0999") is None
    pair.hold_passes = True
    asked, held = new.resolve("n0999"), new.resolve("n0998")
    pair.hold_passes = False
    turns = 0
    while any(pair.core.store.id_of(name) is None for name in free):
        pair.turn()
        turns += 1
    assert turns > 3
    assert asked.ok()["id"] == free["n0999"] and held.code == "held"
    for name, id in free.items():
        assert new.send("lookup", name=name).ok()["id"] == id


def test_metadata_that_no_answer_could_hold_is_left_out(pair: FiledPair) -> None:
    """An entry with a megabyte of metadata comes in without it, the history says so, and every verb goes on."""
    new = pair.session("n")
    id = str(ulid.ULID())
    entry = {"id": id, "component_type": "node", "metadata": {"blob": "x" * (1 << 20)}, "lock": None}
    pair.edit(lambda entries: entries.update(arm=entry))
    pair.turn()
    assert new.get("arm")["id"] == id and new.get("arm")["metadata"] == {}
    assert [c["name"] for c in new.send("list").ok()["components"]] == ["arm"]
    assert "metadata" in {e["why"].get("what") for e in new.send("history", name="arm").ok()["events"]}


def test_ids_that_are_no_ulids_are_taken_over_as_they_are(tmp_path: Path) -> None:
    """An entry with an id that is no ULID keeps it, and the history says so."""
    entry: dict[str, Any] = {"id": "my-old-id", "component_type": "node", "metadata": {}, "lock": None}
    (tmp_path / "registry.json").write_text(json.dumps({"entries": {"arm": entry}}))
    pair = FiledPair(tmp_path)
    new = pair.session("n")
    assert new.resolve("arm").ok()["id"] == "my-old-id"
    created = new.send("history", name="arm").ok()["events"][0]
    assert created["why"]["foreign_id"] is True and created["why"]["source"] == "registry.json"
    pair.close()


def test_unchanged_registry_is_not_written_at_a_start(pair: FiledPair) -> None:
    """A start that finds the file as it is to be does not write it."""
    new = pair.session("n")
    new.resolve("arm", acquire_lock=False).ok()
    pair.wait(2.0)
    pair.stop()
    before = pair.registry.stat()
    pair.revive()
    pair.turn()
    after = pair.registry.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_idle_registry_writes_nothing(pair: FiledPair) -> None:
    """Held names without anything to do write neither file nor database."""
    new = pair.session("n")
    for n in range(20):
        new.resolve(f"n{n}").ok()
    pair.wait(2.0)
    before, revision = pair.registry.stat(), pair.core.store.revision
    for _ in range(50):
        pair.wait(100.0)
    assert pair.registry.stat() == before and pair.core.store.revision == revision
