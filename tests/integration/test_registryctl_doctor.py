"""registryctl doctor against real daemons, and its crash test."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Workers
from ctl import Ctl
from helpers import PATIENCE_S, DaemonProcess, daemons_under, environment, until
from madsci_registry import RegistryClient
from madsci_registryctl import exits

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (setuid)")


def found(answer: dict[str, Any], check: str, level: str | None = None) -> list[dict[str, Any]]:
    """Pick the findings of a check, or those of a level among them."""
    return [f for f in answer["findings"] if f["check"] == check and level in (None, f["level"])]


# a daemon that serves


def test_doctor_of_a_sound_registry_finds_no_error(daemon: DaemonProcess, workers: Workers) -> None:
    """Where all is well doctor says so of each thing it looked at, with exit status 0, and leaves all as it was."""
    workers().ask("resolve", "a")
    ctl = Ctl(daemon.registry)
    before = sorted(daemon.registry.parent.rglob("*"))
    answer = ctl.json("doctor")
    assert list(answer) == ["worst", "findings"]
    assert all(list(finding) == ["level", "check", "found", "fix"] for finding in answer["findings"])
    for check in ("registry", "daemon", "version", "clients", "socket folder", "sockets", "database", "disk space"):
        assert [f["level"] for f in found(answer, check)] == ["ok"], found(answer, check)
    assert str(daemon.pid) in found(answer, "daemon")[0]["found"]
    assert found(answer, "clients")[0]["found"] == "1 process; 1 name held"
    assert sorted(daemon.registry.parent.rglob("*")) == before


def test_doctor_prints_a_line_each_and_the_fix_under_it(daemon: DaemonProcess) -> None:
    """For people a finding is a line of level, check and what was found; its fix stands under it, aligned."""
    daemon.socket.parent.chmod(0o755)
    lines = Ctl(daemon.registry)("doctor").splitlines()
    assert lines[0].startswith("ok       registry          ")
    place = next(i for i, line in enumerate(lines) if line.startswith("note     socket folder     "))
    assert lines[place + 1] == f"{' ' * 27}fix: chmod 700 {daemon.socket.parent}"


def test_doctor_open_folder_is_an_error(daemon: DaemonProcess) -> None:
    """A socket folder that all may write to is an error: exit status 11, and chmod 700 is the fix."""
    daemon.socket.parent.chmod(0o777)
    ctl = Ctl(daemon.registry)
    answer = ctl.json("doctor", status=exits.ERRORS_FOUND)
    assert answer["worst"] == "error"
    assert [f["fix"] for f in found(answer, "socket folder", "error")] == [f"chmod 700 {daemon.socket.parent}"]
    assert "chmod 700" in ctl("doctor", status=exits.ERRORS_FOUND)


def test_doctor_stopped_daemon_is_an_error_in_time(daemon: DaemonProcess) -> None:
    """A daemon that is stopped keeps doctor for one timeout only; it is named, and how it goes on."""
    daemon.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = Ctl(daemon.registry).json("doctor", "--verify", "--timeout", "1", status=exits.ERRORS_FOUND)
        assert time.monotonic() - began < PATIENCE_S / 2, "far above the timeout: a request for each check"
        (silent,) = found(answer, "daemon")
        assert silent["level"] == "error"
        assert silent["fix"].startswith(f"kill -CONT {daemon.pid}")
        assert found(answer, "integrity", "error")
        assert found(answer, "disk space")
    finally:
        daemon.signal(signal.SIGCONT)


def test_doctor_lower_proof_is_told_once_with_who_is_concerned(registry_path: Path, workers: Workers) -> None:
    """A daemon that is set to a lower proof is one warning, and a holder known by its connection alone a note."""
    config = registry_path.with_name("lower.toml")
    config.write_text('proof = "connection"')
    with DaemonProcess(registry_path, "--config", str(config)):
        holder = workers(MADSCI_REGISTRY_AUTOSTART="0")
        holder.ask("resolve", "a")
        answer = Ctl(registry_path).json("doctor")
    assert [f["level"] for f in found(answer, "proof of life")] == ["warning"]
    assert not found(answer, "degraded")
    (note,) = found(answer, "clients", "note")
    assert str(holder.pid) in note["found"]
    assert "connection alone" in note["found"]


def test_doctor_verify_checks_a_copy_and_removes_it(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--verify checks the whole database while its daemon serves, on a copy that is gone afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    answer = Ctl(daemon.registry).json("doctor", "--verify")
    assert [f["level"] for f in found(answer, "integrity")] == ["ok"]
    assert "copy" in found(answer, "integrity")[0]["found"]
    assert not list(tmp_path.iterdir())


def test_doctor_verify_served_damage_is_an_error(daemon: DaemonProcess) -> None:
    """Damage that the daemon has not met yet is found by --verify while it serves; restore is the fix."""
    with RegistryClient(daemon.registry, autostart=False) as client:
        client.resolve("a", "node", acquire_lock=False)
    daemon.terminate()
    with sqlite3.connect(daemon.registry.with_suffix(".db")) as db:  # foreign keys are off: the row has no partner
        db.execute("INSERT INTO names (name, renamed_id) VALUES ('gone', '01ARZ3NDEKTSV4RRFFQ69G5FAV')")
    db.close()
    daemon.start()
    answer = Ctl(daemon.registry).json("doctor", "--verify", status=exits.ERRORS_FOUND)
    (fault,) = found(answer, "integrity")
    assert fault["level"] == "error"
    assert "partner" in fault["found"]
    assert fault["fix"].startswith("registryctl stop") and "restore" in fault["fix"]


# no daemon


def test_doctor_without_a_registry_makes_none(registry_path: Path) -> None:
    """Where there is no registry doctor says so, starts no daemon and makes no folder."""
    registry = registry_path.parent / "new" / "registry.json"
    answer = Ctl(registry).json("doctor", "--verify")
    assert [f["level"] for f in found(answer, "registry")] == ["note"]
    assert [f["level"] for f in found(answer, "daemon")] == ["note"]
    assert [f["level"] for f in found(answer, "integrity")] == ["note"]
    assert not registry.parent.exists()
    assert not daemons_under(registry_path.parent)


def test_doctor_after_a_killed_daemon_starts_none(daemon: DaemonProcess) -> None:
    """The sockets of a killed daemon are notes, its database is checked in its place, and no daemon is started."""
    daemon.kill()
    answer = Ctl(daemon.registry).json("doctor", "--verify")
    assert [f["level"] for f in found(answer, "sockets")] == ["note", "note"]
    assert [f["level"] for f in found(answer, "integrity")] == ["ok"]
    assert not daemons_under(daemon.registry.parent)


def test_doctor_verify_damaged_database_is_an_error(daemon: DaemonProcess) -> None:
    """A damaged database is an error of --verify, and only of it; restore is the fix."""
    daemon.terminate()
    path = daemon.registry.with_suffix(".db")
    whole = bytearray(path.read_bytes())
    whole[4096 : 4096 * 4] = b"\xaa" * (4096 * 3)
    path.write_bytes(whole)
    ctl = Ctl(daemon.registry)
    assert not found(ctl.json("doctor"), "integrity")
    answer = ctl.json("doctor", "--verify", status=exits.ERRORS_FOUND)
    assert found(answer, "integrity", "error")
    assert all("restore BACKUP" in fault["fix"] for fault in found(answer, "integrity"))


def test_doctor_daemon_at_another_socket_is_an_error(registry_path: Path) -> None:
    """A daemon that serves the database at another socket is named, with the variable that leads clients to it."""
    elsewhere = registry_path.parent / "elsewhere.sock"
    serving = DaemonProcess(registry_path, "--socket", str(elsewhere))
    serving.lifeline = elsewhere.with_suffix(".life")
    with serving:
        answer = Ctl(registry_path).json("doctor", status=exits.ERRORS_FOUND)
        (other,) = found(answer, "daemon", "error")
        assert str(serving.pid) in other["found"]
        assert other["fix"] == f"for clients: MADSCI_REGISTRY_SOCKET={elsewhere}"


def test_doctor_of_a_socket_alone(registry_path: Path) -> None:
    """Where only a socket is named doctor checks what there is, with a daemon and without."""
    with DaemonProcess(registry_path) as daemon:
        words = [sys.executable, "-m", "madsci_registryctl", "--socket", str(daemon.socket), "--json", "doctor"]
        served = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=PATIENCE_S).stdout)
        assert found(served, "database", "ok") and found(served, "sockets", "ok")
    unserved = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=PATIENCE_S).stdout)
    assert found(unserved, "daemon", "warning")
    assert not found(unserved, "database")


@AS_ROOT
def test_doctor_unreadable_folder_is_an_error(daemon: DaemonProcess) -> None:
    """A user who may not look into the registry's folder is told so, with the rest of what can be checked."""
    as_stranger = (
        "import os, sys; from madsci_registryctl.__main__ import main;"
        "from madsci_registryctl.doctor import case, checks, daemon_checks, socket_checks, findings, probes;"
        "import madsci_registry._autostart, madsci_registry.client, madsci_registry._endpoint, pydantic;"
        "os.setgroups([]); os.setgid(65533); os.setuid(65533); sys.exit(main(sys.argv[1:]))"
    )
    daemon.registry.parent.parent.chmod(0o755)
    for mode, check in ((0o700, "registry"), (0o755, "daemon")):
        daemon.registry.parent.chmod(mode)
        words = [sys.executable, "-c", as_stranger, "--json", "--registry", str(daemon.registry), "doctor"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == exits.ERRORS_FOUND, done.stderr
        answer = json.loads(done.stdout)
        assert found(answer, check, "error"), answer
        assert "Traceback" not in done.stderr


# the crash test


@pytest.fixture
def scratch_root(registry_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the crash test makes its folder: nothing may be left in it, nor any process that names it."""
    folder = registry_path.parent / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    until(lambda: not processes_of(folder), "for the crash test's processes to be gone")


def processes_of(folder: Path) -> list[int]:
    """List the pids of processes whose command line names something in the folder."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(folder) + b"/" in (entry / "cmdline").read_bytes():
                pids.append(int(entry.name))
        except OSError:
            continue
    return pids


def trials_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in answer["findings"] if "times_ms" in finding]


def test_crash_test_on_a_sound_host_breaks_nothing(registry_path: Path, scratch_root: Path) -> None:
    """The crash test measures each hand-over and restart, breaks no promise of safety, and leaves nothing behind."""
    done = subprocess.run(
        Ctl(registry_path).words("--json", "doctor", "--crash-test"), capture_output=True, check=False
    )
    answer = json.loads(done.stdout)
    trials = trials_of(answer)
    names = ["killed holder", "forked holder", "stopped holder", "restart", "waiter over it", "died meanwhile"]
    assert [trial["check"] for trial in trials] == names
    assert [trial["broken"] for trial in trials] == [[]] * len(names), trials
    assert [len(trial["times_ms"]) for trial in trials] == [10, 5, 1, 1, 1, 1]
    assert done.returncode == (exits.ERRORS_FOUND if answer["worst"] == "error" else 0)
    assert not processes_of(scratch_root)
    assert not list(scratch_root.iterdir())
    assert not registry_path.exists() and not registry_path.with_suffix(".db").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_crash_test_interrupted_leaves_nothing(
    registry_path: Path, scratch_root: Path, number: int, status: int
) -> None:
    """Ctrl-C and TERM in the middle of the crash test end what it started and remove its folder."""
    doctor = Ctl(registry_path).start("doctor", "--crash-test")
    until(lambda: len(processes_of(scratch_root)) >= 3, "for the crash test to be in its midst")
    doctor.send_signal(number)
    doctor.communicate(timeout=PATIENCE_S)
    assert doctor.returncode == status
    assert not list(scratch_root.iterdir())


def test_crash_test_killed_leaves_no_process(registry_path: Path, scratch_root: Path) -> None:
    """Where doctor itself gets SIGKILL, the kernel ends what it started."""
    doctor = Ctl(registry_path).start("doctor", "--crash-test")
    until(lambda: len(processes_of(scratch_root)) >= 3, "for the crash test to be in its midst")
    doctor.kill()
    doctor.communicate(timeout=PATIENCE_S)
    until(lambda: not processes_of(scratch_root), "for its processes to be gone")


def stand_in(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put another program in the place of the daemon's, for all that is started from now on."""
    package = folder / "stand-in" / "madsci_registryd"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{environment()['PYTHONPATH']}")


def test_crash_test_daemon_that_does_not_start_fails(
    registry_path: Path, scratch_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scratch daemon that does not start is an error that says why, and nothing is left of it."""
    stand_in(registry_path.parent, "raise SystemExit('no daemon today')", monkeypatch)
    shown = Ctl(registry_path)("doctor", "--crash-test", status=exits.ERRORS_FOUND)
    assert shown.count("FAILED   ") == 5
    assert "no daemon today" in shown
    assert not list(scratch_root.iterdir())


def test_crash_test_finds_a_daemon_that_forgets_its_locks(
    registry_path: Path, scratch_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that loses its locks when it is restarted breaks promises, and the crash test says which."""
    forgetful = f"""
import os, pathlib, sys
registry = pathlib.Path(sys.argv[sys.argv.index("--registry") + 1])
for file in registry.parent.glob("registry.db*"):
    file.unlink()
os.environ["PYTHONPATH"] = {environment()["PYTHONPATH"]!r}
os.execv(sys.executable, [sys.executable, "-m", "madsci_registryd", *sys.argv[1:]])
"""
    stand_in(registry_path.parent, forgetful, monkeypatch)
    answer = Ctl(registry_path).json("doctor", "--crash-test", status=exits.ERRORS_FOUND)
    broken = {trial["check"]: trial["broken"] for trial in trials_of(answer)}
    assert not broken["killed holder"] and not broken["forked holder"]
    assert broken["stopped holder"] and broken["restart"]
    assert not list(scratch_root.iterdir())
