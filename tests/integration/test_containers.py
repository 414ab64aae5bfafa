"""A lab of containers: one daemon, clients with roots and namespaces of their own, one folder that all of them mount.

Where a registry would be in one container alone, the daemon refuses and the client says what to mount.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Workers
from containers import SHARED, Container, ServiceDaemon, ServiceWorker, need_containers
from helpers import DaemonProcess, Worker, environment
from madsci_registry import RegistryClient, errors
from madsci_registry.protocol import RESUME_S
from namespaces import need_proof
from onlooker import await_resume, holding_session, let_wait, token_of

REGISTRY = str(SHARED / "registry.json")
MOUNTED = f"- ./{SHARED.name}:{SHARED}"
"""The line of a compose file that mends it."""
IDLE_EXIT = ("--idle-exit", "0.1")


@pytest.fixture(autouse=True)
def _containers() -> None:
    need_containers()


class Lab:
    """Makes the containers of a lab; `end` ends what was started in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layers = folder.parent / f"{folder.name}-layers"
        self.layers.mkdir()
        self.workers: list[Worker] = []
        self.daemons: list[DaemonProcess] = []

    def container(self, *, host_pids: bool = False, user: int = 0, mode: str = "") -> Container:
        """Return a container that mounts the lab's folder."""
        return self.other({f"{SHARED}{mode}": self.folder}, host_pids=host_pids, user=user)

    def other(
        self, mounts: dict[str, Path | str], *, host_pids: bool = False, user: int = 0, mark: str = ".dockerenv"
    ) -> Container:
        """Return a container that mounts something else."""
        return Container(self.layers, mounts, host_pids=host_pids, user=user, mark=mark)

    def registryd(self, *options: str, host_pids: bool = True, user: int = 0) -> ServiceDaemon:
        """Return the lab's daemon, not started yet."""
        container = self.container(host_pids=host_pids, user=user)
        daemon = ServiceDaemon(self.folder / "registry.json", container, *options)
        self.daemons.append(daemon)
        return daemon

    def client(self, container: Container | None = None) -> ServiceWorker:
        """Start a client in a container of its own."""
        worker = ServiceWorker(container or self.container())
        self.workers.append(worker)
        return worker

    def end(self) -> None:
        for worker in self.workers:
            worker.__exit__()
        for daemon in self.daemons:
            daemon.kill()
        self.layers.rmdir()  # whatever was mounted on it was so in a container alone


@pytest.fixture
def lab(registry_path: Path) -> Iterator[Lab]:
    """The folder of a registry, and containers that mount it."""
    made = Lab(registry_path.parent)
    yield made
    made.end()


# one registry for all containers


@pytest.mark.parametrize("host_pids", [True, False], ids=["pid-host", "own-pids"])
def test_container_that_is_killed_hands_over_to_a_waiter_in_another(lab: Lab, host_pids: bool) -> None:
    """Daemon, holder and waiter in three containers, which mount one folder: the holder's container is killed, and the
    waiter has the name at once, also where the daemon does not see the processes of others."""
    need_proof("pidfd")
    lab.registryd(host_pids=host_pids).start()
    holder, waiter = lab.client(), lab.client()
    token = holder.ask("resolve", "arm")["fencing_token"]
    assert holder.ask("status")["registry"] == REGISTRY
    with pytest.raises(errors.HeldError):
        waiter.ask("resolve", "arm")
    let_wait(waiter, lab.folder / "registry.json")
    killed_at = holder.kill()
    granted = waiter.answer()
    assert granted["at"] - killed_at < RESUME_S
    assert granted["fencing_token"] > token


def test_daemon_with_the_pids_of_the_host_knows_all_containers(lab: Lab, registry_path: Path) -> None:
    """With `pid: host` the daemon shows the holder's pid on the host, and after a restart it knows a holder that is
    frozen by its process again, so that its lock needs no grace."""
    daemon = lab.registryd().start()
    holder = lab.client()
    token = holder.ask("resolve", "arm")["fencing_token"]
    found = holding_session(registry_path)
    assert found.pid is not None
    assert found.pid != holder.ask("hello")
    holder.freeze()
    daemon.restart()
    session = holding_session(registry_path)
    assert (session.attached, session.pid) == (False, found.pid)
    assert session.proof != "connection"
    holder.thaw()
    await_resume(registry_path)
    assert token_of(registry_path) == token
    holder.ask("ensure", "arm")


