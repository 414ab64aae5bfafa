"""`registryctl service`: what is planned, what is written and removed, and which programs a hardened unit reaches."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePath

import pytest

from helpers import PATIENCE_S, PROJECT
from madsci_registry.errors import BusyError, InvalidError, UnsupportedError
from madsci_registryctl.service import choice, plan, reach, systemd, units
from madsci_registryctl.service.files import Disk, File, Outcome

OPT = Path("/opt/elsewhere/bin")
HOME = Path("/home/ann")  # no _HOME of this machine
OF_SYSTEM = plan.Service("system", HOME)
OF_FOLDER = plan.Service("system", HOME, Path("/srv/lab/.madsci"))
OF_USER = plan.Service("user", HOME, HOME / ".madsci")


def planned(service: plan.Service, *, owner: str | None = None, socket_activation: bool = False) -> plan.Plan:
    return plan.installation(service, OPT, owner=owner, socket_activation=socket_activation)


def test_shipped_units_are_those_at_the_top() -> None:
    """The command line's package has systemd/ and the sample configuration as relative links, so that an editable
    install has them too."""
    package = PROJECT / "client" / "madsci_registryctl" / "service"
    for link, target in ((package / "units", "systemd"), (package / "registryd.toml", "docs/registryd.toml")):
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == (PROJECT / target).resolve()


def test_system_plan_has_units_user_folder_and_configuration() -> None:
    """The service of the host is its units, the user, the folder of the sockets and a configuration; the user and the
    folder are made before the units start."""
    found = planned(OF_SYSTEM)
    assert {str(file.path) for file in found.files} == {
        "/etc/systemd/system/madsci-registryd.service",
        "/etc/systemd/system/madsci-registryd.socket",
        "/etc/systemd/system/madsci-registryd-backup.service",
        "/etc/systemd/system/madsci-registryd-backup.timer",
        "/etc/sysusers.d/madsci-registryd.conf",
        "/etc/tmpfiles.d/madsci-registryd.conf",
        "/etc/madsci/registryd.toml",
    }
    assert [command[0] for command in found.prepare] == ["systemd-sysusers", "systemd-tmpfiles", "systemctl"]
    assert found.units == ("madsci-registryd.service", "madsci-registryd-backup.timer")


def test_socket_activation_starts_the_socket_first() -> None:
    """With socket activation the socket is enabled too, before the service."""
    found = planned(OF_SYSTEM, socket_activation=True).units
    assert found == ("madsci-registryd.socket", "madsci-registryd.service", "madsci-registryd-backup.timer")


def test_folder_of_the_system_runs_as_its_owner() -> None:
    """A folder that the system serves has the template unit and a drop-in that names the owner; nothing else."""
    unit, owner = planned(OF_FOLDER, owner="ann").files
    assert str(unit.path) == "/etc/systemd/system/madsci-registryd@.service"
    assert str(owner.path) == "/etc/systemd/system/madsci-registryd@srv-lab-.madsci.service.d/owner.conf"
    assert owner.text.endswith("\n[Service]\nUser=ann\n")


def test_folder_of_a_user_is_in_the_users_own_units() -> None:
    """A user's service writes nothing outside the home, and is told to the user's own systemd."""
    found = planned(OF_USER)
    assert [file.path for file in found.files] == [HOME / ".config/systemd/user/madsci-registryd@.service"]
    assert found.files[0].text != planned(OF_FOLDER, owner="ann").files[0].text
    assert found.prepare == (("systemctl", "--user", "daemon-reload"),)
    assert found.units == (r"madsci-registryd@home-ann-.madsci.service",)


@pytest.mark.parametrize("service", [OF_SYSTEM, OF_FOLDER, OF_USER], ids=["system", "folder", "user"])
def test_units_name_the_program_that_is_installed(service: plan.Service) -> None:
    """What is written names the programs where they are, and no longer where the shipped units say."""
    texts = [file.text for file in planned(service, owner="ann").files]
    assert not [text for text in texts if units.PROGRAMS in text]
    assert [text for text in texts if f"ExecStart={OPT}/madsci-registryd --registry " in text]


@pytest.mark.parametrize("folder", ["/srv/a lab/bin", "/srv/100%/bin", "/srv/$x/bin", '/srv/"x"/bin', "/srv/a\nb/bin"])
def test_program_path_that_no_unit_can_hold_is_refused(folder: str) -> None:
    """A program in a folder with spaces, quotes or what systemd replaces is refused by name."""
    with pytest.raises(InvalidError) as caught:
        plan.installation(OF_SYSTEM, Path(folder), owner=None, socket_activation=False)
    assert caught.value.field == "program"


PATHS = ("/", "/srv/lab/.madsci", "/.madsci", "/a-b/c d", "/é/x\\y", "/a//b/", "/a/..b/_:.", "/%i/$x")


@pytest.mark.parametrize("path", PATHS)
def test_instance_is_what_systemd_makes_of_a_path(path: str) -> None:
    """A folder's path becomes the instance that systemd-escape makes of it."""
    program = shutil.which("systemd-escape")
    if program is None:
        pytest.skip("needs systemd-escape (systemd)")
    made = subprocess.run(
        [program, "--path", path], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout
    assert units.instance(PurePath(path)) == made.rstrip("\n")
    assert units.folder_of(units.unit_of(plan.TEMPLATE, PurePath(path))) == Path(path)


def test_folder_too_long_for_a_unit_is_refused() -> None:
    """A path whose unit would have a name beyond systemd's limit is refused, and the longest one is not."""
    room = units.UNIT_NAME_MAX_BYTES - len("madsci-registryd@.service")
    assert len(units.unit_of(plan.TEMPLATE, PurePath("/", "x" * room))) == units.UNIT_NAME_MAX_BYTES
    with pytest.raises(InvalidError, match="shorter path"):
        units.unit_of(plan.TEMPLATE, PurePath("/", "x" * (room + 1)))


def test_removal_of_all_has_every_file_of_an_installation() -> None:
    """What installations of any kind write, the removal of all takes away; sockets and timers are stopped first."""
    installed = [*planned(OF_SYSTEM).files, *planned(OF_FOLDER, owner="ann").files]
    removal = plan.removal(OF_SYSTEM, ["madsci-registryd@.service", f"{OF_FOLDER.unit}.d", "other@x.service"])
    assert set(removal.files) == {file.path for file in installed}
    assert removal.units[:2] == ("madsci-registryd.socket", "madsci-registryd-backup.timer")
    assert removal.units[-1] == OF_FOLDER.unit
    assert removal.notes == (Path("/run/madsci/registry.kept"), Path("/srv/lab/.madsci/run/registry.kept"))
    of_user = plan.removal(replace(OF_USER, folder=None), ["madsci-registryd@.service", OF_USER.unit])
    assert of_user.units == (OF_USER.unit,)
    assert {file.path for file in planned(OF_USER).files} <= set(of_user.files)


def test_removal_of_a_folder_leaves_the_template_to_others() -> None:
    """The template unit goes with the last folder that it serves."""
    template = OF_FOLDER.unit_folder / plan.TEMPLATE
    alone = plan.removal(OF_FOLDER, [plan.TEMPLATE, OF_FOLDER.unit, f"{OF_FOLDER.unit}.d"])
    assert template in alone.files
    another = plan.removal(OF_FOLDER, [plan.TEMPLATE, OF_FOLDER.unit, "madsci-registryd@srv-b.service"])
    assert template not in another.files
    assert another.units == (OF_FOLDER.unit,)


def test_removal_leaves_what_runs_another_program() -> None:
    """The host's units stay where the service runs another program, and so do those of folders, with all files."""
    there = [plan.SERVICE, plan.TEMPLATE, OF_FOLDER.unit]
    assert plan.removal(OF_SYSTEM, there, foreign=[plan.SERVICE]).units == (OF_FOLDER.unit,)
    assert OF_FOLDER.unit not in plan.removal(OF_SYSTEM, there, foreign=[plan.TEMPLATE]).units
    assert plan.removal(OF_SYSTEM, there, foreign=[plan.SERVICE, plan.TEMPLATE]) == plan.Removal()


def test_program_of_a_unit_is_read() -> None:
    """The daemons that a unit file runs are found in all that is written: with a prefix, behind another program."""
    for name in (plan.SERVICE, plan.TEMPLATE, f"user/{plan.TEMPLATE}"):
        assert units.daemons_in(units.read(name, OPT)) == [OPT / "madsci-registryd"]
    wrapped = "[Service]\nExecStart=\nExecStart=-/usr/bin/nice /opt/x/madsci-registryd --export\n"
    assert units.daemons_in(wrapped) == [Path("/opt/x/madsci-registryd")]
    assert units.daemons_in("[Service]\nExecStart=sleep 1000\n") == []


def test_log_of_a_user_is_asked_for_as_the_users() -> None:
    """The log of a user's unit is found by the user's unit, the system's by the system's."""
    assert plan.journal(OF_USER, ["--follow"]) == ("journalctl", f"--user-unit={OF_USER.unit}", "--follow")
    assert plan.journal(OF_SYSTEM, []) == ("journalctl", "--unit=madsci-registryd.service")


# files


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A tree of its own, written to as the system's."""
    return Disk(tmp_path)


def file(path: str, text: str = "[Unit]\n") -> File:
    return File(Path(path), units.marked(text))


UNIT = file("/etc/systemd/system/x.service")


def written(disk: Disk, *files: File) -> list[Outcome]:
    return [outcome for _, outcome in disk.write(files)]


def test_write_twice_changes_nothing(disk: Disk, tmp_path: Path) -> None:
    """A missing file and its folders are open to read whatever the umask; the second run leaves it; nothing else is
    there."""
    before = os.umask(0o077)
    try:
        assert written(disk, UNIT) == ["written"]
    finally:
        os.umask(before)
    place = tmp_path / "etc/systemd/system/x.service"
    inode = place.stat().st_ino
    assert place.read_text() == UNIT.text
    assert place.stat().st_mode & 0o7777 == 0o644
    assert place.parent.stat().st_mode & 0o7777 == 0o755
    assert written(disk, UNIT) == ["unchanged"]
    assert place.stat().st_ino == inode
    assert list(place.parent.iterdir()) == [place]


def test_write_replaces_what_an_earlier_version_wrote(disk: Disk, tmp_path: Path) -> None:
    """A file that nobody has changed since is replaced by a newer one, and so is one whose mode is another."""
    written(disk, UNIT)
    assert written(disk, file(str(UNIT.path), "[Unit]\nDescription=new\n")) == ["replaced"]
    (tmp_path / "etc/systemd/system/x.service").chmod(0o666)
    assert written(disk, file(str(UNIT.path), "[Unit]\nDescription=new\n")) == ["replaced"]


def test_write_takes_over_what_was_copied_by_hand(disk: Disk, tmp_path: Path) -> None:
    """A shipped file that a person has copied into its place unchanged is one of ours from the next installation on."""
    place = tmp_path / "etc/systemd/system/x.service"
    place.parent.mkdir(parents=True)
    place.write_text("[Unit]\n")
    assert written(disk, UNIT) == ["replaced"]
    assert disk.remove(UNIT.path) == "removed"


def test_what_a_person_has_changed_is_kept(disk: Disk, tmp_path: Path) -> None:
    """A changed file, and one that we never wrote, are neither replaced nor removed."""
    written(disk, UNIT)
    place = tmp_path / "etc/systemd/system/x.service"
    for text in (UNIT.text + "# mine\n", "# mine\n" + UNIT.text, "[Unit]\n#\n", "", "\udcff"):
        place.write_text(text, errors="surrogateescape")
        assert written(disk, UNIT) == ["kept"]
        assert disk.remove(UNIT.path) == "kept"
        assert place.read_text(errors="surrogateescape") == text


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder"])
def test_what_is_no_plain_file_is_kept(disk: Disk, tmp_path: Path, kind: str) -> None:
    """A link (a masked unit, say), a FIFO or a folder in the place of a file is left as it is, and not followed."""
    place = tmp_path / "etc/systemd/system/x.service"
    place.parent.mkdir(parents=True)
    target = tmp_path / "target"
    if kind.endswith("link"):
        place.symlink_to(target)
        if kind == "link":
            target.write_text(units.marked("old\n"))
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
    assert written(disk, UNIT) == ["kept"]
    assert disk.remove(UNIT.path) == "kept"
    assert not target.exists() or target.read_text() == units.marked("old\n")


def test_link_on_the_way_is_followed_for_users_alone(disk: Disk, tmp_path: Path) -> None:
    """For the system no folder on the way may be a link, that nobody turns root's write elsewhere; a user's may."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "system").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/systemd").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"is a link, .*etc/systemd") as caught:
        written(disk, UNIT)
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert list((elsewhere / "system").iterdir()) == []
    assert written(replace(disk, follows_links=True), UNIT) == ["written"]
    assert (elsewhere / "system/x.service").read_text() == UNIT.text


def test_write_that_fails_leaves_all_as_it_was(disk: Disk, tmp_path: Path) -> None:
    """Where one file cannot be written none is, and nothing half-written stays."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/sysusers.d").write_text("in the way")
    with pytest.raises(OSError, match="sysusers"):
        written(disk, UNIT, file("/etc/sysusers.d/x.conf"))
    assert list((tmp_path / "etc/systemd/system").iterdir()) == []


