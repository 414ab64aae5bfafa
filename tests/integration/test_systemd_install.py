"""`registryctl service install`, `uninstall` and `logs` on a real systemd, and `make install` from a checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import PROJECT, until
from madsci_registryctl.service import units
from sandbox import PREFIX, SOURCE, SYSTEM_REGISTRY, Sandbox, need_sandbox

SERVICE, SOCKET = "madsci-registryd.service", "madsci-registryd.socket"
UNITS = "/etc/systemd/system"
CONFIG = "/etc/madsci/registryd.toml"
FOLDER = Path("/srv/lab/.madsci")
FOLDER_UNIT = "madsci-registryd@srv-lab-.madsci.service"
OTHER = Path("/srv/100% é: x-y")
OTHER_UNIT = r"madsci-registryd@srv-100\x25\x20\xc3\xa9:\x20x\x2dy.service"
"""A path with all that a unit might take for something else."""
INSTALL = ("service", "install", "--system")
UNINSTALL = ("service", "uninstall", "--system")


def outcomes(sandbox: Sandbox, *words: str | Path, user: str | None = None) -> dict[str, str]:
    """Run `registryctl --json ...` in the sandbox and return what became of each file."""
    answer = json.loads(sandbox.registryctl("--json", *words, user=user).stdout)
    return {file["path"]: file["outcome"] for file in answer["files"]}


def has(sandbox: Sandbox, path: str | Path) -> bool:
    return sandbox.run("test", "-e", path, status=None).returncode == 0


@pytest.fixture(scope="module", autouse=True)
def of_root() -> None:
    """The service of a host runs no program that others than root could change: the checkout and environment of these
    tests are one."""
    need_sandbox()
    for folder in (PROJECT, Path(sys.prefix)):
        found = folder.stat()
        if found.st_uid != 0 or found.st_mode & 0o022:
            pytest.skip(f"needs a checkout and a virtual environment that only root may change; {folder} is not")


def test_install_serves_the_host_and_is_idempotent(sandbox: Sandbox) -> None:
    """One command makes the service run and start with the host; its files are root's alone to change. The second time
    everything is unchanged, and the daemon is the same process. `service logs` shows what it has logged; an option that
    journalctl refuses ends with its status, and who may not read the journal is told how to be let in."""
    first = sandbox.registryctl(*INSTALL)
    assert f"written    {UNITS}/{SERVICE}\n" in first.stdout
    assert f"{PREFIX}/bin/registryctl service logs" in first.stderr  # it is on no PATH
    assert "then systemctl restart madsci-registryd\n" in first.stderr
    assert sandbox.unit(SERVICE, "ActiveState") == "active"
    assert sandbox.unit(SERVICE, "UnitFileState") == "enabled"
    pid = sandbox.main_pid(SERVICE)
    again = outcomes(sandbox, *INSTALL)
    assert set(again.values()) == {"unchanged"}
    assert sandbox.main_pid(SERVICE) == pid
    assert sandbox.shell(f"stat -c '%U:%G %a' {' '.join(again)}").splitlines() == ["root:root 644"] * len(again)
    assert not sandbox.shell("systemctl --failed --no-legend")
    assert json.loads(sandbox.registryctl("--json", "status").stdout)["registry"] == str(SYSTEM_REGISTRY)
    assert "serving registry=/var/lib/madsci/registry.json" in sandbox.registryctl("service", "logs").stdout
    assert sandbox.registryctl("service", "logs", "--system", "--lines", "1").stdout.count("\n") == 1
    assert "serving" not in sandbox.registryctl("service", "logs", "--since", "2099-01-01").stdout
    sandbox.registryctl("service", "logs", "--since", "nonsense", status=1)
    sandbox.add_user("bob")
    refused = sandbox.registryctl("service", "logs", user="bob", status=1)
    assert "usermod --append --groups systemd-journal bob" in refused.stderr


def test_install_and_stop_are_for_whom_they_say(sandbox: Sandbox) -> None:
    """Another user than root is told the command that would install (7). Then, `access = "group"` lets in who is in
    the group madsci, and refuses others (7); no program would use a service of their own, which is said (2). Nor does
    `registryctl stop` end a daemon that systemd would start again: it says what does, by the service or its sockets."""
    sandbox.add_user("bob")
    refused = sandbox.registryctl(*INSTALL, user="bob", status=7)
    assert f"sudo {PREFIX}/bin/registryctl service install --system" in refused.stderr
    sandbox.write(CONFIG, 'access = "group"\n')
    assert outcomes(sandbox, *INSTALL)[CONFIG] == "kept"
    sandbox.add_user("ann", "madsci")
    words = ("resolve", "arm", "--type", "node")
    ulid = sandbox.registryctl(*words, user="ann").stdout
    assert sandbox.registryctl("lookup", "arm").stdout == ulid
    sandbox.registryctl(*words, user="bob", status=7)
    own = ("env", "-C", "/home/bob", "HOME=/home/bob", PREFIX / "bin" / "registryctl", "service", "install")
    assert "--system is its service" in sandbox.run(*own, user="bob", status=2).stderr
    pid = sandbox.main_pid(SERVICE)
    assert "systemctl stop madsci-registryd.service" in sandbox.registryctl("stop", status=1).stderr
    assert sandbox.main_pid(SERVICE) == pid
    sandbox.registryctl(*INSTALL, "--socket-activation")
    assert "systemctl stop madsci-registryd.socket " in sandbox.registryctl("stop", status=1).stderr


def test_uninstall_leaves_the_data(sandbox: Sandbox) -> None:
    """Uninstalling stops the service and removes its files, says so the second time, and leaves the registry: installed
    again, the name has the same ULID."""
    written = outcomes(sandbox, *INSTALL)
    ulid = sandbox.registryctl("resolve", "arm", "--type", "node").stdout
    removed = outcomes(sandbox, *UNINSTALL)
    assert removed == dict.fromkeys([*written, "/run/madsci/registry.kept"], "removed")
    assert sandbox.unit(SERVICE, "LoadState") == "not-found"
    assert not [path for path in written if has(sandbox, path)]
    assert has(sandbox, "/var/lib/madsci/registry.db")
    again = sandbox.registryctl(*UNINSTALL)
    assert (again.stdout, again.stderr) == ("", "Nothing is installed.\n")
    sandbox.registryctl(*INSTALL)
    assert sandbox.registryctl("lookup", "arm").stdout == ulid


def test_configuration_of_a_person_stays(sandbox: Sandbox) -> None:
    """A configuration that a person has changed is neither replaced by an installation nor removed with it, and what
    that means is said. Where nothing can be removed, nothing is stopped."""
    sandbox.registryctl(*INSTALL)
    sandbox.run("mount", "-o", "remount,ro", UNITS)
    assert f"{UNITS}: Read-only file system" in sandbox.registryctl(*UNINSTALL, status=1).stderr
    assert sandbox.unit(SERVICE, "ActiveState") == "active"
    sandbox.run("mount", "-o", "remount,rw", UNITS)
    sandbox.shell(f"echo 'log_level = \"debug\"' >> {CONFIG}")
    assert outcomes(sandbox, *INSTALL)[CONFIG] == "kept"
    done = sandbox.registryctl(*UNINSTALL)
    assert f"kept       {CONFIG}\n" in done.stdout
    assert f"programs look for the registry of this host: rm {CONFIG}\n" in done.stderr
    assert sandbox.run("tail", "-1", CONFIG).stdout == 'log_level = "debug"\n'


def test_newer_units_are_put_in_force_and_locks_stay(sandbox: Sandbox) -> None:
    """Where an earlier version has written a unit, it is replaced and the service started anew; a holder keeps its lock
    and its token."""
    sandbox.registryctl(*INSTALL)
    older = units.read(SERVICE, PREFIX / "bin").partition("\n")[2].replace("RestartSec=100ms", "RestartSec=200ms")
    sandbox.write(f"{UNITS}/{SERVICE}", units.marked(older))
    sandbox.shell(f"systemctl daemon-reload; systemctl restart {SERVICE}")
    pid = sandbox.main_pid(SERVICE)
    with sandbox.worker() as holder:
        token = holder.ask("resolve", "arm")["fencing_token"]
        assert outcomes(sandbox, *INSTALL)[f"{UNITS}/{SERVICE}"] == "replaced"
        assert sandbox.main_pid(SERVICE) not in (0, pid)
        assert sandbox.unit(SERVICE, "RestartUSec") == "100ms"
        holder.ask("ensure", "arm")
        assert holder.ask("token", "arm") == token
        assert holder.ask("losses", 0) == []


def test_install_that_failed_goes_on_when_mended(sandbox: Sandbox) -> None:
    """Where the service does not start, what was written is named and stays (6); mended, the same command goes on."""
    sandbox.write(CONFIG, "no_such_setting = 1\n")
    error = json.loads(sandbox.registryctl("--json", *INSTALL, status=6).stdout)["error"]
    assert error["code"] == "unavailable"
    assert "systemctl enable --now" in error["message"]
    assert f"{UNITS}/{SERVICE}" in error["hint"]
    assert "no_such_setting" in sandbox.registryctl("service", "logs", "--system").stdout
    sandbox.run("rm", CONFIG)
    again = outcomes(sandbox, *INSTALL)
    assert again.pop(CONFIG) == "written"
    assert set(again.values()) == {"unchanged"}
    assert sandbox.unit(SERVICE, "ActiveState") == "active"


def test_unit_that_is_another_program_is_no_success(sandbox: Sandbox) -> None:
    """Where a unit of the service's name runs something else, an installation says that nothing serves (6), and leaves
    no configuration, which would send all programs to that registry; an uninstallation leaves the unit running."""
    sandbox.write(f"{UNITS}/{SERVICE}", "[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n")
    refused = sandbox.registryctl(*INSTALL, status=6)
    assert f"{SERVICE} is active, but does not serve" in refused.stderr
    assert f"removed    {CONFIG}\n" in refused.stdout
    assert not has(sandbox, "/etc/madsci")
    assert (
        f"Left, as it runs another program than this one's: {UNITS}/{SERVICE}" in sandbox.registryctl(*UNINSTALL).stderr
    )
    assert sandbox.unit(SERVICE, "ActiveState") == "active"


def test_socket_activation_can_be_added(sandbox: Sandbox) -> None:
    """--socket-activation hands the sockets of a running service to systemd; a holder keeps its lock. A later
    installation without the option leaves them there."""
    sandbox.registryctl(*INSTALL)
    with sandbox.worker() as holder:
        holder.ask("resolve", "arm")
        sandbox.registryctl(*INSTALL, "--socket-activation")
        assert sandbox.unit(SOCKET, "ActiveState") == sandbox.unit(SERVICE, "ActiveState") == "active"
        holder.ask("ensure", "arm")
        assert holder.ask("losses", 0) == []
        sandbox.registryctl(*INSTALL)
        assert sandbox.unit(SOCKET, "ActiveState") == "active"
    sandbox.registryctl(*UNINSTALL)
    assert sandbox.unit(SOCKET, "LoadState") == "not-found"


def test_folder_is_served_as_its_owner(sandbox: Sandbox) -> None:
    """--system --folder serves a folder as its owner, with the sockets in it; two folders share the template, which
    goes with the last one."""
    uid = sandbox.add_user("ann")
    sandbox.run("install", "--directory", "--owner=ann", FOLDER, OTHER)
    sandbox.registryctl(*INSTALL, "--folder", FOLDER)
    sandbox.registryctl(*INSTALL, "--folder", OTHER)
    named = ("--registry", FOLDER / "registry.json")
    status = json.loads(sandbox.registryctl("--json", *named, "status", user="ann").stdout)
    assert (status["uid"], status["socket"]) == (uid, f"{FOLDER}/run/registry.sock")
    assert "serving registry=" in sandbox.registryctl("service", "logs", "--folder", OTHER).stdout
    assert f"{UNITS}/madsci-registryd@.service" not in outcomes(sandbox, *UNINSTALL, "--folder", FOLDER)
    assert sandbox.unit(FOLDER_UNIT, "ActiveState") == "inactive"
    assert sandbox.unit(OTHER_UNIT, "ActiveState") == "active"
    assert outcomes(sandbox, *UNINSTALL, "--folder", OTHER)[f"{UNITS}/madsci-registryd@.service"] == "removed"
    assert sandbox.shell(f"find {UNITS} -name 'madsci*'") == ""
    assert has(sandbox, FOLDER / "registry.db")


def test_folder_of_a_unit_that_was_kept_out_is_taken_over(sandbox: Sandbox) -> None:
    """Where the unit tries in vain, as a client's daemon serves its folder (69), an installation ends that daemon and
    the unit serves, though a try was just ending. Uninstalling the host's services ends those of folders as
    well, as their program may go next; then a client may start a daemon again."""
    sandbox.shell(f"mkdir -p {FOLDER}")
    sandbox.registryctl(*INSTALL, "--folder", FOLDER)
    sandbox.run("systemctl", "stop", FOLDER_UNIT)
    named = ("--registry", FOLDER / "registry.json")

    def by_client(autostart: str, status: int = 0, timeout: float = 5) -> int:
        words = (
            "env",
            f"MADSCI_REGISTRY_AUTOSTART={autostart}",
            PREFIX / "bin" / "registryctl",
            *named,
            "--json",
            f"--timeout={timeout}",
        )
        sandbox.run(*words, "resolve", "arm", "--type", "node", status=status)
        return status or int(json.loads(sandbox.run(*words, "status").stdout)["pid"])

    by_client("", status=6, timeout=0.3)
    pid = by_client("1")
    sandbox.run("systemctl", "start", "--no-block", FOLDER_UNIT)
    until(lambda: sandbox.unit(FOLDER_UNIT, "SubState") == "stop-post", "for a try to end")
    assert f"ran        kill {pid}\n" in sandbox.registryctl(*INSTALL, "--folder", FOLDER).stdout
    assert sandbox.main_pid(FOLDER_UNIT) not in (0, pid)
    sandbox.registryctl(*UNINSTALL)
    assert sandbox.unit(FOLDER_UNIT, "ActiveState") == "inactive"
    assert sandbox.shell(f"find {UNITS} -name 'madsci*'") == ""
    assert by_client("") > 0


def test_daemon_by_hand_is_not_taken_over(sandbox: Sandbox) -> None:
    """Where somebody's own daemon serves the folder, nothing is written, and the error says which it is (8)."""
    sandbox.shell(f"mkdir -p {FOLDER}")
    registry = FOLDER / "registry.json"
    sandbox.run("systemd-run", "--unit=by-hand", "--service-type=notify", f"{PREFIX}/bin/madsci-registryd",
                "--registry", registry)  # fmt: skip
    error = json.loads(sandbox.registryctl("--json", *INSTALL, "--folder", FOLDER, status=8).stdout)["error"]
    assert error["code"] == "conflict"
    assert "by-hand.service" in error["message"]
    assert sandbox.shell(f"find {UNITS} -name 'madsci*'") == ""


