"""The runbook of docs/operations.md, "As a service of the host (systemd)", followed on a real systemd."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import PROJECT, until
from madsci_registry import errors
from sandbox import PREFIX, SOURCE, SYSTEM_REGISTRY, InnerWorker, Sandbox

SERVICE, SOCKET = "madsci-registryd.service", "madsci-registryd.socket"
SOCKETS = ("/run/madsci/registry.sock", "/run/madsci/registry.life")
CONFIG = "/etc/madsci/registryd.toml"
NAMES = [f"node_{n}" for n in range(5)]

# A peer of libzmq that sends one message without end, by hand: a client of libzmq would keep it until it is whole.
ENDLESS = """
import socket, struct
peer = socket.socket(socket.AF_UNIX)
peer.connect("/run/madsci/registry.sock")
peer.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\0" + b"NULL".ljust(20, b"\\0") + bytes(32))
peer.recv(64, socket.MSG_WAITALL)
ready = b"\\x05READY\\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
peer.sendall(b"\\x04" + bytes([len(ready)]) + ready)
try:
    while True:
        peer.sendall(b"\\x03" + struct.pack(">Q", 60000) + bytes(60000))  # a frame, and more are to come
except OSError:
    pass
"""


def _runbook() -> str:
    text = (PROJECT / "docs" / "operations.md").read_text()
    section = re.search(r"^## As a service of the host \(systemd\)\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section
    return section[1]


RUNBOOK = _runbook()
INSTALL, FOLDER, USER, NETWORK = re.findall(r"^ *```sh\n(.*?)^ *```", RUNBOOK, re.MULTILINE | re.DOTALL)


class Host:
    """A machine with the service installed as the runbook says, and its clients."""

    def __init__(self, sandbox: Sandbox, stack: ExitStack) -> None:
        self.sandbox = sandbox
        self._stack = stack

    def client(self, user: str | None = None) -> InnerWorker:
        """Start a client process of the system's registry."""
        worker = self.sandbox.worker(user=user)
        self._stack.enter_context(worker)
        return worker

    def holders(self) -> dict[str, tuple[InnerWorker, int]]:
        """Start a client for each of NAMES that holds it, with its token."""
        clients = {name: self.client() for name in NAMES}
        return {name: (client, client.ask("resolve", name)["fencing_token"]) for name, client in clients.items()}

    def settings(self, text: str) -> None:
        """Replace the settings of the service."""
        self.sandbox.write(CONFIG, text)

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit, as `systemctl edit` does."""
        self.sandbox.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
        self.sandbox.run("systemctl", "daemon-reload")

    def systemctl(self, *words: str, status: int | None = 0) -> str:
        return self.sandbox.run("systemctl", *words, status=status).stdout

    @property
    def pid(self) -> int:
        """The daemon's pid in the machine; 0: none runs."""
        return self.sandbox.main_pid(SERVICE)

    def await_next(self, pid: int) -> None:
        """Wait until another daemon than `pid` says that it is ready."""
        until(lambda: self.pid not in (0, pid), f"for another daemon:\n{self.sandbox.journal(SERVICE)}")
        self.sandbox.await_state(SERVICE, "active")


def kept(holders: dict[str, tuple[InnerWorker, int]]) -> None:
    """Check that every holder still has its lock, with its token, and was never told otherwise."""
    for name, (client, token) in holders.items():
        client.ask("ensure", name)
        assert client.ask("token", name) == token
        assert client.ask("losses", 0) == []


@contextmanager
def installed_on(sandbox: Sandbox) -> Iterator[Host]:
    """Do the first part of the runbook, up to enabling the units."""
    steps, enable = INSTALL.rstrip().rsplit("\n", 1)
    assert enable.startswith("systemctl enable --now madsci-registryd.service ")
    sandbox.shell(f"cd {SOURCE}\n{steps}")
    with ExitStack() as stack:
        yield Host(sandbox, stack)


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    """A machine on which the service is installed, and does not run yet."""
    with installed_on(sandbox) as installed:
        yield installed


