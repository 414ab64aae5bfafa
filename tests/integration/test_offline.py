"""What root leaves when it repairs another user's registry, and what the daemon says after a restore."""

from __future__ import annotations

import os
import shutil
import subprocess
import traceback
from pathlib import Path

import pytest

from helpers import PATIENCE_S, DaemonProcess, environment
from madsci_registry import BusyError, RegistryClient
from madsci_registryd.app import App
from madsci_registryd.faults import StartFault
from madsci_registryd.migrations import VERSION
from madsci_registryd.settings import Settings

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to leave root's files in another user's folder")
USER = 54001


def run(daemon: DaemonProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        daemon.command(*arguments), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.fixture
def stopped(registry_path: Path) -> DaemonProcess:
    """A registry with one name, a backup of it in backup.db, and no daemon."""
    with DaemonProcess(registry_path) as daemon:
        with RegistryClient(registry_path, autostart=False) as client:
            client.resolve("arm", "node", acquire_lock=False)
            client.backup(registry_path.with_name("backup.db"))
        assert daemon.terminate() == 0
    return daemon


def give_to_user(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, USER, USER, follow_symlinks=False)


def not_of_user(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if (path.stat().st_uid, path.stat().st_gid) != (USER, USER)]


def serves_as_user(registry: Path) -> None:
    """Start a daemon as that user, in a child: a user may not be able to read the interpreter's files."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            app = App(Settings(registry=registry, ephemeral=True))
            app.start()
            app.close()
            status = 0
        except StartFault as fault:
            status = fault.status
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@AS_ROOT
def test_owner_serves_after_root_has_restored_over_a_damaged_database(stopped: DaemonProcess) -> None:
    """After root's `restore`, `verify` and `rollback` all files are the owner's, also those that were put aside, and a
    daemon of the owner serves."""
    folder = stopped.registry.parent
    give_to_user(folder)
    serves_as_user(stopped.registry)
    stopped.registry.with_suffix(".db").write_bytes(b"garbage" * 1000)
    (folder / "registry.db.lock").unlink()
    for command in (["restore", str(folder / "backup.db")], ["verify"], ["rollback"]):
        done = run(stopped, *command)
        assert done.returncode == 0, done.stderr
        assert not_of_user(folder) == []
    assert list(folder.glob("registry.db.damaged-*"))
    serves_as_user(stopped.registry)


@AS_ROOT
def test_owner_of_the_folder_serves_after_root_has_restored_a_lost_database(stopped: DaemonProcess) -> None:
    """Where there was no database, what root restores is the folder's owner's; of an older schema, its copy too."""
    folder = stopped.registry.parent
    give_to_user(folder)
    database = stopped.registry.with_suffix(".db")
    database.unlink()
    assert run(stopped, "restore", str(folder / "backup.db")).returncode == 0
    assert not_of_user(folder) == []
    serves_as_user(stopped.registry)
    copy = folder / f"registry.db.before-v{VERSION}"
    shutil.copy(folder / "backup.db", copy)
    done = run(stopped, "verify")
    assert done.returncode == 0 and not_of_user(folder) == [], done.stderr


@AS_ROOT
def test_root_gives_away_nothing_that_was_planted(stopped: DaemonProcess, tmp_path: Path) -> None:
    """A link in the folder that looks like a file of ours gives nobody what it leads to."""
    folder = stopped.registry.parent
    give_to_user(folder)
    for name, link in (("soft", Path.symlink_to), ("hard", Path.hardlink_to)):
        target = (tmp_path if name == "soft" else folder.parent) / f"{folder.name}.{name}"
        target.write_text("root's")
        link(folder / f"registry.db.damaged-{name}", target)
        try:
            assert run(stopped, "verify").returncode == 0
            assert target.stat().st_uid == 0
        finally:
            target.unlink()


def test_daemon_after_a_restore_says_that_it_was_one(stopped: DaemonProcess) -> None:
    """After a restore that replaced the database, nobody is told of an I/O error, and nothing is checked once more."""
    stopped.registry.with_suffix(".db").write_bytes(b"garbage" * 1000)
    assert run(stopped, "restore", str(stopped.registry.with_name("backup.db"))).returncode == 0
    before = len(stopped.log)
    with stopped, RegistryClient(stopped.registry, autostart=False) as client:
        assert client.status()["degraded"] == ["a backup was restored: nothing is granted for 10 s"]
        with pytest.raises(BusyError, match="a backup was restored"):
            client.resolve("arm", "node")
        assert "I/O error" not in stopped.log[before:]