# as an ordinary user


@pytest.fixture
def ann() -> Iterator[Sandbox]:
    """A system with a user whose own systemd runs."""
    with Sandbox(keep="systemd-logind.service") as booted:
        uid = booted.add_user("ann", "systemd-journal")
        if booted.run("systemctl", "start", f"user@{uid}.service", status=None).returncode != 0:
            pytest.skip("needs a systemd of a user: user@.service does not start (logind, D-Bus, libpam-systemd)")
        yield booted


def as_ann(
    sandbox: Sandbox, *words: str | Path, status: int = 0, autostart: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run registryctl as ann, in her home."""
    settings = ("HOME=/home/ann", f"MADSCI_REGISTRY_AUTOSTART={autostart}")
    command = ("env", "-C", "/home/ann", *settings, PREFIX / "bin" / "registryctl", *words)
    return sandbox.run(*command, user="ann", status=status)


def test_user_install_needs_no_root(ann: Sandbox) -> None:
    """A user installs the service of the own registry, twice without a change, reads its log and takes it away; the
    registry stays, and nothing was written outside the home. One more folder comes and goes by itself."""
    first = as_ann(ann, "service", "install")
    assert "written    /home/ann/.config/systemd/user/madsci-registryd@.service\n" in first.stdout
    assert "loginctl enable-linger ann" in first.stderr
    ulid = as_ann(ann, "resolve", "arm", "--type", "node").stdout
    second = as_ann(ann, "service", "install")
    assert "unchanged  /home/ann/.config/systemd/user/madsci-registryd@.service\n" in second.stdout
    other = Path("/home/ann/.madsci/other")
    as_ann(ann, "service", "install", "--folder", other)
    ann.run("rm", other / "run/registry.kept")
    ended = as_ann(ann, "service", "uninstall", "--folder", other)
    assert ended.stdout.startswith("ran        systemctl --user disable --now ")
    assert ended.stderr == "Registries are left as they are.\n"
    assert "serving registry=/home/ann/.madsci/registry.json" in as_ann(ann, "service", "logs").stdout
    assert ann.shell(f"find {UNITS} /etc/madsci -name 'madsci-reg*' 2>/dev/null || true") == ""
    assert "removed    " in as_ann(ann, "service", "uninstall").stdout
    as_ann(ann, "status", status=6)
    assert as_ann(ann, "lookup", "arm", autostart="").stdout == ulid


def test_daemon_of_another_user_is_not_taken_over(ann: Sandbox) -> None:
    """A folder whose sockets are a link to another user's gets no service, and that user's daemon goes on (8)."""
    as_ann(ann, "resolve", "arm", "--type", "node", autostart="1")
    pid = json.loads(as_ann(ann, "--json", "status").stdout)["pid"]
    ann.add_user("eve")
    ann.run("install", "--directory", "--owner=eve", FOLDER)
    ann.run("ln", "-s", "/home/ann/.madsci/run", FOLDER / "run", user="eve")
    assert f"pid {pid}" in ann.registryctl(*INSTALL, "--folder", FOLDER, status=8).stderr
    assert json.loads(as_ann(ann, "--json", "status").stdout)["pid"] == pid


def test_user_install_takes_over_from_an_autostarted_daemon(ann: Sandbox) -> None:
    """A daemon that a client has started ends, the service goes on with its registry, and who holds a name keeps it,
    with its token; the client starts no other daemon meanwhile."""
    run = ("run", "arm", "--type", "node", "--", "sh", "-c", "echo $MADSCI_FENCING_TOKEN; exec sleep 600")
    command = ("env", "HOME=/home/ann", "MADSCI_REGISTRY_AUTOSTART=1", PREFIX / "bin" / "registryctl", *run)
    with subprocess.Popen(ann.words(*command, user="ann"), stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout
            token = int(holder.stdout.readline())
            before = json.loads(as_ann(ann, "--json", "status").stdout)["pid"]
            assert f"ran        kill {before}\n" in as_ann(ann, "service", "install").stdout
            status = json.loads(as_ann(ann, "--json", "status").stdout)
            assert "madsci-registryd@home-ann-.madsci.service" in ann.shell(f"cat /proc/{status['pid']}/cgroup")
            assert status["held"] == 1
            assert json.loads(as_ann(ann, "--json", "show", "arm").stdout)["fencing_token"] == token
            assert holder.poll() is None
        finally:
            holder.kill()  # the command itself ends with the sandbox


# from a checkout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an installation from a checkout takes from the package index: the sandbox has no network."""
    need_sandbox()
    folder = tmp_path_factory.mktemp("wheels")
    project = (PROJECT / "pyproject.toml").read_text()
    needed = re.findall(
        r'^    "([\w-]+>=[\d.]+)"', project.partition("[project.optional-dependencies]")[0], re.MULTILINE
    )
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*pip, "hatchling>=1.26", *needed], env=plain, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs a package index: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_make_install_leaves_alone_what_is_not_its_own(sandbox: Sandbox) -> None:
    """`make install` puts the program into no folder that it has not made, `make uninstall` removes none, and both are
    for root."""
    sandbox.shell("mkdir /opt/theirs; touch /opt/theirs/file")
    sandbox.add_user("ann")
    for target in ("install", "uninstall"):
        command = ("make", "-C", SOURCE, target, "PREFIX=/opt/theirs", f"PYTHON={sandbox.python}")
        assert "cannot stand in a unit file" in sandbox.run(*command, "PREFIX=/opt/x y", status=2).stderr
        assert "/opt/theirs" in sandbox.run(*command, status=2).stderr
        assert "needs root" in sandbox.run(*command, user="ann", status=2).stderr
    assert sandbox.shell("ls -A /opt/theirs") == "file\n"