def test_all_clients_restarted_at_once_have_their_names_again(lab: Lab, workers: Workers) -> None:
    """All containers of a lab but the daemon's are killed and started again: each has its name at once, with a higher
    token and the same ULID; who was not killed keeps its lock."""
    lab.registryd().start()
    outsider = workers()
    kept = outsider.ask("resolve", "outside")["fencing_token"]
    names = [f"node_{number}" for number in range(6)]
    before = _all_resolve(lab, names)
    for worker in lab.workers:
        worker.kill()
    after = _all_resolve(lab, names, wait=RESUME_S / 2)
    assert [one["id"] for one in after] == [one["id"] for one in before]
    assert all(new["fencing_token"] > old["fencing_token"] for new, old in zip(after, before, strict=True))
    outsider.ask("ensure", "outside")
    assert outsider.ask("token", "outside") == kept


@pytest.mark.parametrize("first", ["daemon", "clients"])
def test_whole_lab_restarted_at_once_has_its_names_again(
    lab: Lab, registry_path: Path, workers: Workers, first: str
) -> None:
    """All containers are killed, the daemon's too, and started again, whichever comes first: the names of the dead are
    free without any grace, their ULIDs the same; a holder outside of the containers has kept its lock and its token."""
    daemon = lab.registryd().start()
    outsider = workers()
    kept = outsider.ask("resolve", "outside")["fencing_token"]
    names = [f"node_{number}" for number in range(4)]
    before = _all_resolve(lab, names)
    daemon.kill()
    for killed in lab.workers:
        killed.kill()

    def start_daemon() -> None:
        daemon.start()
        now = {token_of(registry_path, name) for name in names}
        assert not now & {one["fencing_token"] for one in before}

    if first == "daemon":
        start_daemon()
    started = [lab.client() for _ in names]
    for worker, name in zip(started, names, strict=True):
        worker.tell("resolve", name, wait=60)
    if first == "clients":
        assert not any(worker.answered() for worker in started)
        start_daemon()
    after = [worker.answer() for worker in started]
    assert [one["id"] for one in after] == [one["id"] for one in before]
    assert all(new["fencing_token"] > old["fencing_token"] for new, old in zip(after, before, strict=True))
    with pytest.raises(errors.HeldError):
        started[0].ask("resolve", "outside")
    outsider.ask("ensure", "outside")
    assert outsider.ask("token", "outside") == kept


def _all_resolve(lab: Lab, names: list[str], wait: float = 0) -> list[dict[str, Any]]:
    """Let each name be resolved in a new container, all at once."""
    started = [lab.client() for _ in names]
    for worker, name in zip(started, names, strict=True):
        worker.tell("resolve", name, wait=wait)
    return [worker.answer() for worker in started]


def test_client_that_mounts_the_folder_read_only_holds_and_releases(lab: Lab, registry_path: Path) -> None:
    """A client needs no right to write in the folder: with a read-only mount it resolves, holds and releases."""
    lab.registryd().start()
    holder = lab.client(lab.container(mode=":ro"))
    assert holder.ask("resolve", "arm")["held"]
    holder.ask("release", "arm")
    assert token_of(registry_path) is None


# a registry in one container alone


@pytest.mark.parametrize("host_pids", [True, False], ids=["pid-host", "own-pids"])
@pytest.mark.parametrize("kind", ["overlay", "tmpfs"])
def test_database_that_goes_with_its_container_is_refused(lab: Lab, kind: str, host_pids: bool) -> None:
    """In a container a database on overlayfs or tmpfs is refused with status 78 and the line that mends it, with the
    pids of the host too; --ephemeral, or the setting, allows it."""
    alone = lab.other({str(SHARED): "tmpfs"} if kind == "tmpfs" else {}, host_pids=host_pids)
    daemon = ("-m", "madsci_registryd", "--registry", REGISTRY, *IDLE_EXIT)
    refused = alone.run(*daemon)
    assert refused.returncode == 78, refused.stderr
    assert f"{SHARED} is on {kind} in this container alone" in refused.stderr
    assert MOUNTED in refused.stderr
    assert "--ephemeral" in refused.stderr
    for served in (alone.run(*daemon, "--ephemeral"), alone.run(*daemon, MADSCI_REGISTRYD_EPHEMERAL="true")):
        assert served.returncode == 0, served.stderr