def test_write_goes_on_where_a_killed_one_stopped(disk: Disk, tmp_path: Path) -> None:
    """What a killed run had begun to write is in nobody's way, be it a link that somebody put there."""
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    (folder / ".x.service.new").symlink_to(tmp_path / "target")
    assert written(disk, UNIT) == ["written"]
    assert [path.name for path in folder.iterdir()] == ["x.service"]
    assert not (tmp_path / "target").exists()


def test_two_installations_at_once_are_refused(disk: Disk) -> None:
    """While one installation writes, another one is told so."""
    folder = Path("/etc/systemd/system")
    with disk.locked(folder), pytest.raises(BusyError), disk.locked(folder):
        pass
    with disk.locked(folder):
        pass


def test_remove_takes_file_and_own_folder(disk: Disk, tmp_path: Path) -> None:
    """A file as it was written is removed, with the folder of drop-ins that was made for it; a second time there is
    nothing; a folder that holds more stays."""
    drop_in = file("/etc/systemd/system/madsci-registryd@srv.service.d/owner.conf")
    written(disk, UNIT, drop_in)
    assert [disk.remove(drop_in.path), disk.remove(UNIT.path)] == ["removed", "removed"]
    assert disk.remove(UNIT.path) == "absent"
    assert list((tmp_path / "etc/systemd/system").iterdir()) == []
    written(disk, drop_in)
    (tmp_path / "etc/systemd/system/madsci-registryd@srv.service.d/mine.conf").touch()
    assert disk.remove(drop_in.path) == "removed"
    assert disk.names(drop_in.path.parent) == ["mine.conf"]


