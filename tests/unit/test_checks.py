"""What doctor makes of what it is shown: statuses, sessions, modes, file systems, measured times."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from madsci_registry._endpoint import Endpoint, choose
from madsci_registry.errors import (
    PermissionDeniedError,
    ProtocolVersionError,
    RegistryTimeoutError,
    UnavailableError,
)
from madsci_registry.protocol import PROTOCOL_VERSION
from madsci_registry.types import SessionInfo
from madsci_registryctl.doctor import checks, crash_test, daemon_checks, probes, socket_checks
from madsci_registryctl.doctor.case import Case, run_checks
from madsci_registryctl.doctor.findings import Finding, Trial, worst
from madsci_registryd import holders, surroundings

NOW = "2026-01-01T00:00:00.000Z"


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    """A registry in a folder of its own, that nobody has made yet."""
    return choose(tmp_path / "registry.json", None, {"HOME": str(tmp_path)}, tmp_path)


def served(endpoint: Endpoint, *sessions: SessionInfo, **status: Any) -> Case:
    """Make the case of a daemon that answers so."""
    answer = {
        "version": version(daemon_checks.DISTRIBUTION),
        "protocol_version": PROTOCOL_VERSION,
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "registry": str(endpoint.registry),
        "database": str(endpoint.database),
        "started_at": NOW,
        "held": 0,
        "proof": "pidfd",
        "degraded": [],
    }
    return Case(endpoint, {**answer, **status}, sessions)


def session(pid: int | None = 1, **facts: Any) -> SessionInfo:
    """Make a session of another process."""
    usual = {"uid": 0, "gid": 0, "proof": "pidfd", "attached": True, "held": 1, "waiting": 0, "protocol_version": 1}
    return SessionInfo(**{"pid": pid, "id": "S", "started_at": NOW, **usual, **facts})


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# the daemon's answers


def test_versions_of_another_daemon_is_a_warning(endpoint: Endpoint) -> None:
    """A daemon of another version than is installed, or of another protocol, should be restarted."""
    assert levels(daemon_checks.versions(served(endpoint))) == ["ok"]
    other = daemon_checks.versions(served(endpoint, version="0.0.1", protocol_version=PROTOCOL_VERSION + 1))
    assert levels(other) == ["warning", "warning"]
    assert "0.0.1" in other[0].found
    assert "registryctl stop" in str(other[0].fix)


def test_program_changed_after_the_start_is_a_warning(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that began before its files were last changed runs older code than its version says."""
    monkeypatch.setattr(daemon_checks, "_runs_our_python", lambda _pid: True)
    assert levels(daemon_checks.program(served(endpoint, started_at="2001-01-01T00:00:00.000Z"))) == ["warning"]
    assert daemon_checks.program(served(endpoint, started_at="2999-01-01T00:00:00.000Z")) == []


def test_program_of_another_environment_is_not_compared(endpoint: Endpoint) -> None:
    """Of a daemon that another Python runs nothing is said: its files are not those that are installed here."""
    assert daemon_checks.program(served(endpoint, pid=1, started_at="2001-01-01T00:00:00.000Z")) == []


def test_clients_of_an_older_protocol_are_a_warning(endpoint: Endpoint) -> None:
    """A client that speaks an older protocol than the daemon is named; one that has not resumed yet is not."""
    others = (session(11, protocol_version=1), session(12, protocol_version=2), session(13, protocol_version=None))
    findings = daemon_checks.clients(served(endpoint, *others, protocol_version=2))
    assert levels(findings) == ["ok", "warning"]
    assert "pid 11" in findings[1].found
    assert "pid 12" not in findings[1].found and "pid 13" not in findings[1].found


def test_clients_do_not_count_doctor_itself(endpoint: Endpoint) -> None:
    """The session of doctor's own questions is none of the registry's clients."""
    (finding,) = daemon_checks.clients(served(endpoint, session(os.getpid(), held=0), session(7)))
    assert finding.found.startswith("1 process;")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"proof": "connection"}, "connection alone"),
        ({"proof": "pid"}, "less surely"),
        ({"proof": "pidfd", "pid": None}, "another PID namespace"),
        ({"attached": False}, "not connected since"),
    ],
)
def test_clients_known_less_surely_are_a_note(endpoint: Endpoint, facts: dict[str, Any], said: str) -> None:
    """A holder whose death or life the daemon cannot prove as well as others' is named, with what that means."""
    findings = daemon_checks.clients(served(endpoint, session(**facts)))
    assert levels(findings) == ["ok", "note"]
    assert said in findings[1].found