@pytest.mark.build
@pytest.mark.timeout(400)
def test_make_install_upgrades_over_a_running_one(wheels: Path) -> None:
    """`make install` in a checkout serves the host by a program of its own. In a newer checkout it puts that version in
    force, and a holder keeps its lock and token. The commands are on PATH, unless something else has the name. `make
    uninstall` removes service and program, not the registry; that of another program leaves them alone."""
    with Sandbox("--ro", f"{wheels}:/opt/wheels") as sandbox, sandbox.worker() as holder:
        python = sandbox.run("readlink", "-f", sandbox.python).stdout.strip()

        def make(target: str, checkout: str | Path = SOURCE) -> str:
            offline = ("env", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/opt/wheels")
            command = (*offline, "make", "-C", checkout, target, "PREFIX=/opt/lab", f"PYTHON={python}")
            done = subprocess.run(sandbox.words(*command), capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        sandbox.write("/usr/local/bin/madsci-registryd", "theirs")
        first_time = make("install")
        assert f"written    {UNITS}/{SERVICE}\n" in first_time
        assert "kept       /usr/local/bin/madsci-registryd, which is something else\n" in first_time
        assert str(SYSTEM_REGISTRY) in sandbox.run("registryctl", "where").stdout
        assert "ExecStart=/opt/lab/bin/madsci-registryd" in sandbox.run("cat", f"{UNITS}/{SERVICE}").stdout
        first = sandbox.main_pid(SERVICE)
        token = holder.ask("resolve", "arm")["fencing_token"]

        sandbox.shell(
            f"cp -r {SOURCE} /opt/newer; sed -i 's/^version = .*/version = \"99.0\"/' /opt/newer/pyproject.toml"
        )
        again = make("install", "/opt/newer")
        assert f"unchanged  {UNITS}/{SERVICE}\n" in again
        assert f"ran        systemctl restart {SERVICE}\n" in again
        assert sandbox.main_pid(SERVICE) not in (0, first)
        status = json.loads(sandbox.run("/opt/lab/bin/registryctl", "--json", "status").stdout)
        assert (status["version"], status["held"]) == ("99.0", 1)
        holder.ask("ensure", "arm")
        assert holder.ask("token", "arm") == token

        left = sandbox.registryctl(*UNINSTALL)
        assert f"another program than this one's: {UNITS}/{SERVICE}" in left.stderr
        assert sandbox.unit(SERVICE, "ActiveState") == "active"

        make("uninstall")
        assert not has(sandbox, "/opt/lab")
        assert sandbox.shell("cd /usr/local/bin; find . -name '*regist*'") == "./madsci-registryd\n"
        assert has(sandbox, "/var/lib/madsci/registry.db")
        assert sandbox.unit(SERVICE, "LoadState") == "not-found"