# which programs a hardened unit reaches


@pytest.fixture
def opt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as one that no unit hides, and that everybody may enter."""
    monkeypatch.setattr(reach, "HIDDEN", {str(tmp_path / "home"): "ProtectHome= hides it"})
    monkeypatch.setattr(reach, "TRUSTED_UID", os.geteuid())
    monkeypatch.setattr(reach, "_closed", closed_below(tmp_path))
    (tmp_path / "home").mkdir()
    (tmp_path / "opt").mkdir()
    return tmp_path / "opt"


def closed_below(top: Path) -> object:
    """Judge the folders below `top` only: those above it are the test run's own, and closed."""
    judge = reach._closed
    return lambda path: [
        sentence for sentence in judge(path) if Path(sentence.split(" ")[0]).parent.is_relative_to(top)
    ]


def program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!\n")
    path.chmod(mode)
    return path


def test_program_that_others_may_read_is_reached(opt: Path) -> None:
    """A program in open folders is no obstacle, and neither is a link to one."""
    found = program(opt / "venv/bin/madsci-registryd")
    (opt / "link").symlink_to(found)
    assert reach.obstacles([found, opt / "link"]) == []


def test_program_in_a_hidden_folder_is_not_reached(opt: Path) -> None:
    """A program in a home, or an interpreter whose chain of links goes through one, is refused with the reason."""
    at_home = program(opt.parent / "home/ann/bin/python3")
    assert "ProtectHome=" in "".join(reach.obstacles([at_home]))
    (opt / "python3").symlink_to(at_home)
    assert reach.obstacles([opt / "python3"]) == [f"{at_home} is in {opt.parent}/home: ProtectHome= hides it"]
    (at_home.parent / "through").symlink_to(program(opt / "python3.11"))
    (opt / "python").symlink_to(at_home.parent / "through")
    assert "through" in "".join(reach.obstacles([opt / "python"]))


