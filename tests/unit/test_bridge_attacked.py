"""What a hostile review of the bridge found: each of these gave a name to two holders, or two ULIDs, or stopped it."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ulid

from filed import FiledPair
from madsci_registryd.bridge import FREE_S
from madsci_registryd.export import Export, Job
from madsci_registryd.file_watch import FileWatch
from madsci_registryd.passes import Passes
from madsci_registryd.publication import BUSY_S
from madsci_registryd.registry_file import FileFault, RegistryFile
from madsci_registryd.store import LOCK_EVENTS
from old_program import OldHeldError


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[FiledPair]:
    pair = FiledPair(tmp_path)
    yield pair
    pair.close()


@contextmanager
def failing(verb: str, number: int) -> Iterator[None]:
    """Let a verb of the file fail with this errno meanwhile."""

    def fail(self: RegistryFile, *arguments: Any) -> Any:
        raise FileFault("it was made to fail", lasting=number == errno.EROFS) from OSError(number, "made up")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegistryFile, verb, fail)
        yield


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(depth):
        made = {"a": made}
    return made


UNFIT = {
    "17 deep": json.dumps(nested(17)),
    "70 deep": json.dumps(nested(70)),
    "NUL": '{"serial": "SN123\\u0000"}',
    "NaN": '{"x": NaN}',
    "huge number": '{"x": 1' + 310 * "0" + "}",
    "surrogate": '{"x": "\\ud800"}',
    "key twice": '{"x": 1, "x": 2}',
}


@pytest.mark.parametrize("metadata", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("is_known", [True, False])
def test_metadata_that_cannot_be_kept_cost_nobody_name_or_ulid(pair: FiledPair, metadata: str, is_known: bool) -> None:
    """An old program that holds a name with metadata that cannot be stored keeps it, and its ULID is the one."""
    new, old = pair.session("n"), pair.old()
    if is_known:
        new.resolve("arm", acquire_lock=False).ok()
    id = old.resolve("arm", metadata={"replace": "me"})
    text = pair.registry.read_text()
    begin = text.index('"replace"')
    begin, end = text.rindex("{", 0, begin), text.index("}", begin)
    pair.registry.write_text(text[:begin] + metadata + text[end + 1 :])
    asked = new.resolve("arm")
    assert asked.code == "held" and asked.error().id == id  # type: ignore[attr-defined]
    assert old.heartbeat("arm") and pair.old().resolve("arm", lock=False) == id
    assert pair.bridge.status()["refused"]


@pytest.mark.parametrize(
    "lock", [{"holder_pid": 2**70}, {"expires_at": "9999-12-31T23:59:59-05:00"}], ids=["huge pid", "end of time"]
)
def test_lock_with_an_odd_value_is_a_lock(pair: FiledPair, lock: dict[str, Any]) -> None:
    """A lock that MADSci reads counts, though its numbers do not fit ours."""
    pair.old().resolve("arm")
    pair.edit(lambda entries: entries["arm"]["lock"].update(lock))
    assert pair.session("n").resolve("arm").code == "held"


def test_failed_write_leaves_no_ulid_behind(pair: FiledPair) -> None:
    """A new name whose write failed is in no later file, or with the ULID that it has then for everybody."""
    new = pair.session("n")
    new.resolve("other").ok()
    with failing("write", errno.ENOSPC):
        assert new.resolve("arm").code == "no_space"
    for _ in range(10):
        pair.wait(1.0)
    id = pair.old().resolve("arm", lock=False)
    assert new.resolve("arm").ok()["id"] == id


def test_passing_fault_of_the_file_is_busy_and_says_why(pair: FiledPair) -> None:
    """What a retry may mend is answered as busy, at once, with the fault: `unavailable` would be no daemon at all."""
    new = pair.session("n")
    with failing("write", errno.EIO):
        asked = new.resolve("arm")
        assert asked.code == "busy" and "made to fail" in asked.error().message
    pair.wait(2.0)
    assert new.resolve("arm").code == "ok"


def add_many(pair: FiledPair, count: int = 300) -> dict[str, str]:
    """Let an old program add names, and return their ULIDs."""
    ids = {f"n{n:04}": str(ulid.ULID()) for n in range(count)}
    entry: dict[str, Any] = {"component_type": "node", "metadata": {}, "lock": None}
    pair.edit(lambda entries: entries.update({name: {"id": id, **entry} for name, id in ids.items()}))
    return ids


@pytest.mark.parametrize("verb", ["resolve", "rename", "import", "import of its ULID"])
def test_request_meets_many_new_names_in_one_pass(pair: FiledPair, verb: str) -> None:
    """A request that asked before the pass in which an old program's many names come in finds the name among them."""
    new = pair.session("n")
    mine = new.resolve("mine", acquire_lock=False).ok()["id"]
    ids = add_many(pair)
    last = "n0299"
    entry = {"id": str(ulid.ULID()), "component_type": "node"}
    if verb == "resolve":
        assert new.resolve(last).ok()["id"] == ids[last]
    elif verb == "rename":
        assert new.send("rename", old="mine", new=last, id=mine).code == "name_taken"
    elif verb == "import":
        report = new.send("import", upload="u", entries=[[last, entry]], last=True).ok()["report"]
        assert report[0][1] == "conflict"
    else:
        entries = [["another", {**entry, "id": ids[last]}]]
        report = new.send("import", upload="u", entries=entries, last=True).ok()["report"]
        assert report[0][1] == "conflict"
    for _ in range(10):
        pair.turn()
    assert new.send("lookup", name=last).ok()["id"] == ids[last] == pair.entry(last)["id"]


def test_refused_rename_shows_old_programs_nothing(pair: FiledPair) -> None:
    """A rename of a held name that is refused has not been in the file; the new name has a ULID of its own."""
    new, other = pair.session("n"), pair.session("o")
    id = new.resolve("arm").ok()["id"]
    assert other.send("rename", old="arm", new="leg", id=id).code == "held"
    assert "leg" not in pair.old().read()["entries"]
    leg = pair.old().resolve("leg", lock=False)
    assert leg != id and other.resolve("leg").ok()["id"] == leg


def test_leftover_of_a_rename_is_nobodys_ulid(pair: FiledPair) -> None:
    """Where the file has the new name of a rename that was refused in the end, who resolves it has a ULID of its own,
    and old programs see that one as soon as it is answered."""
    new, other = pair.session("n"), pair.session("o")
    id = new.resolve("arm", acquire_lock=False).ok()["id"]
    pair.wait(2.0)
    pair.hold_passes = True
    renaming = new.send("rename", old="arm", new="leg", id=id)
    result = pair.export.run(pair.jobs.pop(0))
    new.drop()  # so nobody runs it any more
    pair.bridge.done(result, was_asked=True)
    pair.hold_passes = False
    pair.turn()
    assert renaming.reply is None and pair.entry("leg")["id"] == id
    leg = other.resolve("leg").ok()["id"]
    assert leg != id and pair.entry("leg")["id"] == leg


def test_old_programs_new_name_survives_the_end_of_a_rename(pair: FiledPair) -> None:
    """A name that was renamed away, and that an old program makes anew meanwhile, is that program's."""
    new, old = pair.session("n"), pair.old()
    id = new.resolve("arm", acquire_lock=False).ok()["id"]
    pair.edit(lambda entries: entries.update(leg=entries.pop("arm")))
    pair.turn()
    made = old.resolve("arm")
    assert made != id
    new.send("rename", old="leg", new="eye", id=id)
    pair.wait(1.0)
    leg = old.resolve("leg") if "leg" not in old.read()["entries"] else None
    pair.wait(3 * BUSY_S)
    pair.wait(1.0)
    assert pair.entry("arm")["id"] == made and pair.entry("eye")["id"] == id
    if leg is not None:
        assert pair.entry("leg")["id"] == leg
    for name in old.holds:
        assert new.resolve(name).code == "held"


def test_import_repeated_after_busy_waits_for_the_file_again(pair: FiledPair) -> None:
    """An import that was refused as busy is not answered the next time before the file has its names."""
    new = pair.session("n")
    entries = [["arm", {"id": str(ulid.ULID()), "component_type": "node"}]]
    pair.hold_passes = True
    first = new.send("import", upload="u1", entries=entries, last=True)
    pair.wait(BUSY_S + 0.1)
    assert first.code == "busy"
    second = new.send("import", upload="u2", entries=entries, last=True)
    assert second.reply is None
    pair.hold_passes = False
    pair.turn()
    assert second.code == "ok" and pair.entry("arm")["id"] == entries[0][1]["id"]  # type: ignore[index]


def test_claim_that_a_pass_takes_anew_is_not_given_back(pair: FiledPair) -> None:
    """A claim whose 10 s end while a pass is under way that a request waits for stays with the one who got the name."""
    new = pair.session("n")
    new.release("arm", new.resolve("arm").ok()["fencing_token"])
    pair.wait(1.0)
    pair.hold_passes = True
    id = new.get("arm")["id"]
    new.send("rename", old="arm", new="leg", id=id)  # a pass that wants a name that is claimed
    pair.bridge.pump()
    result = pair.export.run(pair.jobs.pop(0))
    pair.wait(FREE_S)
    pair.bridge.done(result, was_asked=True)
    pair.core.registrar.commit()
    granted = pair.session("m").resolve("leg")
    pair.hold_passes = False
    for _ in range(3):
        pair.wait(1.0)
    assert granted.code == "ok"
    with pytest.raises(OldHeldError):
        pair.old().resolve("leg")