@pytest.fixture
def served(host: Host) -> Host:
    """A machine on which the service was started."""
    host.systemctl("start", SERVICE)
    return host


@pytest.fixture
def activated(host: Host) -> Host:
    """A machine on which systemd holds the sockets; no daemon runs yet."""
    host.systemctl("enable", "--now", SOCKET)
    assert host.pid == 0
    return host


@contextmanager
def knocking(host: Host) -> Iterator[dict[str, Any]]:
    """Connect to both sockets all the time; what was counted is there at the end."""
    counted: dict[str, Any] = {}
    words = host.sandbox.words(host.sandbox.python, SOURCE / "tests" / "knocker.py", *SOCKETS)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "knocking\n"
        yield counted
        answer, _ = process.communicate("\n")
        counted.update(json.loads(answer))


# start and stop


def test_install_as_the_runbook_says_serves_and_is_enabled(host: Host) -> None:
    """The commands of the runbook give a service that is ready when `systemctl` returns, runs as madsci, starts with
    the next boot, and has a daily backup."""
    host.sandbox.shell(f"cd {SOURCE}\n{INSTALL}")
    assert host.sandbox.unit(SERVICE, "StatusText") == f"serving {SYSTEM_REGISTRY}"
    assert host.sandbox.shell(f"ps -o user= -p {host.pid}").strip() == "madsci"
    assert host.client().ask("resolve", "arm")["held"]
    assert host.systemctl("is-enabled", SERVICE, "madsci-registryd-backup.timer").split() == ["enabled"] * 2
    assert "madsci-registryd-backup.service" in host.systemctl("list-timers", "--no-pager")
    assert host.sandbox.unit("madsci-registry-lab.service", "LoadState") == "not-found"  # its program is an extra
    files = host.sandbox.shell("stat -c '%n %U:%G %a' /var/lib/madsci /var/lib/madsci/registry.db /run/madsci/*.[ls]*")
    assert files.splitlines() == [
        "/var/lib/madsci madsci:madsci 755",
        "/var/lib/madsci/registry.db madsci:madsci 600",
        *(f"{path} madsci:madsci 600" for path in sorted(SOCKETS)),
    ]


def test_folder_of_the_sockets_is_the_same_after_stop_and_start(served: Host) -> None:
    """A container that mounts /run/madsci sees the sockets of every later start: the folder is never another one."""
    container = "mkdir /srv/seen && mount --bind /run/madsci /srv/seen && stat -c %i /srv/seen"
    inode = served.sandbox.shell(container)
    for unit in (SERVICE, SOCKET):
        served.systemctl("stop", SERVICE)
        served.systemctl("start", unit)
        assert served.sandbox.shell("stat -c %i /run/madsci") == inode
        assert served.sandbox.shell("cd /srv/seen; ls *.[ls]*").split() == ["registry.life", "registry.sock"]
        with served.sandbox.worker() as client:
            assert client.ask("resolve", "arm")["held"]
        served.systemctl("stop", SOCKET)


def test_wrong_setting_is_not_tried_again(host: Host) -> None:
    """A daemon that ends with 78 is `failed` at once, says why in the journal, and is not started again until a person
    has corrected the setting."""
    host.settings('acces = "group"\n')
    host.systemctl("start", SERVICE, status=1)
    shown = [host.sandbox.unit(SERVICE, key) for key in ("ActiveState", "ExecMainStatus", "NRestarts")]
    assert shown == ["failed", "78", "0"]
    assert "unknown setting acces" in host.sandbox.journal(SERVICE)
    host.settings('access = "group"\n')
    host.systemctl("start", SERVICE)


