"""What keeps a daemon from starting, and what it does about a hostile world while it runs: nothing is overwritten."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Workers
from helpers import PATIENCE_S, DaemonProcess, environment, until
from madsci_registry import (
    BusyError,
    HeldError,
    NoSpaceError,
    QuotaError,
    Registration,
    RegistryClient,
    UnavailableError,
    UnknownOutcomeError,
)

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (setpriv, mount)")


def run(registry: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the daemon's program until it ends by itself."""
    command = DaemonProcess(registry).command(*arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env or environment(), check=False)


@pytest.fixture
def database(registry_path: Path) -> Path:
    """A sound database with one name in it, its daemon ended in order."""
    with DaemonProcess(registry_path) as daemon:
        with RegistryClient(registry_path, autostart=False) as client:
            client.resolve("arm", "node", acquire_lock=False)
        assert daemon.terminate() == 0
    return registry_path.with_suffix(".db")


def scribbled(path: Path) -> None:
    path.write_bytes(b"this is no database, it is somebody's notes" * 10)


def other_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA application_id = 77")
        db.execute("CREATE TABLE theirs (x)")
    db.close()


def no_application(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode = delete")
        db.execute("PRAGMA user_version = 999")
    db.close()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("spoil", [scribbled, other_program, no_application, newer, cut_off])
def test_start_on_a_database_that_is_not_ours_is_refused_and_leaves_it(
    database: Path, registry_path: Path, spoil: object
) -> None:
    """A corrupt, foreign or newer database is refused with status 65 and stays as it is, byte for byte."""
    spoil(database)  # type: ignore[operator]
    before = database.read_bytes()
    ended = run(registry_path)
    assert ended.returncode == 65, ended.stderr
    assert str(database) in ended.stderr
    assert database.read_bytes() == before


def test_second_daemon_is_refused_and_names_the_first(daemon: DaemonProcess) -> None:
    """Exactly one daemon serves a database: a second one says who does and ends with 69, the first serves on."""
    ended = run(daemon.registry)
    assert ended.returncode == 69 and str(daemon.pid) in ended.stderr
    with RegistryClient(daemon.registry, autostart=False) as client:
        assert client.status()["pid"] == daemon.pid


@pytest.mark.parametrize("command", ["verify", "restore"])
def test_verify_and_restore_need_the_daemon_ended(daemon: DaemonProcess, command: str) -> None:
    """Verify and restore touch no database that is being served."""
    arguments = [command] + ([str(daemon.registry)] if command == "restore" else [])
    assert run(daemon.registry, *arguments).returncode == 69


def test_socket_of_another_registry_is_not_taken(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A socket at which a living daemon of another registry listens is left alone (libzmq alone would take it)."""
    ended = run(tmp_path / "other.json", "--socket", str(daemon.socket))
    assert ended.returncode == 69
    with RegistryClient(daemon.registry, autostart=False) as client:
        assert client.status()["pid"] == daemon.pid


def test_something_else_at_the_sockets_path_is_not_removed(registry_path: Path) -> None:
    """A file that stands where the socket should be is not removed: status 73."""
    run_folder = registry_path.parent / "run"
    run_folder.mkdir()
    (run_folder / f"{registry_path.stem}.sock").write_text("precious")
    ended = run(registry_path)
    assert ended.returncode == 73, ended.stderr
    assert (run_folder / f"{registry_path.stem}.sock").read_text() == "precious"


@AS_ROOT
@pytest.mark.parametrize(("folder_mode", "database_mode"), [(0o555, None), (0o777, 0o400)])
def test_start_without_rights_says_so(database: Path, folder_mode: int, database_mode: int | None) -> None:
    """A folder or database that may not be written is status 73 or 77, with the path in the message."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        shutil.copy(database, folder / "registry.db")
        (folder / "registry.db.lock").touch()
        for path in (folder / "registry.db", folder / "registry.db.lock"):
            path.chmod(0o666)
        if database_mode is not None:
            (folder / "registry.db").chmod(database_mode)
        else:
            (folder / "registry.db.lock").unlink()
        folder.chmod(folder_mode)
        command = DaemonProcess(folder / "registry.json").command()
        dropped = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", *command]
        ended = subprocess.run(dropped, capture_output=True, text=True, timeout=60, env=environment(), check=False)
        if ended.returncode in (126, 127) or "setpriv" in ended.stderr or "No module named" in ended.stderr:
            pytest.skip("this machine's Python may not be run by another user")
        assert ended.returncode in (73, 77), ended.stderr
        assert str(folder) in ended.stderr
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("idle_exi = 5", "idle_exit"),
        ("idle_exit = 'soon'", "idle_exit"),
        ("idle_exit = -1", "idle_exit"),
        ("registry = 'no-json'", "registry"),
        ("socket = '/x/y'", "socket"),
        ("= 3", "TOML"),
    ],
)
def test_bad_settings_are_refused_with_the_key(registry_path: Path, text: str, said: str) -> None:
    """An unknown key is refused with the nearest known one, a bad value with its key: status 78."""
    config = registry_path.parent / "registryd.toml"
    config.write_text(text)
    command = [c for c in DaemonProcess(registry_path).command() if c not in ("--registry", str(registry_path))]
    ended = subprocess.run(
        [*command, "--config", str(config)], capture_output=True, text=True, timeout=60, env=environment(), check=False
    )
    assert ended.returncode == 78 and said in ended.stderr, ended.stderr