def test_database_on_a_mounted_folder_or_outside_of_a_container_is_served(lab: Lab) -> None:
    """A folder that is mounted from a disk is none that goes with the container; and where no engine's mark is, it is
    no container, whatever the root is."""
    for container in (lab.container(), lab.other({}, mark="")):
        done = container.run("-m", "madsci_registryd", "--registry", REGISTRY, *IDLE_EXIT)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv"])
def test_client_whose_container_mounts_no_folder_says_what_to_mount(lab: Lab, mark: str) -> None:
    """Where no folder is mounted each container would have a registry of its own: the client starts none, and says
    so with the line that mends it; `doctor` has a warning with the same fix."""
    alone = lab.other({}, mark=mark)
    resolved = alone.run("-m", "madsci_registryctl", "resolve", "arm", "--type", "node")
    assert resolved.returncode == 6
    assert f"{SHARED} is in this container alone (on overlay)" in resolved.stderr
    assert MOUNTED in resolved.stderr
    looked = alone.run("-m", "madsci_registryctl", "doctor")
    (found,) = [line for line in looked.stdout.splitlines() if line.split()[1:2] == ["container"]]
    assert found.startswith("warning"), found
    assert "each container would have a registry of its own" in found
    assert MOUNTED in looked.stdout


RESOLVE = """
from madsci.common.registry.identity_resolver import IdentityResolver
try:
    print(IdentityResolver().resolve("arm", component_type="node"))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_program_of_madsci_whose_container_mounts_no_folder_is_told_what_to_mount(lab: Lab, installed: Path) -> None:
    """An unmodified program of MADSci with the drop-in, in a container of a template that mounts no `.madsci`, gets no
    ULID of its own but an error with the line that mends it; with the line it gets its ULID from the lab's daemon."""
    python = str(installed / "python")
    settings = {"MADSCI_REGISTRY_DROPIN": "1", "PYTHONPATH": "", "PYTHONWARNINGS": ""}
    alone = lab.other({}).run("-c", RESOLVE, python=python, **settings)
    assert alone.stdout.startswith("RegistryLockError"), alone.stderr
    assert MOUNTED in alone.stdout
    lab.registryd().start()
    mounted = lab.container().run("-c", RESOLVE, python=python, **settings)
    with RegistryClient(lab.folder / "registry.json", autostart=False) as client:
        assert mounted.stdout.split() == [client.lookup("arm")], mounted.stderr


def test_client_that_may_start_a_daemon_in_its_container_is_told_its_refusal(lab: Lab) -> None:
    """MADSCI_REGISTRY_AUTOSTART=1 alone makes no registry that goes with the container: the client says what the
    daemon refused; with MADSCI_REGISTRYD_EPHEMERAL=true too it does."""
    alone = lab.other({})
    resolve = ("-m", "madsci_registryctl", "resolve", "arm", "--type", "node")
    refused = alone.run(*resolve, MADSCI_REGISTRY_AUTOSTART="1")
    assert refused.returncode == 1
    assert MOUNTED in refused.stderr
    made = alone.run(*resolve, MADSCI_REGISTRY_AUTOSTART="1", MADSCI_REGISTRYD_EPHEMERAL="true")
    assert (made.returncode, len(made.stdout.strip())) == (0, 26), made.stderr


def test_client_whose_container_mounts_the_folder_names_the_service(lab: Lab) -> None:
    """Where the folder is mounted and no daemon serves, the client names the service that it misses, and `doctor`
    finds nothing wrong with the folder."""
    mounted = lab.container()
    resolved = mounted.run("-m", "madsci_registryctl", "resolve", "arm", "--type", "node")
    assert resolved.returncode == 6
    assert "docker compose up -d registryd" in resolved.stderr
    looked = mounted.run("-m", "madsci_registryctl", "doctor")
    assert [line.split()[0] for line in looked.stdout.splitlines() if line.split()[1:2] == ["container"]] == ["ok"]