def test_missing_folder_of_the_sockets_is_said_and_mended_as_the_runbook_says(host: Host) -> None:
    """Where /run/madsci is missing the start fails with a sentence about it; the commands of the runbook make it again,
    with and without socket activation."""
    host.sandbox.run("rmdir", "/run/madsci")
    host.systemctl("start", SERVICE, status=1)
    assert host.sandbox.unit(SERVICE, "ActiveState") == "failed"
    assert "/run/madsci cannot be made" in host.sandbox.journal(SERVICE)
    mend = re.search(
        r"(?:^    \S.*\n)+(?<=start madsci-registryd.service\n)", RUNBOOK.partition("cleaner")[2], re.MULTILINE
    )
    assert mend
    host.sandbox.shell(mend[0].replace("systemctl start madsci-registryd.socket", "true"))
    assert host.client().ask("resolve", "arm")["held"]
    host.systemctl("stop", SERVICE)
    host.systemctl("start", SOCKET)
    host.sandbox.run("rm", "-r", "/run/madsci")
    host.sandbox.shell(mend[0])
    assert host.sandbox.unit(SOCKET, "ActiveState") == "active"
    assert host.client().ask("resolve", "pump")["held"]


def test_daemon_that_another_keeps_from_serving_takes_over_from_it(host: Host) -> None:
    """While a daemon that was started by hand serves the registry (69), the service tries every 2 s, and serves as soon
    as that one is gone; its holder keeps its lock."""
    host.sandbox.shell("install -d -o madsci -g madsci /var/lib/madsci")
    program = (f"{PREFIX}/bin/madsci-registryd", "--registry", SYSTEM_REGISTRY)
    host.sandbox.run("systemd-run", "--quiet", "--unit=by-hand", "--uid=madsci", "--gid=madsci", *program)
    holders = host.holders()
    host.systemctl("start", "--no-block", SERVICE)
    until(lambda: host.sandbox.unit(SERVICE, "ExecMainStatus") == "69", "for the service to see the other daemon")
    host.systemctl("stop", "by-hand.service")
    host.sandbox.await_state(SERVICE, "active")
    kept(holders)
    assert int(host.sandbox.unit(SERVICE, "NRestarts")) <= 3


def test_reload_reads_the_settings_without_a_restart(served: Host) -> None:
    """`systemctl reload` returns when the new settings count; the daemon is the same process."""
    pid, client = served.pid, served.client()
    assert client.ask("resolve", "arm")["held"]
    served.settings("names_per_uid = 1\n")
    served.systemctl("reload", SERVICE)
    with pytest.raises(errors.QuotaError):
        client.ask("resolve", "pump")
    assert served.pid == pid


# crashes and restarts


def test_daemon_that_is_silent_is_replaced_and_holders_keep_their_locks(host: Host) -> None:
    """A daemon that nobody asks anything says that it lives. One that is stopped does not, nor one whose cgroup is
    frozen, where no other signal than SIGKILL counts: systemd kills it and starts the next one, and every holder has
    its lock and its token."""
    host.drop_in(SERVICE, "[Service]\nWatchdogSec=1\nTimeoutStopSec=2\n")
    host.systemctl("start", SERVICE)
    holders, pid = host.holders(), host.pid
    host.sandbox.run("sleep", "1.5")
    assert (host.pid, host.sandbox.unit(SERVICE, "NRestarts")) == (pid, "0")
    for stop in (("kill", "-STOP", str(pid)), ("systemctl", "freeze", SERVICE)):
        pid = host.pid
        host.sandbox.run(*stop)
        host.await_next(pid)
        kept(holders)
    journal = host.sandbox.journal(SERVICE)
    assert journal.count("Watchdog timeout") == 2
    assert "'stop-watchdog' timed out" not in journal
    assert host.client().ask("resolve", "free")["held"]


