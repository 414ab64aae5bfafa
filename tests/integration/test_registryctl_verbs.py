"""registryctl against a real daemon: what it reads and changes, its JSON and its exit statuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from conftest import Workers
from ctl import Ctl
from helpers import DaemonProcess, daemons_under
from madsci_registry.names import is_ulid
from madsci_registryctl import exits

UNKNOWN_ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.fixture
def ctl(daemon: DaemonProcess) -> Ctl:
    """Registryctl on a registry with a daemon."""
    return Ctl(daemon.registry)


def test_resolve_type_creates_once(ctl: Ctl) -> None:
    """Resolve --type makes a name once and prints its ULID; it takes no lock."""
    first = ctl("resolve", "arm 1", "--type", "node", "--meta", "slot=3", "--meta", "site=north").strip()
    assert is_ulid(first)
    assert ctl("resolve", "arm 1", "--type", "node").strip() == first
    assert ctl("resolve", "arm 1").strip() == ctl("lookup", "arm 1").strip() == first
    shown = ctl.json("resolve", "arm 1", "--type", "node")
    assert (shown["id"], shown["is_new"], shown["locked"], shown["metadata"]) == (
        first, False, False, {"slot": 3, "site": "north"},
    )  # fmt: skip


def test_resolve_without_type_never_creates(ctl: Ctl) -> None:
    """Resolve without --type refuses an unknown name with exit status 3 and says how to create it."""
    done = ctl.run("resolve", "arm", status=exits.NOT_FOUND)
    assert not done.stdout
    assert "--type" in done.stderr
    assert "--type" in ctl.error("resolve", "arm", status=exits.NOT_FOUND)["hint"]
    assert ctl.json("list", "--all") == []
    ctl("resolve", "arm", "--meta", "a=1", status=exits.USAGE)


def test_lookup_renamed_name_says_where_it_went(ctl: Ctl) -> None:
    """Lookup of a name that was renamed away is exit status 3 and names the present name; the ULID went with it."""
    ulid = ctl("resolve", "old", "--type", "module").strip()
    assert ctl.json("rename", "old", "new")["id"] == ulid
    error = ctl.error("lookup", "old", status=exits.NOT_FOUND)
    assert (error["code"], error["renamed_to"]) == ("not_found", "new")
    assert ctl.json("lookup", "new") == {"name": "new", "id": ulid}
    assert "'new'" in ctl.run("resolve", "old", status=exits.NOT_FOUND).stderr


def test_show_name_or_ulid_same_component(ctl: Ctl) -> None:
    """Show takes a name or a ULID; exit status 3 if there is neither."""
    ulid = ctl("resolve", "a/b c", "--type", "workcell").strip()
    assert ctl.json("show", "a/b c") == ctl.json("show", ulid)
    assert "a/b c" in ctl("show", ulid)
    ctl("show", UNKNOWN_ULID, status=exits.NOT_FOUND)
    ctl("show", "b", status=exits.NOT_FOUND)


def test_list_json_has_the_documented_fields(ctl: Ctl, workers: Workers) -> None:
    """List --json is an array of objects; a held name's holder is an object of kernel facts, else null."""
    worker = workers()
    held = worker.ask("resolve", "held one", metadata={"k": [1]})
    ctl("resolve", "free one", "--type", "manager")
    free, taken = ctl.json("list")
    assert {
        "name",
        "id",
        "component_type",
        "state",
        "locked",
        "fencing_token",
        "last_seen",
        "metadata",
        "holder",
    } <= set(taken)
    assert (free["state"], free["locked"], free["holder"], free["fencing_token"]) == ("free", False, None, None)
    assert (taken["state"], taken["id"], taken["fencing_token"]) == ("held", held["id"], held["fencing_token"])
    assert taken["metadata"] == {"k": [1]}
    assert {"pid", "uid", "host", "instance", "since", "proof"} <= set(taken["holder"])
    assert (taken["holder"]["pid"], taken["holder"]["uid"]) == (worker.pid, os.getuid())


def test_list_filters_and_shows_plain_text(ctl: Ctl, workers: Workers) -> None:
    """List narrows by glob, type and state; retired names only with --all or --state retired; no tty: plain text."""
    workers().ask("resolve", "n2")
    for name, kind in (("n1", "node"), ("m1", "module"), ("x1", "node")):
        ctl("resolve", name, "--type", kind)
    ctl("retire", "x1")

    def names(*words: str) -> list[str]:
        return [component["name"] for component in ctl.json("list", *words)]

    assert names() == ["m1", "n1", "n2"]
    assert names("n*") == ["n1", "n2"]
    assert names("--type", "module") == ["m1"]
    assert names("--state", "held") == ["n2"]
    assert names("--all") == ["m1", "n1", "n2", "x1"]
    assert names("--state", "retired") == ["x1"]
    lines = ctl("list").splitlines()
    assert lines[0].split() == ["NAME", "TYPE", "STATE", "ID", "HOLDER", "LAST", "SEEN"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["m1", "module", "free"], ["n1", "node", "free"], ["n2", "node", "held"],
    ]  # fmt: skip
    ctl("list", "--state", "nosuch", status=exits.USAGE)


