"""A newer version over a running one, and the way back."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import PATIENCE_S, PROJECT, TESTS, DaemonProcess, Worker, environment
from madsci_registry import RegistryClient
from madsci_registryd.migrations import APPLICATION_ID, VERSION


@pytest.fixture
def newer(tmp_path: Path) -> str:
    """The PYTHONPATH of a daemon that is a version ahead: its schema has one more column."""
    package = tmp_path / "newer" / "madsci_registryd"
    shutil.copytree(PROJECT / "daemon" / "madsci_registryd", package, ignore=shutil.ignore_patterns("__pycache__"))
    change(package / "migrations.py", f"VERSION = {VERSION}\n", f"VERSION = {VERSION + 1}\n")
    step = f'STEPS[{VERSION + 1}] = lambda db: db.execute("ALTER TABLE components ADD COLUMN newer INTEGER")\n'
    change(package / "migrations.py", "def schema()", f"{step}\n\ndef schema()")
    change(package / "app.py", 'VERSION = version("madsci-registryd")', 'VERSION = "99.0.0"')
    return os.pathsep.join((str(package.parent), str(PROJECT / "client"), str(PROJECT / "tests")))


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_newer_version_over_a_running_one_keeps_every_lock(registry_path: Path, newer: str) -> None:
    """A newer version takes the place of a running one: holders, idle and frozen, keep their locks and tokens, a waiter
    keeps waiting and is next, and the database is copied before its schema changes."""
    with DaemonProcess(registry_path) as daemon, Worker(registry_path) as idle, Worker(registry_path) as frozen:
        held = {"arm": idle.ask("resolve", "arm"), "leg": frozen.ask("resolve", "leg")}
        frozen.signal(signal.SIGSTOP)
        with Worker(registry_path) as waiter:
            waiter.tell("resolve", "arm", wait=300)
            daemon.terminate()
            daemon.extra_env = {"PYTHONPATH": newer}
            daemon.start()
            with RegistryClient(registry_path, autostart=False) as client:
                assert client.status()["version"] == "99.0.0"
                for name, grant in held.items():
                    component = client.get(name)
                    assert (component.state, component.fencing_token) == ("held", grant["fencing_token"])
            assert registry_path.with_name(f"registry.db.before-v{VERSION + 1}").exists()
            assert idle.ask("held", "arm") and not waiter.answered()
            frozen.signal(signal.SIGCONT)
            frozen.ask("ensure", "leg")
            idle.ask("release_all")
            assert waiter.answer()["fencing_token"] > held["arm"]["fencing_token"]


def test_downgrade_is_refused_and_the_way_back_keeps_every_identity(registry_path: Path, newer: str) -> None:
    """An older version refuses a newer one's database, leaves it as it is and says the way back; that way leads to a
    registry with all ULIDs, also those of the time between, and tokens that only grew."""
    database = registry_path.with_suffix(".db")
    with DaemonProcess(registry_path) as daemon, RegistryClient(registry_path, autostart=False) as client:
        before = client.resolve("arm", "node")
        client.release("arm")
        daemon.terminate()
        daemon.extra_env = {"PYTHONPATH": newer}
        daemon.start()
        between = client.resolve("made by the newer", "node", acquire_lock=False)
        last = client.resolve("arm", "node")
        client.release("arm")
        daemon.terminate()
        content = database.read_bytes()
        refused = subprocess.run(
            daemon.command(), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert refused.returncode == 65
        assert f"schema {VERSION + 1}, this program knows {VERSION}" in refused.stderr
        copy = f"{database}.before-v{VERSION + 1}"
        assert f"restore {copy}" in refused.stderr
        assert database.read_bytes() == content
        database.rename(database.with_name("registry.db.newer"))
        database.with_name("registry.db-wal").unlink(missing_ok=True)
        subprocess.run(daemon.command("restore", copy), env=environment(), check=True, timeout=PATIENCE_S)
        daemon.extra_env = {}
        daemon.start()
        assert (client.lookup("arm"), client.lookup("made by the newer")) == (before.id, between.id)
        again = client.resolve("arm", "node", wait=30)
        assert (again.fencing_token or 0) > (last.fencing_token or 0)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a file system of 14 MB."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("mounting a tmpfs takes root, and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_migration_that_finds_no_space_changes_nothing_and_is_done_when_there_is_some(disk: Path) -> None:
    """Where the disk has no room for the whole copy, or for that but not for the new schema, the start ends with 75 and
    the database is as it was, without half a copy; with space again the same start goes through."""
    database, ballast = disk / "registry.db", disk / "ballast"
    with sqlite3.connect(database) as db:
        db.executescript((TESTS / "data" / f"schema-{VERSION - 1}.sql").read_text())
        db.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION - 1}")
        rows = [(f"n{n:05}", "x" * 900) for n in range(4000)]
        db.executemany("INSERT INTO names (name) VALUES (?)", [row[:1] for row in rows])
        db.executemany(
            "INSERT INTO components (id, name, component_type, created_at, last_seen, metadata)"
            " VALUES (?1, ?1, 'node', '', '', json_object('x', ?2))",
            rows,
        )
    db.close()
    daemon = DaemonProcess(disk / "registry.json", "--no-export")
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    copy, size = disk / f"registry.db.before-v{VERSION}", database.stat().st_size
    for left, copied in ((size // 2, False), (size + 700_000, True)):
        ballast.write_bytes(b"x" * (room - left))
        ended = subprocess.run(
            daemon.command(), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert ended.returncode == 75 and "no space" in ended.stderr, ended.stderr
        assert list(disk.glob("*.before-*")) == ([copy] if copied else [])
        with sqlite3.connect(database) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (VERSION - 1,)
            assert db.execute("SELECT count(*) FROM components").fetchone() == (4000,)
        db.close()
        ballast.unlink()
    with daemon, RegistryClient(daemon.registry, autostart=False) as client:
        assert client.status()["names"] == 4000