def test_daemon_is_replaced_under_load_and_no_client_is_refused(activated: Host) -> None:
    """With socket activation, the daemon is killed and restarted five times each while holders hold, clients ask and
    others connect: no lock is lost, no request fails, no connection is refused."""
    holders = activated.holders()
    askers = [activated.client() for _ in range(2)]
    with knocking(activated) as counted:
        for asker in askers:
            asker.tell("time_lookups", NAMES[0], 3.0)
        for how in ("kill", "restart") * 5:
            pid = activated.pid
            if how == "restart":
                activated.systemctl("restart", SERVICE)
            else:
                activated.sandbox.run("kill", "-KILL", str(pid))
            activated.await_next(pid)
            kept(holders)
        for asker in askers:
            assert asker.answer()
    assert counted["refused"] == []
    assert counted["accepted"] > 100


def test_daemon_that_is_killed_in_a_row_is_never_given_up(served: Host) -> None:
    """Six kills within seconds, more than systemd's usual five in ten, and the daemon is there again. Without socket
    activation too no request of a client fails: it connects again by itself."""
    holders = served.holders()
    asker = served.client()
    asker.tell("time_lookups", NAMES[0], 3.0)
    for _ in range(6):
        pid = served.pid
        served.sandbox.run("kill", "-KILL", str(pid))
        served.await_next(pid)
    kept(holders)
    assert asker.answer()


def test_deleted_database_is_written_again_and_served(served: Host) -> None:
    """The database is deleted under the daemon, which writes it again and ends with 74: systemd starts the next one at
    once, and holders keep their locks."""
    holders, pid = served.holders(), served.pid
    served.sandbox.run("rm", "/var/lib/madsci/registry.db")
    served.await_next(pid)
    assert "status=74" in served.sandbox.journal(SERVICE)
    kept(holders)


def test_endless_message_ends_at_the_memory_limit_and_costs_no_lock() -> None:
    """A peer that sends one message without end, which libzmq takes in without a limit, costs the daemon its life at
    MemoryMax= and nobody a lock."""
    groups = Path("/proc/self/cgroup").read_text()
    if ":memory:" not in groups or ":name=systemd:" not in groups:
        pytest.skip("needs the memory controller on cgroup v1, where a sandbox can have it")
    with Sandbox("--cgroup", "v1") as sandbox, installed_on(sandbox) as host:
        host.drop_in(SERVICE, "[Service]\nMemoryMax=100M\n")
        host.systemctl("start", SERVICE)
        holders, pid = host.holders(), host.pid
        host.sandbox.run(host.sandbox.python, "-c", ENDLESS)
        host.await_next(pid)
        kept(holders)


def test_frozen_holder_keeps_its_lock_over_a_restart(served: Host) -> None:
    """A holder that is stopped, or whose unit is frozen as `docker pause` does, keeps its lock while the daemon is
    restarted: another is refused, and the holder has its token when it goes on."""
    program = (f"{PREFIX}/bin/registryctl", "run", "arm", "--type", "node", "--", "sleep", "infinity")
    served.sandbox.run("systemd-run", "--unit=node", "--quiet", *program)

    def shown() -> dict[str, Any]:
        done = served.sandbox.registryctl("--json", "show", "arm", status=None)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def sessions() -> list[dict[str, Any]]:
        return list(json.loads(served.sandbox.registryctl("--json", "sessions").stdout))

    before = until(lambda: (found := shown()).get("fencing_token") and found, "for the unit to hold the name")
    for stop, go_on in (("kill --signal=STOP", "kill --signal=CONT"), ("freeze", "thaw")):
        served.systemctl(*stop.split(), "node.service")
        pid = served.pid
        served.systemctl("restart", SERVICE)
        served.await_next(pid)
        with pytest.raises(errors.HeldError) as held:
            served.client().ask("resolve", "arm")
        assert held.value.holder is not None
        assert held.value.holder.pid == served.sandbox.main_pid("node.service")
        served.systemctl(*go_on.split(), "node.service")
        until(lambda: 1 in [s["held"] for s in sessions() if s["attached"]], "for the holder to come back")
        assert shown()["fencing_token"] == before["fencing_token"]
        assert served.sandbox.unit("node.service", "ActiveState") == "active"


