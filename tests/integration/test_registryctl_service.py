"""`registryctl service` as a person types it, where it may change nothing: --print, refusals, a host without systemd.

What it does with a real systemd is in test_systemd_install.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest

from ctl import Ctl
from helpers import PATIENCE_S
from madsci_registryctl.service import plan


@pytest.fixture
def no_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH without systemctl, so that no test changes the machine that it runs on."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def folder(registry_path: Path) -> Path:
    return registry_path.parent


@pytest.fixture
def ctl(registry_path: Path) -> Ctl:
    return Ctl(registry_path)


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_print_shows_files_and_commands_and_writes_nothing(ctl: Ctl, folder: Path, no_systemd: None) -> None:
    """--print of a user's service has each file under its path and the commands, and leaves everything as it was."""
    before = snapshot(folder)
    printed = ctl("service", "install", "--user", "--print")
    unit = plan.Service("user", Path.home(), folder).unit
    assert "\nExecStart=" in printed
    assert printed.startswith("==> /")
    assert f"{plan.USER_UNITS}/madsci-registryd@.service\n" in printed
    commands = printed.split("==> commands\n")[1].splitlines()
    assert commands[0] == "systemctl --user daemon-reload"
    assert commands[-1].startswith("systemctl --user enable --now ")
    assert unit in commands[-1]
    assert snapshot(folder) == before


def test_print_of_the_system_needs_neither_root_nor_systemd(ctl: Ctl, folder: Path, no_systemd: None) -> None:
    """--print --system shows the whole installation of the host; --folder names another registry than its own."""
    assert "--folder" in ctl.run("service", "install", "--system", "--print", status=2).stderr
    shown = ctl.json("service", "install", "--system", "--folder", folder, "--print")
    assert set(shown) == {"unit", "files", "commands"}
    assert [Path(file["path"]).name for file in shown["files"]] == ["madsci-registryd@.service", "owner.conf"]


def test_user_install_without_systemd_says_so(ctl: Ctl, folder: Path, no_systemd: None) -> None:
    """Where systemctl is missing, install and logs end with status 1, and nothing was written."""
    before = snapshot(folder)
    error = ctl.error("service", "install", "--user", status=1)
    assert error["code"] == "unsupported"
    assert "Nothing was changed" in error["message"]
    assert ctl.error("service", "logs", "--user", status=1)["code"] == "unsupported"
    assert snapshot(folder) == before


def test_uninstall_of_nothing_says_so(ctl: Ctl, no_systemd: None) -> None:
    """Uninstalling what is not there ends with status 0, with or without systemd."""
    done = ctl.run("service", "uninstall", "--user", "--folder", "/srv/never")
    assert done.stdout == ""
    assert "Nothing is installed" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user who is not root")
def test_system_needs_root(ctl: Ctl, no_systemd: None) -> None:
    """Another user than root is refused with status 7, and is told the command that would do."""
    error = ctl.error("service", "uninstall", "--system", status=7)
    assert "sudo " in error["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_has_to_say_which(ctl: Ctl, no_systemd: None) -> None:
    """Root is asked whether the host's service or its own is meant, and nothing is guessed."""
    assert "--system" in ctl.run("service", "install", status=2).stderr
    assert "--system" in ctl.run("service", "uninstall", status=2).stderr


def test_bad_folder_is_refused(ctl: Ctl, folder: Path, no_systemd: None) -> None:
    """A folder that cannot be, that is a file, or that holds a .madsci folder is refused with what is wrong (10)."""
    (folder / "a file").touch()
    (folder / ".madsci").mkdir()
    for given, word in ((folder / "a file", "no folder"), (folder / "x/y", "there is no"), (folder, "did you mean")):
        error = ctl.error("service", "install", "--user", "--folder", given, status=10)
        assert (error["code"], error["field"]) == ("invalid", "folder")
        assert word in error["message"]
    assert (
        "does not exist" in ctl.error("service", "install", "--system", "--folder", folder / "x", status=10)["message"]
    )


def test_registry_that_no_unit_serves_is_refused(folder: Path, no_systemd: None) -> None:
    """A user's service is that of a registry.json in a folder; another name, or a bare socket, is refused (2)."""
    assert "--folder" in Ctl(folder / "other.json").run("service", "install", "--user", status=2).stderr
    of_folder = Ctl(folder / "registry.json")
    assert "--system" in of_folder.run("service", "install", "--user", "--socket-activation", status=2).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have a folder of another user's")
def test_folder_of_another_user_is_refused(ctl: Ctl, folder: Path, no_systemd: None) -> None:
    """A user's service is never that of another user's folder (7): that is what --system is for."""
    os.chown(folder, 4242, 4242)
    try:
        error = ctl.error("service", "install", "--user", status=7)
    finally:
        os.chown(folder, 0, 0)
    assert error["code"] == "permission_denied"
    assert "--system" in error["message"]


def test_program_that_no_unit_reaches_is_refused(no_systemd: None) -> None:
    """--system refuses a program in a folder that a hardened unit does not see, with the commands that make one under
    /opt; --print says it too, and shows the plan all the same."""
    with tempfile.TemporaryDirectory(dir="/tmp") as hidden:
        venv.create(hidden, with_pip=False)
        site = next(Path(hidden).glob("lib/python*/site-packages"))
        (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        words = [f"{hidden}/bin/python", "-m", "madsci_registryctl", "service", "install", "--system"]
        refused = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert refused.returncode == 1, refused.stderr
        assert " is in /tmp: PrivateTmp= hides it" in refused.stderr  # or another part of it, as of a checkout there
        assert "sudo python3 -m venv /opt/madsci-registryd && " in refused.stderr
        assert refused.stdout == ""
        shown = subprocess.run([*words, "--print"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert shown.returncode == 0, shown.stderr
        assert "==> /etc/systemd/system/madsci-registryd.service\n" in shown.stdout
        assert "PrivateTmp= hides it" in shown.stderr
