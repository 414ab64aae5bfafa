"""The copy of registry.json from before it was torn: what of it is taken in, and when it is taken. Copies are taken by
hand where that shows more, else by the thread, from real inotify."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from filed import FiledPair
from helpers import environment, until
from madsci_registryd import file_watch
from madsci_registryd.file_watch import FileWatch
from madsci_registryd.registry_file import FileFault, RegistryFile

WHOLE = b'{\n  "entries": {}\n}\n'


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[FiledPair]:
    pair = FiledPair(tmp_path)
    yield pair
    pair.close()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry.json"


@pytest.fixture
def watch(registry: Path) -> Iterator[FileWatch]:
    watch = FileWatch(registry)
    yield watch
    watch.stop()


def take(watch: FileWatch) -> None:
    """Have a copy taken now."""
    file = RegistryFile(watch.path)
    watch.take(file)
    file.close()


def tear(pair: FiledPair) -> None:
    """An old program empties the file and is killed."""
    with pair.old().locked():
        pair.registry.write_bytes(b"")


def refused(pair: FiledPair) -> int:
    return int(pair.bridge.status()["refused"])


# what is taken in


def test_torn_file_gives_what_was_there_just_before(pair: FiledPair) -> None:
    """A name that an old program made and holds keeps its ULID and its holder, though the file was emptied before we
    looked; metadata that it changed count, and the file has it all again."""
    new, old = pair.session("new"), pair.old()
    new.resolve("known", acquire_lock=False).ok()
    pair.turn()
    id = old.resolve("made")
    old.resolve("known", metadata={"rack": 3}, lock=False)
    take(pair.export.watch)
    tear(pair)
    pair.turn()
    assert new.resolve("made").code == "held" and new.get("made")["id"] == id
    assert new.get("known")["metadata"] == {"rack": 3}
    assert pair.entry("made")["id"] == id and old.heartbeat("made")


def test_torn_file_frees_and_deletes_nothing_by_what_was_there_before(pair: FiledPair) -> None:
    """What a copy lacks says nothing: a lock that was given back just before counts until its time is over, and a name
    that was deleted is there, without a word of refusal."""
    new, old = pair.session("new"), pair.old()
    old.resolve("held")
    new.resolve("known", acquire_lock=False).ok()
    pair.turn()
    old.release("held")
    old.edit(lambda entries: entries.pop("known"))
    take(pair.export.watch)
    told = refused(pair)
    tear(pair)
    pair.turn()
    assert new.resolve("held").code == "held"
    assert pair.entry("known") and refused(pair) == told + 1, "that the file is empty is told, and no more"
    pair.wait(31.0)
    new.resolve("held").ok()


def test_rename_just_before_a_torn_file_is_refused(pair: FiledPair) -> None:
    """A copy in which a ULID has another name than we know gives it no second one."""
    new = pair.session("new")
    id = new.resolve("known", acquire_lock=False).ok()["id"]
    pair.turn()
    pair.edit(lambda entries: entries.update(other=entries.pop("known")))
    take(pair.export.watch)
    told = refused(pair)
    tear(pair)
    pair.turn()
    assert new.send("lookup", name="known").ok() == {"id": id}
    assert new.send("lookup", name="other").ok() == {"id": None}
    assert pair.old().read()["entries"].keys() == {"known"} and refused(pair) == told + 2


@pytest.mark.parametrize("is_known", [False, True])
def test_what_a_torn_file_still_has_is_newer(pair: FiledPair, is_known: bool) -> None:
    """Where the torn file itself has an entry, that counts, and not the copy of it."""
    new, first, second = pair.session("new"), pair.old(100), pair.old(200)
    if is_known:
        new.resolve("arm", acquire_lock=False).ok()
        pair.turn()
    first.resolve("arm", metadata={"rack": 1})
    take(pair.export.watch)
    first.release("arm")
    second.resolve("arm", metadata={"rack": 2})
    text = pair.registry.read_text()
    pair.registry.write_text(text[: text.rindex("}")].rstrip().rstrip("}"))
    pair.turn()
    got = new.get("arm")
    assert got["metadata"] == {"rack": 2} and got["old_lock"]["holder_pid"] == 200


def test_copy_of_what_a_pass_has_read_since_is_forgotten(pair: FiledPair) -> None:
    """A lock that an old program gave back, as a pass has seen, does not come back from an earlier copy."""
    new, old = pair.session("new"), pair.old()
    old.resolve("arm")
    take(pair.export.watch)
    pair.turn()
    old.release("arm")
    pair.turn()
    tear(pair)
    pair.turn()
    new.resolve("arm").ok()


def test_copy_of_our_own_file_changes_nothing(pair: FiledPair) -> None:
    """A copy of what we wrote ourselves, older than what clients have changed since, is nobody's word: nothing is
    refused and nothing taken back when the file is torn."""
    new = pair.session("new")
    answer = new.resolve("arm").ok()
    pair.wait(2.0)
    take(pair.export.watch)
    told = refused(pair)
    new.send("set_metadata", name="arm", id=answer["id"], set={"rack": 4}, unset=[]).ok()
    new.release("arm", answer["fencing_token"])
    tear(pair)
    pair.turn()
    pair.wait(2.0)
    assert new.get("arm")["metadata"] == {"rack": 4} and pair.entry("arm")["metadata"] == {"rack": 4}
    assert refused(pair) == told + 1
    new.resolve("arm").ok()


def test_copy_of_what_was_read_is_forgotten_though_it_could_not_be_written(pair: FiledPair) -> None:
    """So it is where the pass that read it had no room to write."""
    new, old = pair.session("new"), pair.old()
    new.resolve("known", acquire_lock=False).ok()
    pair.turn()
    old.resolve("arm")
    old.edit(lambda entries: entries.pop("known"))
    take(pair.export.watch)

    def fail(*_: object) -> None:
        raise FileFault("no room", lasting=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegistryFile, "write", fail)
        pair.turn()
        old.release("arm")
        pair.turn()
    tear(pair)
    pair.wait(2.0)
    new.resolve("arm").ok()


def test_copy_taken_while_a_pass_works_is_forgotten(pair: FiledPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied between the reading and the writing of a pass is older than what it wrote."""
    new = pair.session("new")
    pair.old().resolve("arm")
    pair.turn()
    pair.wait(31.0)
    write = RegistryFile.write

    def write_later(self: RegistryFile, *parts: Any) -> Any:
        take(pair.export.watch)
        return write(self, *parts)

    monkeypatch.setattr(RegistryFile, "write", write_later)
    new.resolve("arm").ok()
    monkeypatch.undo()
    told = refused(pair)
    tear(pair)
    pair.turn()
    assert refused(pair) == told + 1