def test_global_options_after_the_command(ctl: Ctl, daemon: DaemonProcess) -> None:
    """Global options may stand before or after the command."""
    other = Ctl(daemon.registry.with_name("other.json"))
    assert json.loads(other("list", "--json", "--timeout", "7", "--registry", daemon.registry)) == []


def test_retire_and_revive_keep_the_ulid(ctl: Ctl, workers: Workers) -> None:
    """A retired name comes back with its ULID; a held one is not retired (exit status 4) and says who holds it."""
    ulid = ctl("resolve", "a", "--type", "node").strip()
    assert ctl.json("retire", "a")["state"] == "retired"
    assert ctl("resolve", "a").strip() == ulid
    assert ctl.json("revive", "a")["id"] == ulid
    assert ctl.json("show", "a")["state"] == "free"
    worker = workers()
    worker.ask("resolve", "a")
    error = ctl.error("retire", "a", status=exits.HELD)
    assert (error["code"], error["holder"]["pid"]) == ("held", worker.pid)


def test_retire_older_than_reports_each(ctl: Ctl, workers: Workers) -> None:
    """Retire --older-than retires what is free and was not seen so long, reports each; --dry-run changes nothing."""
    for name in ("a", "b"):
        ctl("resolve", name, "--type", "node")
    workers().ask("resolve", "held")
    assert ctl.json("retire", "--older-than", "1") == []
    assert [(r["name"], r["outcome"]) for r in ctl.json("retire", "--older-than", "0", "--dry-run")] == [
        ("a", "would retire"), ("b", "would retire"),
    ]  # fmt: skip
    assert len(ctl.json("list")) == 3
    assert [(r["name"], r["outcome"]) for r in ctl.json("retire", "--older-than", "0")] == [
        ("a", "retired"), ("b", "retired"),
    ]  # fmt: skip
    assert [c["name"] for c in ctl.json("list")] == ["held"]
    for words in (["retire"], ["retire", "a", "--older-than", "1"], ["retire", "a", "--dry-run"]):
        ctl(*words, status=exits.USAGE)


def test_rename_conflicts_have_their_status(ctl: Ctl, workers: Workers) -> None:
    """Rename onto a known name is exit status 8, of a held name 4; with --force the holder keeps the lock."""
    ctl("resolve", "a", "--type", "node")
    worker = workers()
    held = worker.ask("resolve", "b")
    assert ctl.error("rename", "a", "b", status=exits.CONFLICT)["code"] == "name_taken"
    assert ctl.error("rename", "b", "c", status=exits.HELD)["code"] == "held"
    moved = ctl.json("rename", "b", "c", "--force")
    assert (moved["id"], moved["holder"]["pid"]) == (held["id"], worker.pid)
    assert ctl.error("resolve", "a", "--type", "module", status=exits.CONFLICT)["code"] == "wrong_type"
    ctl("rename", "nosuch", "d", status=exits.NOT_FOUND)
    assert ctl.error("rename", "a", "x\ny", status=exits.INVALID)["field"] == "new"


def test_set_and_unset_change_only_their_keys(ctl: Ctl) -> None:
    """Set replaces the keys that it names, unset drops them; others stay."""
    ctl("resolve", "a", "--type", "node", "--meta", "x=1", "--meta", "y=old")
    assert ctl.json("set", "a", "y=new", 'z={"deep":[1]}')["metadata"] == {"x": 1, "y": "new", "z": {"deep": [1]}}
    assert ctl.json("unset", "a", "x", "z", "nosuch")["metadata"] == {"y": "new"}
    assert ctl.error("set", "a", "b", status=exits.INVALID)["code"] == "invalid"
    ctl("set", "nosuch", "a=1", status=exits.NOT_FOUND)


def test_history_tells_every_change(ctl: Ctl) -> None:
    """History tells the changes of a name in their order, and with which uid and pid they came."""
    ctl("resolve", "a", "--type", "node")
    ctl("set", "a", "x=1")
    ctl("retire", "a")
    events = ctl.json("history", "a")
    assert [e["kind"] for e in events] == ["created", "metadata", "retired"]
    assert all(e["uid"] == os.getuid() for e in events)
    assert sorted(e["revision"] for e in events) == [e["revision"] for e in events]
    assert "retired" in ctl("history")