@pytest.mark.parametrize(
    ("folder", "file_mode", "word"),
    [(0o700, 0o755, "enter"), (0o755, 0o700, "read"), (0o777, 0o755, "change it"), (0o755, 0o757, "change it")],
)
def test_program_with_wrong_rights_is_refused(opt: Path, folder: int, file_mode: int, word: str) -> None:
    """A program that other users may not reach, or that everybody may change, is refused with the mode."""
    found = program(opt / "bin/madsci-registryd", file_mode)
    found.parent.chmod(folder)
    (sentence,) = reach.obstacles([found])
    assert word in sentence


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to others")
def test_program_that_is_not_roots_alone_is_refused(opt: Path) -> None:
    """A program that another user owns, or that a group may change, could be turned into another one that the system
    runs: both are said, whatever the modes of the rest."""
    found = program(opt / "bin/madsci-registryd")
    os.chown(found.parent, 4242, 4242)
    assert reach.obstacles([found]) == [f"{found.parent} belongs to uid 4242, who could change it"]
    os.chown(found.parent, 0, 4242)
    found.parent.chmod(0o775)
    assert reach.obstacles([found]) == [f"{found.parent} has mode 0775: others than root may change it"]
    os.chown(found.parent, 0, 0)
    assert reach.obstacles([found]) == []