def test_unknown_environment_variable_is_refused(registry_path: Path) -> None:
    """A misspelt MADSCI_REGISTRYD_ variable is refused with the nearest known key."""
    ended = run(registry_path, env=environment(MADSCI_REGISTRYD_LOGLEVEL="debug"))
    assert ended.returncode == 78 and "log_level" in ended.stderr


def test_run_folder_removed_is_made_again_and_locks_stay(daemon: DaemonProcess) -> None:
    """After rm -rf run/ the daemon listens again; the holder keeps its lock, and newcomers are served."""
    with RegistryClient(daemon.registry, autostart=False) as client:
        held = client.resolve("arm", "node")
        for _ in range(2):
            shutil.rmtree(daemon.socket.parent)
            until(lambda: daemon.lifeline.exists() and daemon.socket.exists(), "for the sockets")
        assert held.held and client.get("arm").fencing_token == held.fencing_token
        command = ["-m", "madsci_registryctl", "--registry", str(daemon.registry), "lookup", "arm"]
        found = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60, env=environment(), check=False
        )
        assert found.stdout.strip() == held.id


def test_registry_folder_removed_ends_the_daemon(daemon: DaemonProcess) -> None:
    """A daemon whose registry's folder is gone ends, so that it serves nothing that nobody can find."""
    shutil.rmtree(daemon.registry.parent)
    daemon.wait()


def test_deleted_database_is_written_again(daemon: DaemonProcess) -> None:
    """Deleting the database under a living daemon loses no identity: it is written again, and served anew."""
    with RegistryClient(daemon.registry, autostart=False) as client:
        id = client.resolve("arm", "node", acquire_lock=False).id
        daemon.registry.with_suffix(".db").unlink()
        assert daemon.wait() == 74
        daemon.start()
        assert client.lookup("arm") == id


def test_idle_daemon_ends_and_a_busy_one_does_not(registry_path: Path) -> None:
    """--idle-exit ends a daemon without clients, and no other."""
    with DaemonProcess(registry_path, "--idle-exit", "0.6") as daemon:
        with RegistryClient(registry_path, autostart=False) as client:
            client.resolve("arm", "node")
            with pytest.raises(AssertionError):
                until(lambda: daemon._process and daemon._process.poll() is not None, patience_s=2.0)
        assert daemon.wait() == 0
    assert not daemon.socket.exists()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a file system of 1 MB."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


@AS_ROOT
def test_full_disk_is_no_space_and_heals_without_a_restart(small_disk: Path) -> None:
    """On a full disk writes are `no_space`, reads and what is held stay; with space again the same daemon goes on."""
    with DaemonProcess(small_disk / "registry.json") as daemon:
        with RegistryClient(daemon.registry, autostart=False) as client:
            held = client.resolve("held", "node")
            made: dict[str, str] = {}
            (small_disk / "ballast").write_bytes(b"x" * 300_000)

            def fill() -> None:
                for n in range(2000):
                    made[f"n{n}"] = client.resolve(f"n{n}", "node", {"x": "y" * 3000}, acquire_lock=False).id

            with pytest.raises(NoSpaceError):
                fill()
            assert made and all(client.lookup(name) == id for name, id in made.items())
            assert held.held and client.get("held").locked
            (small_disk / "ballast").unlink()
            assert client.resolve("after", "node").is_new
            assert client.status()["pid"] == daemon.pid


@AS_ROOT
def test_start_on_a_full_disk_says_so(small_disk: Path) -> None:
    """A daemon that finds no space at its start ends with 75."""
    with pytest.raises(OSError, match="space"):
        (small_disk / "ballast").write_bytes(b"x" * 2_000_000)
    ended = run(small_disk / "registry.json")
    assert ended.returncode in (73, 75), ended.stderr
    assert "space" in ended.stderr