def test_release_force_breaks_the_lock_and_the_holder_is_told(ctl: Ctl, workers: Workers) -> None:
    """Release --force shows who holds a name and breaks the lock only after a yes; the holder is told."""
    worker = workers()
    token = worker.ask("resolve", "a")["fencing_token"]
    done = ctl.run("release", "a", "--force", status=exits.USAGE)
    assert str(worker.pid) in done.stderr
    assert "-y" in done.stderr
    assert worker.ask("held", "a")
    assert ctl.json("release", "a", "--force", "-y", "--reason", "test") == {"name": "a", "broken": True}
    assert worker.ask("losses", 1) == [["a", token]]
    assert ctl.json("show", "a")["holder"] is None
    assert ctl.json("release", "a", "--force", "-y") == {"name": "a", "broken": False}
    assert ctl.json("history", "a")[-1]["kind"] == "broken"


def test_release_force_asks_on_a_terminal(ctl: Ctl, workers: Workers) -> None:
    """On a terminal release --force asks; without a yes nothing is broken."""
    worker = workers()
    worker.ask("resolve", "a")
    for answer, status, held in ((b"n\n", exits.OTHER, True), (b"y\n", exits.OK, False)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(ctl.words("release", "a", "--force"), stdin=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        os.write(ours, answer)
        _, talk = process.communicate()
        os.close(ours)
        assert process.returncode == status
        assert str(worker.pid).encode() in talk
        assert (ctl.json("show", "a")["holder"] is not None) == held


def test_export_import_bring_a_registry_over(ctl: Ctl, base_folder: Path) -> None:
    """What export writes, import takes into an empty registry with the same ULIDs; a second time changes nothing."""
    ids = {name: ctl("resolve", name, "--type", "node", "--meta", "k=1").strip() for name in ("a", "b ü", "c")}
    ctl("retire", "c")
    file = ctl.registry.with_name("out.json")
    assert ctl.json("export", "-o", file) == {"file": str(file), "entries": 3}
    assert json.loads(file.read_text())["entries"] == ctl.json("export")["entries"]
    with DaemonProcess(ctl.registry.with_name("second.json")) as second:
        other = Ctl(second.registry)
        report = other.json("import", file, "--dry-run")
        assert (report["dry_run"], report["counts"]["added"]) == (True, 3)
        assert other.json("list", "--all") == []
        report = other.json("import", file)
        assert [(e["name"], e["outcome"]) for e in report["entries"]] == [(n, "added") for n in sorted(ids)]
        assert {c["name"]: c["id"] for c in other.json("list", "--all")} == ids
        assert other.json("import", "-", stdin=file.read_text())["counts"]["same"] == 3


def test_import_conflict_and_invalid_are_reported_the_rest_is_taken(ctl: Ctl) -> None:
    """Import takes the good entries and reports the others: exit status 8 with a conflict, else 10 with an invalid."""
    ulid = ctl("resolve", "a", "--type", "node").strip()
    whole = ctl.json("export")
    entry = whole["entries"]["a"]
    bad = {"n": {**entry, "id": "non\tsense"}, "new": {**entry, "id": UNKNOWN_ULID}}
    report = ctl.json("import", "-", stdin=json.dumps({**whole, "entries": bad}), status=exits.INVALID)
    assert {e["name"]: e["outcome"] for e in report["entries"]} == {"n": "invalid", "new": "added"}
    clash = {"a": {**entry, "id": UNKNOWN_ULID[:-1] + "W"}, "new": {**entry, "id": UNKNOWN_ULID}}
    report = ctl.json("import", "-", stdin=json.dumps({**whole, "entries": clash}), status=exits.CONFLICT)
    outcomes = {e["name"]: e for e in report["entries"]}
    assert (outcomes["a"]["outcome"], outcomes["new"]["outcome"]) == ("conflict", "same")
    assert outcomes["a"]["reason"]
    assert ctl("lookup", "a").strip() == ulid
    done = ctl.run("import", "-", stdin=json.dumps({**whole, "entries": clash}), status=exits.CONFLICT)
    assert "1 conflict" in done.stderr


def test_import_replace_retires_what_the_file_lacks(ctl: Ctl) -> None:
    """Import --replace retires the names that the file lacks and rebinds none."""
    for name in ("a", "b"):
        ctl("resolve", name, "--type", "node")
    whole = ctl.json("export")
    del whole["entries"]["b"]
    report = ctl.json("import", "-", "--replace", stdin=json.dumps(whole))
    assert {e["name"]: e["outcome"] for e in report["entries"]} == {"a": "same", "b": "retired"}
    assert [c["name"] for c in ctl.json("list")] == ["a"]


def test_import_unclear_file_changes_nothing(ctl: Ctl) -> None:
    """A file with a key twice is refused with exit status 10 and its place; nothing is taken from it."""
    text = '{"version": 1, "entries": {"a": {"id": 1, "id": 2}, "b": {}}}'
    assert ctl.error("import", "-", stdin=text, status=exits.INVALID)["field"] == "registry.entries.a.id"
    assert ctl.json("list", "--all") == []
    ctl("import", "no-such-file.json", status=exits.USAGE)


def test_backups_into_a_folder_are_dated_and_the_oldest_go(ctl: Ctl, tmp_path: Path) -> None:
    """`backup --into DIR --keep N` writes a dated backup and removes the oldest beyond N, and nothing else in DIR."""
    ctl("resolve", "arm", "--type", "node")
    folder = tmp_path / "backups"
    folder.mkdir()
    old = [folder / f"registry-2026-01-0{day}T031500Z.db" for day in (1, 2, 3)]
    others = [folder / name for name in ("other-2026-01-01T031500Z.db", "registry-2026.db", "registry-x.db", "notes")]
    for path in (*old, *others):
        path.touch()
    report = ctl.json("backup", "--into", folder, "--keep", "2")
    assert report["removed"] == [str(path) for path in old[:2]]
    new = Path(report["file"])
    assert new.parent == folder and new.stat().st_size == report["bytes"] > 0
    assert set(folder.iterdir()) == {new, old[2], *others}
    ahead = folder / "registry-2999-01-01T000000Z.db"  # made while the clock was wrong
    ahead.touch()
    newest = Path(ctl.json("backup", "--into", folder, "--keep", "1")["file"])
    assert {path for path in folder.iterdir() if path not in others} == {newest}
    for words in ((), ("FILE", "--into", folder), ("FILE", "--keep", "2"), ("--into", folder, "--keep", "0")):
        ctl("backup", *words, status=exits.USAGE)


def test_backup_is_a_whole_database(ctl: Ctl) -> None:
    """Backup writes a SQLite file with the caller's rights while the daemon serves; a folder without rights is told."""
    ctl("resolve", "a", "--type", "node")
    file = ctl.registry.with_name("copy.db")
    report = ctl.json("backup", file)
    assert report == {"file": str(file), "bytes": file.stat().st_size}
    assert file.read_bytes().startswith(b"SQLite format 3\0")
    ctl("backup", file.with_name("nosuch") / "copy.db", status=exits.OTHER)


def test_status_and_sessions_of_a_running_daemon(ctl: Ctl, daemon: DaemonProcess, workers: Workers) -> None:
    """Status names the daemon, its registry and its counts; sessions lists who holds something."""
    worker = workers()
    worker.ask("resolve", "a")
    status = ctl.json("status")
    assert (status["pid"], status["registry"], status["held"]) == (daemon.pid, str(daemon.registry), 1)
    assert f"pid: {daemon.pid}" in " ".join(ctl("status").split())
    session = next(s for s in ctl.json("sessions") if s["pid"] == worker.pid)
    assert (session["held"], session["attached"]) == (1, True)
    assert str(worker.pid) in ctl("sessions")


def test_where_says_which_and_why(ctl: Ctl, daemon: DaemonProcess) -> None:
    """Where names the registry, its sockets, the reason of the choice, and who serves it."""
    where = ctl.json("where")
    assert (where["registry"], where["socket"]) == (str(daemon.registry), str(daemon.socket))
    assert (where["answers"], where["pid"], where["exists"]) == (True, daemon.pid, True)
    assert "argument" in where["reason"]
    assert f"yes, pid {daemon.pid}" in ctl("where")


def test_absent_daemon_told_and_not_started(registry_path: Path) -> None:
    """status, sessions, where and stop never start a daemon: exit status 6 (where: 0, answers false)."""
    ctl = Ctl(registry_path)
    for command in ("status", "sessions", "stop"):
        assert ctl.error(command, status=exits.UNREACHABLE)["code"] == "unavailable"
    assert ctl.json("where")["answers"] is False
    ctl("lookup", "a", status=exits.UNREACHABLE)
    assert not daemons_under(registry_path.parent)
    assert not list(registry_path.parent.iterdir())


def test_resolve_starts_a_daemon(registry_path: Path) -> None:
    """Resolve in an empty folder starts the daemon, and later commands are served by the same one."""
    ctl = Ctl(registry_path)
    ulid = ctl("resolve", "a", "--type", "node").strip()
    assert ctl("lookup", "a").strip() == ulid
    assert [ctl.json("status")["pid"]] == daemons_under(registry_path.parent)


def test_stdout_closed_early_is_no_traceback(ctl: Ctl) -> None:
    """A reader that has enough (`| head -1`) ends registryctl without a word."""
    for i in range(3):
        ctl("resolve", f"n{i}", "--type", "node")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(ctl.words("list"), stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (exits.OTHER, b"")


def test_full_disk_under_stdout_is_an_error(ctl: Ctl) -> None:
    """Output that cannot be written is told and is no success."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(ctl.words("export"), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == exits.OTHER
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr
