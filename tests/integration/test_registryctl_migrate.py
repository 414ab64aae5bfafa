"""`registryctl migrate` and `madsci-registryd rollback`: a registry.json taken over, and the way back."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ctl import Ctl
from helpers import DaemonProcess, daemons_under, environment
from madsci_registry.registry_json import CLAIM_INSTANCE
from madsci_registryctl import exits
from madsci_registryd import rollback as way_back
from madsci_registryd.faults import StartFault
from madsci_registryd.settings import load

AT = "2026-11-24T13:00:00.123456Z"
LATER = "2999-01-01T00:00:00.000000Z"
ULIDS = [f"01ARZ3NDEKTSV4RRFFQ69G5FA{n}" for n in range(10)]


@pytest.fixture
def ctl(registry_path: Path) -> Ctl:
    """Registryctl on a registry that no daemon serves yet."""
    return Ctl(registry_path)


def lock(instance: str = "01ARZ3NDEKTSV4RRFFQ69G5FAV", expires_at: str = LATER) -> dict[str, Any]:
    return {
        "holder_pid": 77, "holder_host": "lab-3", "holder_instance": instance,
        "acquired_at": AT, "heartbeat_at": AT, "expires_at": expires_at,
    }  # fmt: skip


def entry(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": ULIDS[number], "component_type": "node", "created_at": AT, "last_seen": AT, "metadata": {"n": number},
        "lock": None, "workcell_id": None, **more,
    }  # fmt: skip


def written(path: Path, entries: dict[str, Any]) -> bytes:
    """Write a registry.json as MADSci does, and return its bytes."""
    content = json.dumps({"version": 1, "created_at": AT, "updated_at": AT, "entries": entries}, indent=2).encode()
    path.write_bytes(content)
    return content


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {line["name"]: line["outcome"] for line in report["entries"]}


def copies(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.before-migration-*"))


def rollback(registry: Path) -> subprocess.CompletedProcess[str]:
    """Run `madsci-registryd rollback`."""
    return subprocess.run(
        DaemonProcess(registry).command("rollback"), env=environment(), capture_output=True, text=True, check=False
    )


def test_migrate_takes_over_what_is_there_and_keeps_the_original(ctl: Ctl) -> None:
    """The registry's own file comes in with its ULIDs, each entry is told; the original is kept, byte for byte."""
    original = written(ctl.registry, {"arm": entry(1), "plate reader": entry(2, id="node-7")})
    report = ctl.json("migrate")
    assert outcomes(report) == {"arm": "added", "plate reader": "added"}
    assert [line["reason"] for line in report["entries"]] == ["", "id is no ULID: kept as it is"]
    (copy,) = copies(ctl.registry)
    assert report["kept"] == str(copy) and copy.read_bytes() == original
    assert copy.stat().st_mode == ctl.registry.stat().st_mode
    assert ctl("lookup", "arm").strip() == ULIDS[1] and ctl("lookup", "plate reader").strip() == "node-7"
    assert ctl.json("show", "node-7")["name"] == "plate reader"


def test_migrate_again_changes_nothing(ctl: Ctl) -> None:
    """A second run, with the daemon or after its death, says `same` of each entry and makes no other copy."""
    written(ctl.registry, {"arm": entry(1), "b": entry(2)})
    ctl("migrate")
    events = len(ctl.json("history"))
    for _ in range(2):
        report = ctl.json("migrate")
        assert set(outcomes(report).values()) == {"same"} and report["kept"] is None
        assert len(copies(ctl.registry)) == 1
    assert len(ctl.json("history")) == events
    ctl("--yes", "stop")
    assert set(outcomes(ctl.json("migrate")).values()) == {"same"} and len(copies(ctl.registry)) == 1


def test_migrate_dry_run_changes_nothing(ctl: Ctl) -> None:
    """--dry-run says what would be, starts no daemon beside the registry's own file, writes and copies nothing."""
    entries = {"arm": entry(1), "twin": entry(1), "bad": entry(2, component_type="robot"), "b": entry(3)}
    content = written(ctl.registry, entries)
    report = ctl.json("migrate", "--dry-run", status=exits.CONFLICT)
    assert report["dry_run"] is True and report["kept"] is None
    assert outcomes(report) == {"arm": "added", "twin": "conflict", "bad": "invalid", "b": "added"}
    assert [path.name for path in ctl.registry.parent.iterdir()] == ["registry.json"]
    assert ctl.registry.read_bytes() == content and not daemons_under(ctl.registry.parent)
    real = ctl.json("migrate", status=exits.CONFLICT)
    assert outcomes(real) == outcomes(report), "and that is what then happens"
    assert outcomes(ctl.json("migrate", "--dry-run"))["arm"] == "same"


def test_migrate_dry_run_where_only_a_start_would_tell_is_refused(ctl: Ctl) -> None:
    """Where a database is there and no daemon, a dry run of the registry's own file says why it cannot tell."""
    written(ctl.registry, {"arm": entry(1)})
    ctl("migrate")
    ctl("--yes", "stop")
    error = ctl.error("migrate", "--dry-run", status=exits.UNREACHABLE)
    assert "--from" in error["hint"] and not daemons_under(ctl.registry.parent)


def test_migrate_from_another_file_leaves_that_file(daemon: DaemonProcess, tmp_path: Path) -> None:
    """--from FILE takes another file over: it stays as it is, the copy is beside it, conflicts are told and refused."""
    ctl = Ctl(daemon.registry)
    ulid = ctl("resolve", "arm", "--type", "node").strip()
    file = tmp_path / "old [1].json"
    content = written(file, {"arm": entry(1), "new": entry(2)})
    assert outcomes(ctl.json("migrate", "--from", file, "--dry-run", status=exits.CONFLICT))["new"] == "added"
    assert not copies(file) and ctl.error("lookup", "new", status=exits.NOT_FOUND)
    for expected in ("added", "same"):
        report = ctl.json("migrate", "--from", file, status=exits.CONFLICT)
        assert outcomes(report) == {"arm": "conflict", "new": expected}
        assert file.read_bytes() == content
        assert [path.read_bytes() for path in tmp_path.glob("old*.before-migration-*")] == [content]
    assert ctl("lookup", "arm").strip() == ulid


def test_migrate_file_that_changed_since_has_a_second_copy(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Another original on the same day is kept under another name; nothing that was kept is written over."""
    file = tmp_path / "old.json"
    first = written(file, {"a": entry(1)})
    Ctl(daemon.registry)("migrate", "--from", file)
    second = written(file, {"a": entry(1), "b": entry(2)})
    Ctl(daemon.registry)("migrate", "--from", file)
    assert {path.read_bytes() for path in copies(file)} == {first, second}


def test_migrate_original_that_is_kept_already_is_kept_once(
    daemon: DaemonProcess, ctl: Ctl, base_folder: Path, tmp_path: Path
) -> None:
    """A file that is taken over into two registries has one copy, whatever its name is."""
    file = tmp_path / "old [1]*?.json"
    written(file, {"a": entry(1)})
    with tempfile.TemporaryDirectory(dir=base_folder) as name, DaemonProcess(Path(name) / "registry.json") as other:
        for one in (ctl, Ctl(other.registry)):
            assert outcomes(one.json("migrate", "--from", file)) == {"a": "added"}
    assert len(list(tmp_path.iterdir())) == 2


def test_migrate_torn_file_saves_what_can_be_read_and_tells_the_rest_by_line(ctl: Ctl) -> None:
    """Of a torn file the complete entries come in, and what could not be read is told with its line; status 10."""
    content = written(ctl.registry, {"a": entry(1), "b": entry(2), "torn": entry(3), "lost": entry(4)})
    cut = content.index(b'"torn"') + 60
    ctl.registry.write_bytes(content[:cut])
    done = ctl.run("migrate", status=exits.INVALID)
    line = content[:cut].count(b"\n", 0, content.index(b'"torn"')) + 1
    rows = [row.split(None, 2) for row in done.stdout.splitlines()[1:]]
    assert rows[:2] == [["added", "a", "-"], ["added", "b", "-"]]
    assert rows[2][:2] == ["invalid", "torn"] and rows[2][2].startswith(f"line {line}: ")
    assert [path.read_bytes() for path in copies(ctl.registry)] == [content[:cut]]
    assert ctl("lookup", "b").strip() == ULIDS[2]
    ctl("lookup", "torn", status=exits.NOT_FOUND)
    json.loads(ctl.registry.read_bytes())


def test_migrate_one_entry_that_cannot_be_kept_costs_no_other(daemon: DaemonProcess, tmp_path: Path) -> None:
    """An entry that no message holds, with NaN, or of an unknown type is told as invalid; the others come in."""
    file = tmp_path / "old.json"
    big, nan = entry(1, metadata={"x": "y" * 600_000}), entry(2, metadata={"x": float("nan")})
    written(file, {"big": big, "nan": nan, "robot": entry(3, component_type="robot"), "fine": entry(4)})
    report = Ctl(daemon.registry).json("migrate", "--from", file, status=exits.INVALID)
    assert outcomes(report) == {"big": "invalid", "nan": "invalid", "robot": "invalid", "fine": "added"}
    assert report["counts"]["invalid"] == 3 and all(e["reason"] for e in report["entries"] if e["name"] != "fine")


def test_migrate_tells_who_holds_a_name_by_the_file(daemon: DaemonProcess, tmp_path: Path) -> None:
    """The living lock of an old program is told with host, pid and end; expired ones and our claims are not."""
    file = tmp_path / "old.json"
    locks = {"living": lock(), "expired": lock(expires_at=AT), "claim": lock(f"{CLAIM_INSTANCE} 1"), "none": None}
    written(file, {name: entry(n, lock=value) for n, (name, value) in enumerate(locks.items())})
    report = Ctl(daemon.registry).json("migrate", "--from", file)
    reasons = {line["name"]: line["reason"] for line in report["entries"]}
    assert reasons.pop("living") == f"held by an old program on lab-3, pid 77, until {LATER}"
    assert set(reasons.values()) == {""}


def test_migrate_empty_file_of_madsci_init_is_fine(ctl: Ctl) -> None:
    """What `madsci init` writes is taken over as what it is: nothing, and no copy of it."""
    ctl.registry.write_text('{"entries": {}}')
    report = ctl.json("migrate")
    assert report["entries"] == [] and report["kept"] is None and not copies(ctl.registry)


def test_migrate_without_a_file_is_a_wrong_usage(ctl: Ctl, tmp_path: Path) -> None:
    """Where there is no file, nothing is started or made, and the way to name one is told; status 2."""
    assert "--from" in ctl.error("migrate", status=exits.USAGE)["message"]
    assert "--from" in ctl.error("migrate", "--from", tmp_path / "none", status=exits.USAGE)["message"]
    assert not list(ctl.registry.parent.iterdir())
    for words in (["--rollback", "--dry-run"], ["--rollback", "--from", "x"]):
        assert "--rollback" in ctl.error("migrate", *words, status=exits.USAGE)["message"]


def test_rollback_clears_our_claims_and_nothing_else(ctl: Ctl) -> None:
    """With the daemon dead, the database damaged or missing, rollback sets our claims to null and says their names."""
    entries = {
        "ours": entry(1, lock=lock(CLAIM_INSTANCE)), "theirs": entry(2, lock=lock()), "free": entry(3),
        "ours too": entry(4, lock=lock(f"{CLAIM_INSTANCE}:7"), extra={"kept": [1.5]}),
    }  # fmt: skip
    written(ctl.registry, entries)
    ctl.registry.chmod(0o640)
    ctl.registry.with_suffix(".db").write_bytes(b"garbage")
    assert ctl.json("migrate", "--rollback")["cleared"] == ["ours", "ours too"]
    for name in ("ours", "ours too"):
        entries[name]["lock"] = None
    now = ctl.registry.read_bytes()
    assert now == json.dumps({"version": 1, "created_at": AT, "updated_at": AT, "entries": entries}, indent=2).encode()
    assert ctl.registry.stat().st_mode & 0o777 == 0o640
    before = ctl.registry.stat()
    done = rollback(ctl.registry)
    assert (done.returncode, done.stdout) == (0, "") and "Old MADSci can use" in done.stderr
    assert ctl.registry.stat() == before, "a second time changes nothing"
    assert ctl.registry.with_suffix(".db").read_bytes() == b"garbage"


def test_rollback_of_a_real_claim_frees_the_name_for_old_programs(daemon: DaemonProcess) -> None:
    """What a daemon that was killed left in the file for a held name is a claim, and rollback takes it away."""
    ctl = Ctl(daemon.registry)
    with ctl.start("run", "arm", "--type", "node", "--", "cat") as holder:
        assert holder.stdin
        holder.stdin.write("x\n")
        holder.stdin.flush()
        assert holder.stdout
        assert holder.stdout.readline() == "x\n"
        holder.send_signal(signal.SIGSTOP)  # it would start the daemon again
        daemon.kill()
        holder.kill()
        holder.communicate()
    assert json.loads(daemon.registry.read_bytes())["entries"]["arm"]["lock"]["holder_instance"].startswith(
        CLAIM_INSTANCE
    )
    assert ctl("migrate", "--rollback").splitlines() == ["arm"]
    assert json.loads(daemon.registry.read_bytes())["entries"]["arm"]["lock"] is None


def test_rollback_is_refused_while_a_daemon_serves(daemon: DaemonProcess) -> None:
    """While a daemon serves, or hangs, rollback changes nothing and says what to do first."""
    ctl = Ctl(daemon.registry)
    ctl("resolve", "arm", "--type", "node")
    error = ctl.error("migrate", "--rollback", status=exits.OTHER)
    assert error["code"] == "busy" and "registryctl stop" in error["message"] and "AUTOSTART=0" in error["message"]
    assert rollback(daemon.registry).returncode == 69
    daemon.signal(signal.SIGSTOP)
    assert ctl.error("--timeout", "0.5", "migrate", "--rollback", status=exits.OTHER)["code"] == "busy"
    daemon.signal(signal.SIGCONT)


def test_rollback_leaves_a_torn_file_and_says_what_mends_it(ctl: Ctl) -> None:
    """A file that is not whole is not written over: rollback says what is wrong and that a start writes it anew."""
    content = written(ctl.registry, {"a": entry(1, lock=lock(CLAIM_INSTANCE))})
    ctl.registry.write_bytes(content[:-9])
    error = ctl.error("migrate", "--rollback", status=exits.INVALID)
    assert error["code"] == "corrupt" and "line" in error["message"] and "daemon" in error["message"]
    assert rollback(ctl.registry).returncode == 65
    assert ctl.registry.read_bytes() == content[:-9]
    twice = b'{"entries": {"a": {"id": "1", "lock": null}, "a": {"id": "2", "lock": null}}}'
    ctl.registry.write_bytes(twice)
    assert rollback(ctl.registry).returncode == 65 and ctl.registry.read_bytes() == twice


def test_rollback_keeps_entries_that_we_cannot_read(ctl: Ctl) -> None:
    """What is wrong in one entry only (NaN) stays as it is, its claim cleared like the others'."""
    written(ctl.registry, {"a": entry(1, metadata={"x": float("nan")}, lock=lock(CLAIM_INSTANCE))})
    assert ctl.json("migrate", "--rollback")["cleared"] == ["a"]
    assert b'"x": NaN' in ctl.registry.read_bytes()


def test_rollback_writes_only_under_the_files_lock(registry_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an old program has the file's lock for too long, that is told, and the file stays as it is."""
    monkeypatch.setattr(way_back, "LOCK_WAIT_S", 0.1)
    content = written(registry_path, {"a": entry(1, lock=lock(CLAIM_INSTANCE))})
    with Path(f"{registry_path}.lock").open("w") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        with pytest.raises(StartFault, match="locked by another process"):
            way_back.clear_claims(load({"registry": registry_path}, None))
        assert registry_path.read_bytes() == content
    assert way_back.clear_claims(load({"registry": registry_path}, None)) == ["a"]


def test_rollback_without_a_file_has_nothing_to_do(ctl: Ctl) -> None:
    """Where there is no registry.json there is no claim; where a link stands in its place it is not followed."""
    assert ctl.json("migrate", "--rollback")["cleared"] == []
    target = ctl.registry.with_name("target")
    target.write_bytes(b"{}")
    os.symlink(target, ctl.registry)  # noqa: PTH211
    assert rollback(ctl.registry).returncode == 73
    assert target.read_bytes() == b"{}"