def test_quota_of_sessions_does_not_keep_holders_from_resuming(registry_path: Path, workers: Workers) -> None:
    """Over a restart every holder resumes, though the user has all sessions that are allowed."""
    registry_path.with_name("limits.toml").write_text("sessions_per_uid = 2")
    with DaemonProcess(registry_path, "--config", str(registry_path.with_name("limits.toml"))) as daemon:
        holders = [workers(MADSCI_REGISTRY_AUTOSTART="0") for _ in range(2)]
        for n, holder in enumerate(holders):
            holder.ask("resolve", f"arm{n}")
        daemon.restart()
        for n, holder in enumerate(holders):
            assert holder.ask("get", f"arm{n}")["locked"]
            assert holder.ask("held", f"arm{n}")
        with RegistryClient(registry_path, autostart=False) as client, pytest.raises(QuotaError):
            client.lookup("arm0")


def test_holder_of_thousands_of_names_resumes(daemon: DaemonProcess) -> None:
    """A process that holds more names than fit one frame resumes with all of them."""
    names = [f"{n:05} {'x' * 240}" for n in range(4000)]
    with RegistryClient(daemon.registry, autostart=False) as holder:
        locks = holder.resolve_many((name, "node") for name in names)
        daemon.restart()
        assert holder.status()["held"] == len(names)
        assert all(isinstance(lock, Registration) and lock.held for lock in locks)


def test_restore_that_finds_no_space_leaves_the_database(small_disk: Path, database: Path) -> None:
    """A restore that runs out of space leaves a database in its place, never none."""
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    damaged = small_disk / "registry.db"
    damaged.write_bytes(b"damaged" * 1000)
    (small_disk / "ballast").write_bytes(b"x" * (1_000_000 - database.stat().st_size - 60_000))
    ended = run(small_disk / "registry.json", "restore", str(backup))
    assert damaged.exists()
    if ended.returncode:
        assert ended.returncode == 75, ended.stderr
        assert damaged.read_bytes() == b"damaged" * 1000


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to let fdatasync fail")
def test_io_error_ends_the_daemon_and_holders_come_first_after_it(daemon: DaemonProcess, workers: Workers) -> None:
    """A failed fsync is answered to nobody and ends the daemon with 74; the next one grants nothing until holders had
    their time, and every living holder has its lock and token."""
    holder = workers(MADSCI_REGISTRY_AUTOSTART="0")
    held = holder.ask("resolve", "held")
    with RegistryClient(daemon.registry, autostart=False, timeout=2.0) as client:
        kept = client.resolve("kept", "node", acquire_lock=False).id
        fails = ["strace", "-qq", "-p", str(daemon.pid), "-f", "-o", "/dev/null", "-e", "trace=fdatasync"]
        tracer = subprocess.Popen([*fails, "-e", "inject=fdatasync:error=EIO"], stderr=subprocess.PIPE)
        try:
            until(lambda: "TracerPid:\t0" not in Path(f"/proc/{daemon.pid}/status").read_text(), "for strace")
            with pytest.raises((UnknownOutcomeError, UnavailableError)):
                client.resolve("unknown", "node", acquire_lock=False)
            assert daemon.wait() == 74
        finally:
            tracer.kill()
            tracer.communicate()
        daemon.start()
        assert client.lookup("kept") == kept
        assert any("I/O error" in text for text in client.status()["degraded"])
        with pytest.raises(BusyError):
            client.resolve("kept", "node")
        with pytest.raises(HeldError):
            client.resolve("held", "node")
        assert client.resolve("kept", "node", wait=30).held
        assert holder.ask("held", "held") and client.get("held").fencing_token == held["fencing_token"]
        assert client.status()["degraded"] == []


