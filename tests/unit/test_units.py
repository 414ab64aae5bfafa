"""The files in systemd/: what systemd itself says of them without running them, and that they agree with the code."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import PATIENCE_S, PROJECT
from madsci_registryd import faults, sockets
from madsci_registryd.settings import Places, Settings

UNITS = PROJECT / "systemd"
PROGRAMS = "/opt/madsci-registryd/bin/"
SERVICE, FOLDER, USER = "madsci-registryd.service", "madsci-registryd@.service", "user/madsci-registryd@.service"
SOCKET, TIMER = "madsci-registryd.socket", "madsci-registryd-backup.timer"
BACKUP, LAB = "madsci-registryd-backup.service", "madsci-registry-lab.service"
OF_THE_SYSTEM = (SERVICE, SOCKET, FOLDER, BACKUP, TIMER, LAB)
NETWORK = "network.conf"
SYSTEM = Places(Settings(registry=Path("/var/lib/madsci/registry.json")))


class _Unit(dict[tuple[str, str], list[str]]):
    """What a unit says: the values of each (section, key), in their order."""

    def __init__(self, name: str) -> None:
        super().__init__()
        section = ""
        for line in (UNITS / name).read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self.setdefault((section, key), []).append(value)

    def one(self, section: str, key: str) -> str:
        (value,) = self[section, key]
        return value


def _analyze(*arguments: str | Path, runtime: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze (systemd)")
    env = {**os.environ, "SYSTEMD_COLORS": "0", **({"XDG_RUNTIME_DIR": str(runtime)} if runtime else {})}
    return subprocess.run(
        [program, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def _copied(folder: Path, *, network: bool = False) -> Path:
    """Copy the units as an installer does, with the path of programs that exist; return their folder."""
    programs, units = folder / "bin", folder / "units"
    programs.mkdir()
    for unit in (*OF_THE_SYSTEM, USER):
        text = (UNITS / unit).read_text()
        for name in re.findall(rf"{PROGRAMS}([\w-]+)", text):
            (programs / name).write_text("#!/bin/sh\n")
            (programs / name).chmod(0o755)
        (units / unit).parent.mkdir(parents=True, exist_ok=True)
        (units / unit).write_text(text.replace(PROGRAMS, f"{programs}/"))
    if network:
        (units / f"{SERVICE}.d").mkdir()
        shutil.copy(UNITS / NETWORK, units / f"{SERVICE}.d")
    return units


@pytest.mark.parametrize("network", [False, True], ids=["alone", "with-network"])
def test_units_of_the_system_are_clean(tmp_path: Path, network: bool) -> None:
    """There is nothing that systemd would say against a unit of the system, nor against the drop-in for the network."""
    units = _copied(tmp_path, network=network)
    done = _analyze("verify", "--recursive-errors=one", *(units / name for name in OF_THE_SYSTEM))
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_of_a_user_is_clean(tmp_path: Path) -> None:
    """There is nothing that systemd would say against the unit for a user's own service manager."""
    done = _analyze("--user", "verify", "--recursive-errors=one", _copied(tmp_path) / USER, runtime=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("unit", "network", "at_most"),
    [(SERVICE, False, 1.0), (SERVICE, True, 2.0), (FOLDER, False, 1.0), (BACKUP, False, 1.0), (LAB, False, 2.0)],
)
def test_exposure_of_a_service_is_small(tmp_path: Path, unit: str, network: bool, at_most: float) -> None:
    """`systemd-analyze security` gives a service without network 1.0 at most, one with a network 2.0."""
    done = _analyze("security", "--offline=true", "--no-pager", _copied(tmp_path, network=network) / unit)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= at_most, "\n".join(line for line in done.stdout.splitlines() if line.startswith("✗"))


@pytest.mark.parametrize("unit", [SERVICE, FOLDER, USER])
def test_daemon_may_see_the_processes_of_its_clients(unit: str) -> None:
    """No unit of the daemon hides other users or their processes from it."""
    found = _Unit(unit)
    for key in ("PrivateUsers", "ProtectProc", "ProcSubset", "PrivatePIDs", "DynamicUser"):
        assert ("Service", key) not in found


@pytest.mark.parametrize("unit", [*OF_THE_SYSTEM, USER, NETWORK])
def test_no_unit_has_a_runtime_directory(unit: str) -> None:
    """/run/madsci is no unit's: a container that mounts it would keep the folder that the unit's stop removed."""
    assert not re.search(r"^Runtime", (UNITS / unit).read_text(), re.MULTILINE)