def test_missing_part_is_named(opt: Path) -> None:
    """A part of the program that is not there is an obstacle with its name."""
    assert reach.obstacles([opt / "gone"]) == [f"{opt}/gone: No such file or directory"]


def test_homes_and_temporary_folders_are_hidden() -> None:
    """What ProtectHome= and PrivateTmp= of the shipped unit hide is what is refused."""
    shipped = (PROJECT / "systemd" / plan.SERVICE).read_text()
    assert {"ProtectHome=yes", "PrivateTmp=yes"} <= set(shipped.splitlines())
    assert set(reach.HIDDEN) == {"/home", "/root", "/run/user", "/tmp", "/var/tmp"}


def test_program_is_the_one_installed_with_this_command() -> None:
    """The daemon's program is that of the environment that runs registryctl; its parts are it, Python, our packages."""
    found = reach.program()
    assert found == Path(sys.prefix) / "bin" / "madsci-registryd"
    assert {found, Path(sys.executable)} < set(reach.parts(found))
    assert reach.installed_at() > 0


def test_process_started_when_it_did(tmp_path: Path) -> None:
    """The start of a process is told by the same clock as the times of files."""
    with subprocess.Popen(["sleep", "600"]) as child:
        try:
            (tmp_path / "now").touch()
            assert abs(systemd.started_at(child.pid) - (tmp_path / "now").stat().st_mtime) < 10
        finally:
            child.kill()
    with pytest.raises(OSError, match=str(child.pid)):
        systemd.started_at(child.pid)


def test_host_without_systemd_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemctl is missing, or systemd is not what runs this host, that is said, and that nothing was changed."""
    program(tmp_path / "systemctl")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"does not run .*Nothing was changed"):
        systemd.require("system")
    (tmp_path / "systemctl").unlink()
    with pytest.raises(UnsupportedError, match=r"systemctl is not here.*Nothing was changed"):
        systemd.require("system")


def test_user_without_a_systemd_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has no running systemd (after su, say) is told how to have one."""
    if shutil.which("systemctl") is None:
        pytest.skip("needs systemctl (systemd)")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    with pytest.raises(UnsupportedError, match=r"no systemd of user .*loginctl enable-linger"):
        systemd.require("user")


@pytest.mark.parametrize("closed", [PermissionError, NotADirectoryError])
def test_lingering_that_may_not_be_seen_is_taken_for_granted(
    monkeypatch: pytest.MonkeyPatch, closed: type[OSError]
) -> None:
    """Where /var/lib/systemd is closed to this user nothing fails, and nothing is advised."""

    def look(path: Path) -> bool:
        raise closed(str(path))

    monkeypatch.setattr(Path, "exists", look)
    assert systemd.lingers()


def test_journal_that_this_user_may_not_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of the journal that may be read is enough; a host without a journal is not held against the user."""
    monkeypatch.setattr(systemd, "JOURNALS", (tmp_path, tmp_path / "gone"))
    assert systemd.may_read_journal()
    (tmp_path / "id").mkdir()
    assert not systemd.may_read_journal()
    (tmp_path / "id/system.journal").touch()
    assert systemd.may_read_journal()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not systemd.may_read_journal()


def test_folder_that_is_no_registrys_is_refused(tmp_path: Path) -> None:
    """The root of the machine, and the folder of the system's registry, get no service as a folder."""
    with pytest.raises(InvalidError, match="no folder for a registry"):
        choice.check_folder(Path("/"))
    with pytest.raises(InvalidError, match="--system without --folder"):
        choice.check_folder(Path("/var/lib/madsci"))
    choice.check_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to nobody")
def test_folder_of_nobody_known_is_refused(tmp_path: Path) -> None:
    """A folder whose owner is in no password database is refused by its number: systemd starts nothing as it."""
    os.chown(tmp_path, 424242, 0)
    with pytest.raises(InvalidError, match="uid 424242, which is in no password database"):
        choice.owner_of(tmp_path)


def test_command_is_said_as_it_is_found(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person is told to type is the name where PATH leads to this program, be it by a link, else its path."""
    ours = program(opt / "venv/bin/registryctl")
    monkeypatch.setenv("PATH", str(opt))
    assert choice.as_typed(ours) == str(ours)
    (opt / "registryctl").symlink_to(ours)
    assert choice.as_typed(ours) == "registryctl"
    (opt / "registryctl").unlink()
    program(opt / "registryctl")
    assert choice.as_typed(ours) == str(ours)