def test_restore_brings_back_a_lost_database_and_reports_conflicts(registry_path: Path, tmp_path: Path) -> None:
    """After the database was lost and a name made anew, the restore keeps both ULIDs, says so, and tokens grow."""
    backup = tmp_path / "backup.db"
    with DaemonProcess(registry_path) as daemon:
        with RegistryClient(registry_path, autostart=False) as client:
            old = client.resolve("arm", "node")
            only = client.resolve("only in the backup", "node", acquire_lock=False).id
            client.backup(backup)
        daemon.terminate()
        database = registry_path.with_suffix(".db")
        database.write_bytes(b"garbage" * 1000)
        restored = run(registry_path, "restore", str(backup))
        assert restored.returncode == 0, restored.stderr
        assert "put aside" in restored.stdout
        daemon.start()
        with RegistryClient(registry_path, autostart=False) as client:
            assert (client.lookup("arm"), client.lookup("only in the backup")) == (old.id, only)
            again = client.resolve("arm", "node", wait=30)
            assert old.fencing_token is not None and again.fencing_token is not None
            assert again.fencing_token > old.fencing_token
        daemon.terminate()
        database.unlink()
        registry_path.unlink(missing_ok=True)  # which would tell the new database the ULID
        daemon.start()
        with RegistryClient(registry_path, autostart=False) as client:
            fresh = client.resolve("arm", "node", acquire_lock=False).id
        daemon.terminate()
        merged = run(registry_path, "restore", str(backup))
        assert merged.returncode == 0 and "conflict" in merged.stdout, merged.stderr
        daemon.start()
        with RegistryClient(registry_path, autostart=False) as client:
            assert client.lookup("arm") == fresh
            assert client.whois(old.id).state == "retired"
        assert run(registry_path, "restore", str(registry_path)).returncode != 0
        daemon.terminate()
        assert run(registry_path, "verify").returncode == 0


def test_restore_adds_what_a_torn_registry_json_tells(registry_path: Path, tmp_path: Path) -> None:
    """Where the database is lost, the restore adds the complete entries of a torn registry.json, and tells the rest."""
    backup = tmp_path / "backup.db"
    with DaemonProcess(registry_path) as daemon, RegistryClient(registry_path, autostart=False) as client:
        known = client.resolve("arm", "node", acquire_lock=False).id
        client.backup(backup)
        daemon.terminate()
    registry_path.with_suffix(".db").write_bytes(b"garbage" * 1000)
    entry = '{"id": "node-7", "component_type": "module", "last_seen": "2026-11-24T13:00:00Z"}'
    registry_path.write_text(f'{{"entries": {{"old": {entry},\n "torn": {{"id": ')
    restored = run(registry_path, "restore", str(backup))
    assert restored.returncode == 0 and "added 'old' = node-7" in restored.stdout, restored.stdout
    assert "line 2: 'torn'" in restored.stdout, (restored.stdout, restored.stderr)
    with DaemonProcess(registry_path), RegistryClient(registry_path, autostart=False) as client:
        assert (client.lookup("arm"), client.lookup("old")) == (known, "node-7")
        assert client.get("old").last_seen == "2026-11-24T13:00:00.000000Z"


def test_watchers_are_told_of_a_restore(registry_path: Path, tmp_path: Path) -> None:
    """A watcher whose revision is newer than the backup is told `restored` by the daemon that has the backup."""
    backup = tmp_path / "backup.db"
    with DaemonProcess(registry_path) as daemon:
        with RegistryClient(registry_path, autostart=False) as client:
            client.backup(backup)
            client.resolve("made after the backup", "node", acquire_lock=False)
            seen = client.status()["revision"]
        daemon.terminate()
        registry_path.with_suffix(".db").write_bytes(b"garbage" * 1000)
        assert run(registry_path, "restore", str(backup)).returncode == 0
        daemon.start()
        with RegistryClient(registry_path, autostart=False) as client:
            events = client.watch(seen)
    assert [event.kind for event in events][:1] == ["restored"]
    assert events[0].why["base"] == "the backup"


def test_tokens_after_a_restore_are_above_the_floor_that_was_given(registry_path: Path, tmp_path: Path) -> None:
    """`restore --token-floor N` has every later fencing token above N, also where the clock would give lower ones, and
    below 2^53; an N that leaves no room for that is refused."""
    backup, floor = tmp_path / "backup.db", ((1 << 33) - (1 << 20)) << 20
    with DaemonProcess(registry_path) as daemon, RegistryClient(registry_path, autostart=False) as client:
        assert (client.resolve("arm", "node").fencing_token or 0) < floor
        client.backup(backup)
        daemon.terminate()
    for too_high in (floor + 1, (1 << 53) - 1):
        refused = run(registry_path, "restore", str(backup), "--token-floor", str(too_high))
        assert refused.returncode == 2 and f"not in the range 0<=x<={floor}" in refused.stderr
    assert run(registry_path, "restore", str(backup), "--token-floor", str(floor)).returncode == 0
    with DaemonProcess(registry_path), RegistryClient(registry_path, autostart=False) as client:
        for name in ("arm", "new"):
            grant = client.resolve(name, "node", wait=30)
            assert floor < (grant.fencing_token or 0) < 1 << 53
            grant.release()
            assert not client.get(name).locked