def test_rename_while_its_names_claim_goes_keeps_old_programs_out(pair: FiledPair) -> None:
    """A rename that waits for the file while its old name's claim is given back takes that again: no old program comes
    in between, and holds the ULID under the name that is gone."""
    new = pair.session("n")
    arm = new.resolve("arm").ok()
    new.release("arm", arm["fencing_token"])
    pair.wait(1.0)
    pair.wait(FREE_S - 0.7)
    pair.hold_passes = True
    new.resolve("other")
    under_way = pair.jobs.pop(0)
    asked = new.send("rename", old="arm", new="leg", id=arm["id"])
    pair.wait(1.0)  # the claim on arm ends
    pair.bridge.done(pair.export.run(under_way), was_asked=True)
    pair.turn()
    result = pair.export.run(pair.jobs.pop(0))
    for name in ("arm", "leg"):
        with pytest.raises(OldHeldError):
            pair.old().resolve(name)
    pair.bridge.done(result, was_asked=True)
    pair.hold_passes = False
    pair.turn()
    assert asked.code == "ok"


def test_file_that_nobody_can_write_is_read_all_the_same(tmp_path: Path) -> None:
    """Where the file's lock cannot be had (a read-only folder), the names in it have the ULIDs that they have there."""
    first = FiledPair(tmp_path)
    id = first.old().resolve("arm", lock=False)
    first.close()
    (tmp_path / "registry.db").unlink()
    with failing("locked", errno.EROFS):
        pair = FiledPair(tmp_path)
        assert pair.session("n").resolve("arm").ok()["id"] == id
        assert pair.bridge.degraded()
        pair.close()


# it stopped


def test_huge_name_and_workcell_do_not_stop_the_reading_verbs(pair: FiledPair) -> None:
    """Two megabytes of a name or a workcell in the file leave list, get, history and export as they are."""
    new, long = pair.session("n"), "x" * (2 << 20)
    entry: dict[str, Any] = {"component_type": "node", "metadata": {}, "lock": None}
    pair.edit(
        lambda entries: entries.update(
            {long: {**entry, "id": str(ulid.ULID())}, "arm": {**entry, "id": str(ulid.ULID()), "workcell_id": long}}
        )
    )
    pair.turn()
    assert [c["name"] for c in new.send("list").ok()["components"]] == ["arm"]
    for verb in ("history", "export"):
        assert len(json.dumps(new.send(verb).ok())) < 100_000
    assert new.get("arm")["workcell_id"] is None


def test_torn_file_that_cannot_be_put_aside_is_told_once_and_mended_later(pair: FiledPair) -> None:
    """While there is no room to put a torn file aside it is refused once, not with every look; then it is mended."""
    new = pair.session("n")
    id = new.resolve("arm", acquire_lock=False).ok()["id"]
    pair.wait(2.0)
    pair.registry.write_bytes(pair.registry.read_bytes()[:60])
    with failing("put_aside", errno.ENOSPC):
        for _ in range(20):
            pair.clock.advance(0.5)
            if pair.export.has_changed():
                pair.bridge.done(pair.export.run(Job()), was_asked=False)
                pair.core.registrar.commit()
    told = pair.bridge.status()["refused"]
    assert told <= 2
    pair.wait(1.0)
    assert pair.entry("arm")["id"] == id and pair.bridge.status()["refused"] == told
    assert len([path for path in pair.registry.parent.iterdir() if ".broken-" in path.name]) == 1


def test_old_program_that_empties_a_large_file_says_one_thing(pair: FiledPair) -> None:
    """Thousands of deletions become a few events with a count, which are not kept for ever."""
    new = pair.session("n")
    add_many(pair, 2000)
    for _ in range(30):
        pair.turn()
    before = pair.core.store.revision
    pair.edit(lambda entries: entries.clear())
    pair.turn()
    events = [e for e in pair.core.store.events(before, 1000) if e["kind"] == "refused"]
    assert 1 < len(events) < 50 and "1980 more" in events[-1]["why"]["detail"]
    assert pair.bridge.status()["refused"] == 2000 and "refused" in LOCK_EVENTS
    assert len(pair.old().read()["entries"]) == 2000
    assert new.send("lookup", name="n1999").ok()["id"]


def test_look_that_breaks_does_not_end_the_looking(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fault in the middle of a look is logged, and the thread looks on."""
    export = Export.__new__(Export)
    export.watch = FileWatch(tmp_path / "registry.json")
    passes = Passes(export)
    with caplog.at_level(logging.ERROR):
        passes._look()
    assert "a look at registry.json broke" in caplog.text
    passes.start()
    passes.stop()