def test_proof_lower_than_pidfd_is_a_warning(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no pidfd of a peer is to be had, doctor says what that means and which kernel has it."""
    monkeypatch.setattr(probes, "kernel_proof", lambda: "pid")
    unserved = Case(endpoint, error=UnavailableError("none"))
    for case in (unserved, served(endpoint, proof="pid")):
        (finding,) = checks.proof(case)
        assert (finding.level, finding.fix) == ("warning", "Linux 6.5 or later gives pidfd")
        assert "2 s" in finding.found
    monkeypatch.setattr(probes, "kernel_proof", lambda: "pidfd")
    assert levels(checks.proof(unserved)) == ["ok"]
    assert "MADSCI_REGISTRYD_PROOF" in str(checks.proof(served(endpoint, proof="pid"))[0].fix)


def test_degraded_daemon_is_a_warning_for_each_reason(endpoint: Endpoint) -> None:
    """What the daemon says of itself is passed on, but for the proof of life, which has a finding of its own."""
    said = ["an I/O error ended the last daemon", "holders are proven alive by pid only: this kernel gives no more"]
    assert [f.found for f in daemon_checks.degraded(served(endpoint, degraded=said))] == said[:1]


def test_daemon_that_refuses_is_an_error_with_its_reason(endpoint: Endpoint) -> None:
    """A daemon of another user, or of another protocol, is an error that says what to do."""
    for error in (PermissionDeniedError("not yours"), ProtocolVersionError("speaks 7"), RegistryTimeoutError("silent")):
        (finding,) = daemon_checks.daemon(Case(endpoint, error=error))
        assert finding.level == "error"
        assert error.message in finding.found
        assert finding.fix


def test_daemon_absent_says_whether_a_client_starts_one(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon is a note where the next client starts one, and a warning with the command where none may."""
    case = Case(endpoint, error=UnavailableError("none"))
    monkeypatch.setenv("MADSCI_REGISTRY_AUTOSTART", "1")
    assert levels(daemon_checks.daemon(case)) == ["note"]
    monkeypatch.setenv("MADSCI_REGISTRY_AUTOSTART", "0")
    (finding,) = daemon_checks.daemon(case)
    assert finding.level == "warning"
    assert finding.fix == f"madsci-registryd --registry {endpoint.registry}"


def test_registry_served_at_anothers_socket_is_an_error(endpoint: Endpoint, tmp_path: Path) -> None:
    """A daemon whose database is seen here and which serves another registry than was named is the wrong one."""
    other = tmp_path / "other.db"
    other.touch()
    wrong = served(endpoint, registry=str(other.with_suffix(".json")), database=str(other))
    assert levels(checks.registry(wrong)) == ["error"]
    in_container = served(endpoint, registry="/nosuch/registry.json", database="/nosuch/registry.db")
    assert levels(checks.registry(in_container)) == ["ok"]


# files and sockets


@pytest.mark.parametrize(
    ("mode", "level"), [(0o700, "ok"), (0o750, "note"), (0o720, "error"), (0o777, "error"), (0o1777, "warning")]
)
def test_socket_folder_that_others_may_write_is_an_error(endpoint: Endpoint, mode: int, level: str) -> None:
    """Who may write to the sockets' folder may put others in their place; chmod is the fix, but not for a /tmp."""
    folder = endpoint.socket.parent
    folder.mkdir()
    folder.chmod(mode)
    (finding,) = socket_checks.socket_folder(served(endpoint))
    assert finding.level == level
    assert (finding.fix == f"chmod 700 {folder}") == (level in ("note", "error"))


def test_socket_folder_in_a_folder_for_all_is_a_warning(endpoint: Endpoint) -> None:
    """A run/ of mode 0700 in a registry's folder that all may write to can be replaced as a whole."""
    endpoint.socket.parent.mkdir(mode=0o700)
    endpoint.socket.parent.parent.chmod(0o777)
    assert levels(socket_checks.socket_folder(served(endpoint))) == ["warning"]


def test_socket_folder_of_another_user_is_told(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's folder is an error for who is not root; one that is not the daemon's own is a warning."""
    endpoint.socket.parent.mkdir(mode=0o700)
    mine = endpoint.socket.parent.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert levels(socket_checks.socket_folder(Case(endpoint, error=UnavailableError("none")))) == ["error"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert levels(socket_checks.socket_folder(served(endpoint, uid=mine))) == ["ok"]
    monkeypatch.setattr(Path, "stat", _with_owner(Path.stat, 4711))
    assert levels(socket_checks.socket_folder(served(endpoint, uid=mine))) == ["warning"]


def _with_owner(stat: Callable[..., os.stat_result], uid: int) -> Callable[..., os.stat_result]:
    return lambda *args, **kwargs: os.stat_result((*stat(*args, **kwargs)[:4], uid, *stat(*args, **kwargs)[5:]))


def test_sockets_that_others_may_use_are_an_error(endpoint: Endpoint) -> None:
    """A socket is for its owner alone: any other mode has chmod as its fix."""
    endpoint.socket.parent.mkdir()
    for path in (endpoint.socket, endpoint.lifeline):
        path.touch(mode=0o600)
    assert levels(socket_checks.sockets(served(endpoint))) == ["ok"]
    endpoint.lifeline.chmod(0o666)
    (finding,) = socket_checks.sockets(served(endpoint))
    assert (finding.level, finding.fix) == ("error", f"chmod 600 {endpoint.lifeline}")


def test_sockets_without_a_daemon_say_what_stands_there(endpoint: Endpoint) -> None:
    """A dead daemon's socket is a note, a file in its place an error, and so is a listener that is no daemon."""
    case = Case(endpoint, error=UnavailableError("none"))
    assert levels(socket_checks.sockets(case)) == ["ok"]
    endpoint.socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
        theirs.bind(str(endpoint.socket))
        assert levels(socket_checks.sockets(case)) == ["note"]
        endpoint.lifeline.touch()
        assert levels(socket_checks.sockets(case)) == ["note", "error"]
        theirs.listen()
        assert levels(socket_checks.sockets(case)) == ["error", "error"]
        assert str(os.getpid()) in socket_checks.sockets(case)[0].found


def test_socket_paths_too_long_for_an_address_are_a_note(tmp_path: Path) -> None:
    """A path over 107 bytes works, and is worth knowing for who writes a client."""
    long = choose(tmp_path / ("x" * 120) / "registry.json", None, {}, tmp_path)
    assert levels(socket_checks.socket_paths(Case(long))) == ["note"]
    assert socket_checks.socket_paths(Case(choose("/r/registry.json", None, {}, tmp_path))) == []


def test_database_that_others_may_change_is_an_error(endpoint: Endpoint) -> None:
    """The database is for its owner alone; a folder in its place is an error too."""
    path = endpoint.database
    assert path is not None
    assert checks.database(served(endpoint)) == []
    for mode, level in ((0o600, "ok"), (0o644, "note"), (0o666, "error")):
        path.touch()
        path.chmod(mode)
        assert levels(checks.database(served(endpoint))) == [level]
    path.unlink()
    path.mkdir()
    assert levels(checks.database(served(endpoint))) == ["error"]


def test_database_with_a_large_log_is_a_warning(endpoint: Endpoint) -> None:
    """A write-ahead log above its bound says that something keeps it from being checkpointed."""
    assert endpoint.database is not None
    endpoint.database.touch(mode=0o600)
    with Path(f"{endpoint.database}-wal").open("wb") as log:
        log.truncate(checks.WAL_MAX_BYTES + 1)
    assert levels(checks.database(served(endpoint))) == ["warning"]


@pytest.mark.parametrize(
    ("kind", "level"),
    [("ext4", "ok"), ("nfs4", "error"), ("fuse.sshfs", "error"), ("overlay", "warning"), ("tmpfs", "warning")],
)
def test_file_system_that_cannot_hold_the_database_is_an_error(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, kind: str, level: str
) -> None:
    """A network file system is an error with --state-dir as its fix; one that goes with its container a warning."""
    monkeypatch.setattr(probes, "file_system", lambda _folder: kind)
    (finding,) = checks.file_system(served(endpoint))
    assert finding.level == level
    assert ("--state-dir" in str(finding.fix)) == (level == "error")


def test_foreign_file_systems_are_those_that_the_daemon_refuses() -> None:
    """Doctor and the daemon have one list of file systems, though neither imports the other."""
    assert checks.FOREIGN_FILE_SYSTEMS == surroundings.SHARED_FILE_SYSTEMS


@pytest.mark.parametrize(
    ("left", "level"),
    [
        (probes.Space(1 << 30, 1000, False), "ok"),
        (probes.Space(1 << 30, None, False), "ok"),
        (probes.Space(255 << 20, 1000, False), "warning"),
        (probes.Space(15 << 20, 1000, False), "error"),
        (probes.Space(1 << 30, 0, False), "error"),
        (probes.Space(1 << 30, 1000, True), "error"),
    ],
)
def test_disk_space_that_is_little_is_told(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, left: probes.Space, level: str
) -> None:
    """Below 256 MiB is a warning; below what the write-ahead log may need, no inodes, or read-only an error."""
    monkeypatch.setattr(probes, "space", lambda _folder: left)
    assert levels(checks.disk_space(served(endpoint))) == [level]


def test_run_checks_goes_on_where_something_may_not_be_seen(endpoint: Endpoint) -> None:
    """What may not be looked at is an error of its own, and the other checks are made."""

    def shut(_case: Case) -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/shut")

    found = list(run_checks({"shut": shut, "proof of life": checks.proof}, served(endpoint)))
    assert (found[0].level, found[0].found) == ("error", "/shut: Permission denied")
    assert len(found) == 2


# the kernel's answers


def test_probes_see_what_the_daemon_sees() -> None:
    """Doctor finds the same tier of proof as the daemon does; file systems are those of the kernel's own table."""
    assert probes.kernel_proof() == holders.best_proof("pidfd")
    assert probes.file_system(Path("/proc/self")) == "proc"


def test_flock_holder_is_seen_without_taking_the_lock(tmp_path: Path) -> None:
    """Who has an flock is read from the kernel's list; a file that nobody locked has no holder."""
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert probes.flock_holder(path) is None
        fcntl.flock(file, fcntl.LOCK_EX)
        assert probes.flock_holder(path) == os.getpid()


def test_nearest_folder_of_one_that_is_not_there(tmp_path: Path) -> None:
    """What is said of a folder that is to be made is said of the nearest one that is there."""
    assert probes.nearest_folder(tmp_path / "a" / "b") == tmp_path


# the crash test's judgement


def test_judged_slow_is_a_warning_and_broken_an_error() -> None:
    """Slower than promised is a warning, as long as a timeout an error, and a broken promise whatever its time."""
    assert crash_test.judged("a", "x", [1.0, 49.0], 50.0, []).word == "OK"
    assert crash_test.judged("a", "x", [1.0, 51.0], 50.0, []).word == "SLOW"
    assert crash_test.judged("a", "x", [1.0, 1001.0], 50.0, []).word == "FAILED"
    assert crash_test.judged("a", "x", [1001.0], 500.0, []).word == "SLOW"
    failed = crash_test.judged("a", "x", [1.0], 50.0, ["held twice"])
    assert (failed.word, failed.found, failed.broken) == ("FAILED", "held twice", ("held twice",))


def test_judged_grant_before_the_death_or_with_an_old_token_is_broken() -> None:
    """A grant to a second holder, and a fencing token that does not grow, are broken promises."""
    now = time.monotonic()
    assert crash_test.judged_grant({"at": now, "token": 8}, 7, now - 0.25) == (250.0, [])
    assert len(crash_test.judged_grant({"at": now - 1, "token": 7}, 7, now)[1]) == 2


def test_worst_is_the_highest_level() -> None:
    """One error makes the whole an error; nothing found is ok."""
    assert worst([]) == "ok"
    assert worst([Finding("note", "a", "b"), Trial("warning", "a", "b"), Finding("ok", "a", "b")]) == "warning"