def test_start_that_could_give_no_token_below_2_53_is_refused(database: Path) -> None:
    """A daemon whose epoch would be too high ends with 65 and says why, and the database is as it was."""
    with sqlite3.connect(database) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", ((1 << 33) - 1,))
    db.close()
    content = database.read_bytes()
    ended = run(database.with_suffix(".json"))
    assert ended.returncode == 65 and f"epoch of this start would be {1 << 33}" in ended.stderr, ended.stderr
    assert database.read_bytes() == content


def test_daemon_that_is_told_to_stop_as_soon_as_it_listens_ends_in_order(registry_path: Path) -> None:
    """SIGTERM just when the first socket is there ends the daemon with 0, like any other SIGTERM."""
    daemon = DaemonProcess(registry_path)
    for _ in range(5):
        daemon.socket.unlink(missing_ok=True)
        daemon.spawn()
        deadline = time.monotonic() + PATIENCE_S
        while not daemon.socket.exists():  # without a pause: the moment counts
            assert time.monotonic() < deadline
        assert daemon.terminate() == 0


def damaged_behind_its_header(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    for page in range(1, len(whole) // 4096):
        whole[page * 4096 : page * 4096 + 4000] = b"\xaa" * 4000
    path.write_bytes(whole)


def test_start_on_a_damaged_page_is_65_and_not_a_traceback(database: Path, registry_path: Path) -> None:
    """Damage that is only found while the daemon starts is status 65, told like any other."""
    damaged_behind_its_header(database)
    ended = run(registry_path)
    assert ended.returncode == 65 and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("spoil", [other_program, newer])
def test_restore_does_not_replace_a_sound_database_that_is_not_ours(
    database: Path, registry_path: Path, tmp_path: Path, spoil: object
) -> None:
    """A foreign or newer database is not taken for a damaged one: restore refuses and leaves it."""
    backup = tmp_path / "backup.db"
    shutil.copy(database, backup)
    spoil(database)  # type: ignore[operator]
    before = database.read_bytes()
    assert run(registry_path, "restore", str(backup)).returncode == 65
    assert database.read_bytes() == before


def test_backup_of_a_dead_client_is_given_up(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Clients that die in the middle of a backup do not keep the next one from being made."""
    with RegistryClient(daemon.registry, autostart=False) as client:
        begins = (
            "import sys; from madsci_registry import RegistryClient; c = RegistryClient(sys.argv[1], autostart=False);"
            "c._shared().ask(c._ask_read({'op': 'backup'})); print('begun', flush=True); sys.stdin.read()"
        )
        for _ in range(3):
            command = [sys.executable, "-c", begins, str(daemon.registry)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as dying:
                assert dying.stdout is not None
                assert dying.stdout.readline() == b"begun\n"
                dying.kill()
            until(lambda: len(client.sessions()) == 1, "for the session to end")
        assert client.backup(tmp_path / "whole.db") > 0


def test_restore_refuses_a_damaged_backup_and_changes_nothing(database: Path, registry_path: Path) -> None:
    """A backup that is cut off or foreign is refused; the database stays as it was."""
    before = database.read_bytes()
    bad = database.with_name("bad.db")
    bad.write_bytes(before[: len(before) // 2])
    assert run(registry_path, "restore", str(bad)).returncode == 65
    assert run(registry_path, "restore", str(bad.with_name("none"))).returncode == 73
    assert database.read_bytes() == before


def test_verify_finds_a_damaged_page(database: Path, registry_path: Path) -> None:
    """Verify says what is wrong with a damaged database and ends with 65."""
    damaged_behind_its_header(database)
    ended = run(registry_path, "verify")
    assert ended.returncode == 65, (ended.stdout, ended.stderr)


@pytest.mark.parametrize(("first", "second"), [("x", "y"), (None, "x"), ("x", None)])
def test_second_daemon_with_another_state_folder_is_refused(
    registry_path: Path, first: str | None, second: str | None
) -> None:
    """Two daemons never serve one registry.json, also where one or both keep their databases elsewhere."""
    with kept_in(registry_path, first) as serving:
        refused = kept_in(registry_path, second)
        refused.spawn()
        assert refused.wait() == 69
        assert f"pid {serving.pid} serves this registry already" in refused.log


def kept_in(registry_path: Path, folder: str | None) -> DaemonProcess:
    """Return a daemon, not started yet, that keeps its database and sockets in that folder beside the registry."""
    if folder is None:
        return DaemonProcess(registry_path)
    state = registry_path.with_name(folder)
    daemon = DaemonProcess(registry_path, "--state-dir", str(state))
    daemon.socket, daemon.lifeline = state / "run" / "registry.sock", state / "run" / "registry.life"
    return daemon