def test_copy_that_is_damaged_gives_what_it_has(pair: FiledPair) -> None:
    """A copy that only ends like a whole file is read like a torn one."""
    new, old = pair.session("new"), pair.old()
    id = old.resolve("made", lock=False)
    old.resolve("spoilt", lock=False)
    spoilt = pair.registry.read_bytes().replace(b'"workcell_id": null\n    }\n', b'"workcell_id": nul\n    }\n')
    pair.registry.write_bytes(spoilt)
    take(pair.export.watch)
    tear(pair)
    pair.turn()
    assert new.send("lookup", name="made").ok() == {"id": id}
    assert new.send("lookup", name="spoilt").ok() == {"id": None}


# what is copied


@pytest.mark.parametrize(
    ("content", "is_copied"),
    [
        (WHOLE, True),
        (b'{"entries": {}}', True),
        (b"", False),
        (b'{"entries": {"a": {"id"', False),
        (b'{\n  "entries": {\n    "a": {\n      "metadata": {}', False),
    ],
)
def test_copy_is_kept_until_there_is_another_whole_one(
    watch: FileWatch, registry: Path, content: bytes, is_copied: bool
) -> None:
    """A torn or empty file does not take the place of the last whole one."""
    before = b'{"version": 1, "entries": {}}'
    registry.write_bytes(before)
    take(watch)
    registry.write_bytes(content)
    take(watch)
    assert watch.copy() == (content if is_copied else before)
    watch.forget()
    assert watch.copy() is None