# socket activation


def _instants(host: Host, message: str) -> list[float]:
    """List when the service logged a message, in seconds after some instant."""
    words = ("journalctl", "--no-pager", "--output=short-monotonic", "--unit", SERVICE)
    lines = host.sandbox.run(*words).stdout.splitlines()
    return [float(line.strip("[").split("]")[0]) for line in lines if message in line]


def test_client_that_waits_is_served_once_the_setting_is_corrected(activated: Host) -> None:
    """With a wrong setting a socket unit would start the daemon without end: it is tried every 2 s instead, the sockets
    stay, and the client that waits is served by itself when the setting is right."""
    activated.settings("quark = 1\n")
    client = activated.client()
    client.tell("resolve", "arm", wait=60)
    tries = until(
        lambda: len(found := _instants(activated, "unknown setting quark")) >= 2 and found, "for a second try"
    )
    assert tries[1] - tries[0] >= 2
    assert activated.sandbox.unit(SOCKET, "ActiveState") == "active"
    activated.settings("")
    assert client.answer()["held"]


def test_stopped_socket_and_service_stay_stopped_for_verify(activated: Host) -> None:
    """Both units stopped as the runbook says, neither holders that come back nor the backup start anything: `verify`
    has the database for itself; afterwards the holders resume."""
    holders = activated.holders()
    activated.systemctl("stop", SOCKET, SERVICE)
    activated.systemctl("start", "madsci-registryd-backup.service", status=1)
    assert activated.sandbox.unit(SERVICE, "ActiveState") == activated.sandbox.unit(SOCKET, "ActiveState") == "inactive"
    verify = f"runuser -u madsci -- {PREFIX}/bin/madsci-registryd --registry {SYSTEM_REGISTRY} verify 2>&1"
    assert activated.sandbox.shell(verify) == "the database is whole\n"
    activated.systemctl("start", SOCKET)
    kept(holders)


# backups


def test_backup_timer_makes_backups_that_verify_accepts(served: Host) -> None:
    """The timer runs the backup as madsci; what it writes is a whole database with every name, and only the newest 14
    stay."""
    name, folder = "madsci-registryd-backup", "/var/lib/madsci/backups"
    identity = served.client().ask("resolve", "arm")["id"]
    older = [f"{folder}/registry-2026-01-{day:02}T000000Z.db" for day in range(1, 21)]
    served.sandbox.shell(f"install -d -o madsci -g madsci {folder}; touch {' '.join(older)}")
    served.drop_in(f"{name}.timer", "[Timer]\nOnCalendar=\nOnActiveSec=0\nRandomizedDelaySec=0\nAccuracySec=1ms\n")
    served.systemctl("start", f"{name}.timer")
    until(lambda: served.sandbox.unit(f"{name}.service", "ExecMainExitTimestampMonotonic") != "0", "for the backup")
    assert served.sandbox.unit(f"{name}.service", "Result") == "success", served.sandbox.journal(f"{name}.service")
    *kept_ones, made = served.sandbox.shell(f"ls -d {folder}/*").split()
    assert kept_ones == older[-13:]
    assert served.sandbox.shell(f"stat -c '%U %a' {made}") == "madsci 600\n"
    served.sandbox.shell(f"install -D {made} /srv/check/registry.db")
    program = f"{PREFIX}/bin/madsci-registryd --registry /srv/check/registry.json"
    assert served.sandbox.shell(f"{program} verify 2>&1") == "the database is whole\n"
    dump = "import apsw; print(*apsw.Connection('/srv/check/registry.db').execute('SELECT name, id FROM components'))"
    assert served.sandbox.run(served.sandbox.python, "-c", dump).stdout == f"('arm', '{identity}')\n"