def test_unit_of_a_folder_is_hardened_like_that_of_the_system() -> None:
    """The units for a folder have every setting of the system's, but for where things lie and, in a user's own service
    manager, for what needs a mount, a cgroup or a right of root."""
    ours = {key: value for (section, key), value in _Unit(SERVICE).items() if section == "Service"}
    places = {
        "ExecStart",
        "Group",
        "StateDirectory",
        "StateDirectoryMode",
        "ReadWritePaths",
        "ProtectHome",
        "RemoveIPC",
    }
    folder, user = _Unit(FOLDER), _Unit(USER)
    assert {k: v for k, v in ours.items() if folder.get(("Service", k)) != v}.keys() == places
    of_root = {k for k in ours if re.match(r"(Private|Protect|Device|Capability|IPAddress|Keyring|OOM|LimitNOFILE)", k)}
    of_root |= {"User", "ExecStopPost"}
    assert {k: v for k, v in ours.items() if user.get(("Service", k)) != v}.keys() == places | of_root
    assert user.one("Service", "ExecStopPost") == ours["ExecStopPost"][0].removeprefix("+")


@pytest.mark.parametrize("unit", [SERVICE, FOLDER, USER])
def test_every_unit_of_the_daemon_waits_for_it_and_watches_it(unit: str) -> None:
    """Each unit of the daemon is ready when the daemon says so, kills one that is silent for 20 s, waits 5 s for what a
    frozen cgroup keeps from ending, and starts it again after 0.1 s, for ever; 2 s later where it was refused."""
    found = _Unit(unit)
    service = {key: found.one("Service", key) for key in ("Type", "WatchdogSec", "Restart", "RestartSec")}
    assert service == {"Type": "notify", "WatchdogSec": "20s", "Restart": "always", "RestartSec": "100ms"}
    assert found.one("Service", "TimeoutStopSec") == "5s"
    assert "exec sleep 2" in found.one("Service", "ExecStopPost")
    assert found.one("Unit", "StartLimitIntervalSec") == "0"


def test_statuses_that_a_restart_cannot_mend_are_faults_of_the_daemon() -> None:
    """What keeps systemd from a restart is a wrong usage, a user that is not there (217 of systemd), or a fault that
    only a person can mend: never an I/O error, a full disk, or another daemon that serves."""
    kept = {int(status) for status in _Unit(SERVICE).one("Service", "RestartPreventExitStatus").split()}
    by_a_person = (faults.CorruptDatabase, faults.CannotCreate, faults.NoPermission, faults.BadConfiguration)
    assert kept == {2, 217} | {fault.status for fault in by_a_person}


def test_places_of_the_units_are_those_of_the_daemon() -> None:
    """Registry, sockets, their folder and the backlog are in the units what they are in the code."""
    service, socket, backup = _Unit(SERVICE), _Unit(SOCKET), _Unit(BACKUP)
    assert socket["Socket", "ListenStream"] == [str(SYSTEM.socket), str(SYSTEM.lifeline)]
    assert socket.one("Socket", "Backlog") == str(sockets.BACKLOG)
    run = str(SYSTEM.socket.parent)
    assert service.one("Service", "ReadWritePaths") == f"-{run}"
    assert (UNITS / "tmpfiles.d" / "madsci-registryd.conf").read_text().splitlines()[-1].split()[:2] == ["d", run]
    assert Path("/var/lib", service.one("Service", "StateDirectory")) == SYSTEM.state
    registry = f"--registry {SYSTEM.registry} "
    assert registry in service.one("Service", "ExecStart")
    assert registry in backup.one("Service", "ExecStart")


def test_programs_are_all_under_one_prefix() -> None:
    """Each unit runs its program from /opt/madsci-registryd/bin, so that an installer has one prefix to replace."""
    for unit in (SERVICE, FOLDER, USER, BACKUP, LAB):
        assert _Unit(unit).one("Service", "ExecStart").startswith(PROGRAMS), unit


def test_sample_configuration_of_the_service_is_the_documented_one() -> None:
    """systemd/registryd.toml is docs/registryd.toml by a link: whatever is tested of that holds for it."""
    link = UNITS / "registryd.toml"
    assert link.is_symlink()
    assert link.resolve() == (PROJECT / "docs" / "registryd.toml").resolve()


def test_timer_makes_up_for_a_missed_backup() -> None:
    """The backup timer is daily, spread over an hour, and catches up after the host was off."""
    parser = configparser.ConfigParser()
    parser.read(UNITS / TIMER)
    assert dict(parser["Timer"]) == {"oncalendar": "daily", "randomizeddelaysec": "1h", "persistent": "yes"}