def test_large_file_is_not_copied(watch: FileWatch, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the limit is not kept in memory."""
    monkeypatch.setattr(file_watch, "COPY_MAX_BYTES", len(WHOLE))
    registry.write_bytes(WHOLE)
    take(watch)
    assert watch.copy() == WHOLE
    registry.write_bytes(b" " + WHOLE)
    take(watch)
    assert watch.copy() == WHOLE


def test_file_that_changes_while_it_is_read_is_no_copy(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one writing and half of the next is not taken for what anybody wrote."""
    registry.write_bytes(WHOLE)
    file = RegistryFile(registry)
    read = os.read

    def slow_read(fd: int, length: int) -> bytes:
        registry.write_bytes(b" " + WHOLE)
        return read(fd, length)

    monkeypatch.setattr(os, "read", slow_read)
    with pytest.raises(FileFault, match="changed while it was read"):
        file.read(settled=True)
    file.close()


def test_what_is_no_file_is_not_copied(watch: FileWatch, registry: Path) -> None:
    """A link is not followed."""
    registry.with_name("other.json").write_bytes(WHOLE)
    registry.symlink_to("other.json")
    take(watch)
    assert watch.copy() is None


# when it is copied


def test_file_is_copied_when_somebody_has_written_or_replaced_it(watch: FileWatch, registry: Path) -> None:
    """The thread copies what is there, what is written in place, and what is renamed to the file's name."""
    registry.write_bytes(WHOLE)
    watch.start()
    until(lambda: watch.copy() == WHOLE, "for the copy of what was there")
    registry.write_bytes(b" " + WHOLE)
    until(lambda: watch.copy() == b" " + WHOLE, "for the copy of what was written")
    registry.with_name("new").write_bytes(b"  " + WHOLE)
    registry.with_name("new").rename(registry)
    until(lambda: watch.copy() == b"  " + WHOLE, "for the copy of what was renamed")
    registry.write_bytes(b"   " + WHOLE)
    until(lambda: watch.copy() == b"   " + WHOLE, "for the copy of what was written into the new file")


def test_watching_begins_again_with_a_new_folder(tmp_path: Path) -> None:
    """It ends with its folder; asked for again it watches the folder that is there then, and no descriptor is left."""
    folder = tmp_path / "lab"
    registry = folder / "registry.json"
    folder.mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    watch = FileWatch(registry)
    watch.start()
    folder.rmdir()
    until(lambda: not watch.is_on, "for the watching to end")
    watch.start()
    assert not watch.is_on
    folder.mkdir()
    watch.start()
    registry.write_bytes(WHOLE)
    until(lambda: watch.copy() == WHOLE, "for the copy")
    watch.stop()
    assert watch.copy() is None and not watch.is_on
    assert len(list(Path("/proc/self/fd").iterdir())) == before


PROGRAM = """
import pathlib, sys
pathlib.Path("/proc/sys/user/max_inotify_instances").write_text("0")
from madsci_registryd.file_watch import FileWatch
import logging
logging.basicConfig(level=logging.INFO)
watch = FileWatch(pathlib.Path(sys.argv[1]))
watch.start()
watch.start()
print(watch.is_on, watch.copy())
watch.stop()
"""


def test_without_inotify_there_is_no_copy(registry: Path) -> None:
    """Where the kernel gives no inotify that is said once, and there is never a copy."""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", PROGRAM, str(registry)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if "unshare" in done.stderr or "max_inotify_instances" in done.stderr:
        pytest.skip(f"needs a user namespace that limits inotify: {done.stderr.strip().splitlines()[-1]}")
    assert done.stdout == "False None\n", done.stderr
    assert done.stderr.count("not watched") == 1