# the network


def test_network_is_given_by_its_drop_in_alone(host: Host) -> None:
    """A metrics listener cannot listen in the unit as it is, and the registry is served all the same; with the drop-in
    of the runbook it answers."""
    host.settings('metrics_listen = "127.0.0.1:9847"\n')
    host.systemctl("start", SERVICE)
    fetch = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9847/metrics', timeout=20).status)"
    until(lambda: "metrics cannot be given out" in host.sandbox.journal(SERVICE), "for the daemon to say so")
    assert host.client().ask("resolve", "arm")["held"]
    host.sandbox.run(host.sandbox.python, "-c", fetch, status=1)
    host.sandbox.shell(f"cd {SOURCE}\n{NETWORK}")
    assert host.sandbox.run(host.sandbox.python, "-c", fetch).stdout == "200\n"


# folders


def test_folder_is_served_as_its_owner(host: Host) -> None:
    """A `.madsci` folder in a home is served as the runbook says: by its owner, with its sockets in it, away from all
    else in that home; its owner is let in. A client that may start a daemon leaves that to the unit, which serves again
    after a kill."""
    home = "/home/ann"
    lab = f"{home}/My lab"
    folder = f"{lab}/.madsci"
    host.sandbox.add_user("ann")
    host.sandbox.shell(
        f"chmod 700 {home}; touch {home}/secret; runuser -u ann -- mkdir -p '{folder}'; touch '{lab}/secret'"
    )
    host.sandbox.shell(FOLDER.replace(f"folder={home}/.madsci", f"folder='{folder}'"))
    (unit,) = re.findall(r"madsci-registryd@\S+\.service", host.systemctl("list-units", "--plain", "--no-legend"))
    pid = host.sandbox.main_pid(unit)
    seen = host.sandbox.shell(f"ps -o user= -p {pid}; cd /proc/{pid}/root; find home -maxdepth 3")
    assert seen.splitlines() == ["ann", "home", "home/ann", "home/ann/My lab", "home/ann/My lab/.madsci"]
    with host.sandbox.worker(f"{folder}/registry.json", user="ann", autostart=True) as client:
        assert client.ask("resolve", "arm")["held"]
        host.sandbox.run("kill", "-KILL", str(pid))
        client.ask("ensure", "arm")
        until(lambda: host.sandbox.unit(unit, "NRestarts") == "1", "for systemd to see it")
        host.sandbox.await_state(unit, "active")
        assert client.ask("losses", 0) == []
    owners = host.sandbox.shell(f"cd '{folder}'; stat -c %U * run/*.sock run/*.life").split()
    assert set(owners) == {"ann"}


def test_folder_in_a_home_may_be_opened_to_others(host: Host) -> None:
    """A setting in the drop-in lets other users of the machine use a folder's registry, where they can get at it.
    As anybody else than the owner the unit fails, with 77, or 217 of systemd for a user that is not there, and is not
    tried again."""
    host.sandbox.add_user("ann")
    host.sandbox.add_user("bob")
    host.sandbox.shell("chmod 711 /home/ann; runuser -u ann -- mkdir /home/ann/.madsci")
    unit = "madsci-registryd@home-ann-.madsci.service"
    for owner, status in (("madsci", "77"), ("424242", "217")):
        host.drop_in(unit, f"[Service]\nUser={owner}\n")
        host.systemctl("start", unit, status=1)
        assert [host.sandbox.unit(unit, key) for key in ("ExecMainStatus", "NRestarts")] == [status, "0"]
    assert host.sandbox.shell("ls -A /home/ann/.madsci") == ""
    host.drop_in(unit, "[Service]\nUser=ann\nEnvironment=MADSCI_REGISTRYD_ACCESS=everyone\n")
    host.systemctl("start", unit)
    with host.sandbox.worker("/home/ann/.madsci/registry.json", user="bob") as client:
        assert client.ask("resolve", "arm")["held"]