def test_doctor_in_a_container_tries_its_crash_test_there(lab: Lab) -> None:
    """`doctor --crash-test` needs no mounted folder for its own scratch registry."""
    done = lab.other({}).run("-m", "madsci_registryctl", "doctor", "--crash-test")
    tried = [line.split()[0] for line in done.stdout.splitlines() if line.split()[:1] in (["OK"], ["SLOW"], ["FAILED"])]
    assert len(tried) == 6, done.stdout + done.stderr
    assert "FAILED" not in tried


# rights


def test_read_only_folder_is_refused_by_its_name(lab: Lab) -> None:
    """A daemon whose folder is mounted read-only ends with 73 and names what it cannot write."""
    done = lab.container(mode=":ro").run("-m", "madsci_registryd", "--registry", REGISTRY)
    assert done.returncode == 73, done.stderr
    assert "Read-only file system" in done.stderr
    assert str(SHARED) in done.stderr


def test_folder_of_another_user_is_refused_with_both_uids(lab: Lab) -> None:
    """A service that does not run as whom the folder belongs to ends with 77, and says as which uid it ran."""
    lab.folder.chmod(0o755)
    done = lab.container(user=1000).run("-m", "madsci_registryd", "--registry", REGISTRY)
    assert done.returncode == 77, done.stderr
    assert "uid 1000" in done.stderr


def test_allowed_uid_of_another_container_is_let_in_and_others_are_told_why_not(lab: Lab) -> None:
    """A daemon that runs as the folder's owner lets in who is in `allow_uids`, by number and without any group; another
    uid is told who it is, and the setting that would let it in."""
    os.chown(lab.folder, 1000, 1000)
    lab.folder.chmod(0o755)
    daemon = lab.registryd(user=1000)
    daemon.container = lab.container(host_pids=True, user=1000)
    daemon.options = ("--config", str(SHARED / "registryd.toml"))
    (lab.folder / "registryd.toml").write_text("allow_uids = [9999]\n")
    daemon.start()
    for user in (1000, 9999):
        assert lab.client(lab.container(user=user)).ask("resolve", f"of_{user}")["held"]
    with pytest.raises(errors.PermissionDeniedError) as refused:
        lab.client(lab.container(user=4242)).ask("resolve", "arm")
    assert "uid 4242" in str(refused.value)
    assert "allow_uids" in str(refused.value)


# user namespaces, as rootless engines have them


_BECOME = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"


class RootlessDaemon(DaemonProcess):
    """A daemon in a user namespace that knows root alone, who is root outside too."""

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", _BECOME, "unshare", "--user", "--map-root-user", *super().command(*arguments)]


def _need_user_namespaces() -> None:
    done = subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"unshare --user does not work here: {done.stderr.strip()}")


def test_daemon_whose_own_user_is_not_mapped_is_refused(registry_path: Path) -> None:
    """A daemon in a user namespace without a mapping ends with 77 and says why, before it makes anything."""
    _need_user_namespaces()
    command = ["unshare", "--user", *DaemonProcess(registry_path).command()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 77, done.stderr
    assert "not mapped in its user namespace" in done.stderr
    assert list(registry_path.parent.iterdir()) == []


def test_user_that_the_daemons_namespace_does_not_map_is_told_so(lab: Lab, registry_path: Path) -> None:
    """A daemon refuses a user that its user namespace does not know, though everyone is let in: two such users would
    be one to it. Who is mapped is served."""
    _need_user_namespaces()
    lab.folder.chmod(0o755)
    config = lab.folder / "registryd.toml"
    config.write_text('access = "everyone"\n')
    with RootlessDaemon(registry_path, "--config", str(config)):
        with pytest.raises(errors.PermissionDeniedError) as refused:
            lab.client(lab.container(user=4242)).ask("resolve", "arm")
        assert "not known in the daemon's user namespace" in str(refused.value)
        assert lab.client().ask("resolve", "arm")["held"]


def test_client_without_a_mapping_is_known_by_its_user_outside(daemon: DaemonProcess) -> None:
    """What a client's own user namespace calls it does not count: a daemon on the host sees who it is there."""
    _need_user_namespaces()
    words = ("-m", "madsci_registryctl", "--registry", str(daemon.registry), "resolve", "arm", "--type", "node")
    command = ["unshare", "--user", sys.executable, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stdout.strip())) == (0, 26), done.stderr
