"""What keeps the daemon's word and registry.json one: claims and ULIDs where a pass, a full disk or a start cross."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from filed import FiledPair
from madsci_registryd.bridge import FREE_S
from madsci_registryd.registry_file import FileFault, RegistryFile
from old_program import OldHeldError


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[FiledPair]:
    pair = FiledPair(tmp_path)
    yield pair
    pair.close()


def test_name_claimed_anew_while_its_claim_was_to_go_is_kept(pair: FiledPair) -> None:
    """A claim whose 10 s end while a pass claims its name for a rename stays when the rename is refused: who is
    granted the name then has it alone."""
    new = pair.session("n")
    arm = new.resolve("arm").ok()
    new.release("arm", arm["fencing_token"])
    pair.wait(1.0)
    pair.hold_passes = True
    renaming = new.send("rename", old="arm", new="leg", id=arm["id"])
    result = pair.export.run(pair.jobs.pop(0))
    pair.wait(FREE_S)  # the claim on arm ends, and the rename is told that the file is busy
    pair.bridge.done(result, was_asked=True)
    pair.hold_passes = False
    granted = pair.session("m").resolve("arm")
    assert renaming.code == "busy" and granted.code == "ok"
    with pytest.raises(OldHeldError):
        pair.old().resolve("arm")


def test_ulid_that_no_room_was_left_for_is_still_the_names(pair: FiledPair) -> None:
    """A name that an old program made while the database was full has its ULID, though a new program resolves the
    name before the database has taken it in."""
    new, db = pair.session("n"), pair.core.db
    new.resolve("other").ok()
    db.pragma("max_page_count", db.pragma("page_count"))
    id = pair.old().resolve("arm", metadata={"large": 100_000 * "x"}, lock=False)
    pair.turn()
    assert pair.core.store.by_name("arm") is None
    db.pragma("max_page_count", 1 << 30)
    assert new.resolve("arm").ok()["id"] == id
    pair.wait(2.0)
    assert pair.entry("arm")["id"] == id == new.get("arm")["id"]


def test_earlier_daemons_claim_that_goes_in_the_pass_that_reads_it_is_gone(
    pair: FiledPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the claim of an earlier daemon, which could not be written anew, is read once more in the pass that gives
    it back, the daemon knows that it is gone: an old program that takes the name then has it alone."""
    new, old = pair.session("n"), pair.old()
    new.release("arm", new.resolve("arm").ok()["fencing_token"])
    pair.kill()
    with monkeypatch.context() as patch:
        patch.setattr(RegistryFile, "write", no_room)
        pair.revive()
        pair.wait(FREE_S - 0.5)
    pair.hold_passes = True
    pair.wait(1.0)  # the claim ends
    old.resolve("leg")  # so the file is read
    job = pair.jobs.pop(0)
    assert job.drop == {"arm"}
    pair.bridge.done(pair.export.run(job), was_asked=True)
    pair.hold_passes = False
    old.resolve("arm")
    assert pair.session("m").resolve("arm").code == "held"


def test_claim_that_was_to_go_when_a_write_failed_goes_all_the_same(
    pair: FiledPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that is due to be given back, and that a pass takes anew but cannot write, is given back later: the name
    is not kept from old programs for ever."""
    new = pair.session("n")
    new.release("arm", new.resolve("arm").ok()["fencing_token"])
    pair.wait(1.0)
    pair.hold_passes = True
    pair.wait(FREE_S)
    job = pair.jobs.pop(0)
    with pair.old().locked(), monkeypatch.context() as patch:
        patch.setattr("madsci_registryd.export.LOCK_WAIT_S", 0.0)
        pair.bridge.done(pair.export.run(job), was_asked=True)
    new.resolve("arm")
    job = pair.jobs.pop(0)
    with monkeypatch.context() as patch:
        patch.setattr(RegistryFile, "write", no_room)
        pair.bridge.done(pair.export.run(job), was_asked=True)
    pair.turn()
    pair.hold_passes = False
    for _ in range(60):
        pair.wait(1.0)
    assert pair.bridge.claimed == pair.export.claims == set()
    pair.old().resolve("arm")


def test_rename_of_a_name_that_became_free_in_the_same_turn_waits_for_the_file(pair: FiledPair) -> None:
    """A rename that would have been refused, but for a release just before it in the same turn, is not done unseen by
    old programs: it is `busy`, and done when it is repeated."""
    holder, other = pair.session("h"), pair.session("o")
    granted = holder.resolve("arm").ok()
    rename = {"old": "arm", "new": "leg", "id": granted["id"], "force": False}
    released = {"name": "arm", "instance": "i", "fencing_token": granted["fencing_token"]}
    holder.send("release", turn=False, **released)
    asked = other.send("rename", turn=False, **rename)
    pair.commit()
    assert asked.code == "busy" and other.get("arm")["id"] == granted["id"]
    assert other.send("rename", **rename).ok()["changed"]
    assert pair.entry("leg")["id"] == granted["id"]


def no_room(self: RegistryFile, parts: object) -> None:
    raise FileFault("no room", lasting=False) from OSError(errno.ENOSPC, "no room")