def test_user_serves_a_folder_in_their_own_service_manager(host: Host) -> None:
    """The user's unit, set up as the runbook says without root, serves ~/.madsci and comes back after a kill, also
    where a client that may start a daemon waits for it."""
    uid = host.sandbox.add_user("ann")
    host.systemctl("start", f"user@{uid}.service")
    as_ann = ["env", "HOME=/home/ann", f"XDG_RUNTIME_DIR=/run/user/{uid}"]
    host.sandbox.run(*as_ann, "sh", "-ec", f"cd {SOURCE}\n{USER}", user="ann")
    with host.sandbox.worker("/home/ann/.madsci/registry.json", user="ann", autostart=True) as client:
        assert client.ask("resolve", "arm")["held"]
        show = [*as_ann, "systemctl", "--user", "show", "--value", "-p", "MainPID", "madsci-registryd@*"]
        pid = host.sandbox.run(*show, user="ann").stdout.strip()
        host.sandbox.run("kill", "-KILL", pid, user="ann")
        client.ask("ensure", "arm")
        until(lambda: host.sandbox.run(*show, user="ann").stdout.strip() not in ("0", pid), "for the next daemon")
        show[show.index("MainPID")] = "NRestarts"
        assert host.sandbox.run(*show, user="ann").stdout.strip() == "1"


# who may


def _may(host: Host, user: str) -> str:
    """Let a user hold a name and release it; return how that went: "held", or the refusal."""
    with host.sandbox.worker(user=user) as client:
        try:
            return "held" if client.ask("resolve", "arm")["held"] else "not held"
        except errors.PermissionDeniedError as refusal:
            return str(refusal)


def test_three_users_are_let_in_as_the_setting_says(host: Host) -> None:
    """The daemon's user, a member of its group and a stranger: `access` lets in the first, the first two, all; and
    `allow_uids` lets in who is named. Who is refused learns who they are, which socket it is, and what would help."""
    users = {"madsci": 0, "member": host.sandbox.add_user("member", "madsci"), "stranger": 0}
    users["stranger"] = host.sandbox.add_user("stranger")
    cases = {
        'access = "owner"': {"madsci"},
        'access = "group"': {"madsci", "member"},
        'access = "everyone"': {"madsci", "member", "stranger"},
        f"allow_uids = [{users['stranger']}]": {"madsci", "stranger"},
    }
    for settings, admitted in cases.items():
        host.settings(f"{settings}\n")
        host.systemctl("restart", SERVICE)
        found = {user: _may(host, user) for user in users}
        assert {user for user, how in found.items() if how == "held"} == admitted, (settings, found)
        for user in users.keys() - admitted:
            for fact in (f"you are uid {users[user]} ", "/run/madsci/registry.", "access", "allow_uids"):
                assert fact in found[user]


def test_sockets_that_systemd_made_get_the_modes_of_the_setting(activated: Host) -> None:
    """The first client's resolve starts the daemon and is answered by it. The daemon gives the sockets that it was
    passed the modes of `access`, as it does with its own; until then members of the group can start it, nobody else."""
    stat = f"stat -c '%a %G' {' '.join(SOCKETS)} /run/madsci"
    assert activated.sandbox.shell(stat).split("\n")[:2] == ["660 madsci"] * 2
    assert activated.client().ask("resolve", "arm")["held"]
    assert activated.sandbox.unit(SERVICE, "StatusText") == f"serving {SYSTEM_REGISTRY}"
    modes = {"owner": ("600", "700"), "group": ("660", "750"), "everyone": ("666", "755")}
    for access, (socket, folder) in modes.items():
        activated.settings(f'access = "{access}"\n')
        activated.systemctl("restart", SERVICE)
        assert activated.sandbox.shell(stat).splitlines() == [*[f"{socket} madsci"] * 2, f"{folder} madsci"]
