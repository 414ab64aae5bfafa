"""What is a container and what is in it alone; and what the files in containers/ say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import PROJECT
from madsci_registry import containers
from madsci_registry._autostart import clean_environment, hint, lone_folder, refusal
from madsci_registry._endpoint import choose
from madsci_registry.containers import Mount, is_alone, is_container, mount_of
from madsci_registryctl.doctor import checks
from madsci_registryctl.doctor.case import Case
from madsci_registryd import surroundings
from madsci_registryd.faults import BadConfiguration, NoPermission

FILES = PROJECT / "containers"
DOCKERFILE = (FILES / "Dockerfile").read_text()
INITIAL = {"pid": 4026531836, "uts": 4026531838, "ipc": 4026531839, "cgroup": 4026531835, "user": 4026531837}


def machine(root: Path, *, own: Sequence[str] = (), mounts: str = "", mark: str = "") -> Path:
    """Make a root folder as that of a machine or container, with the namespaces that it has for itself."""
    (root / "proc/self/ns").mkdir(parents=True)
    for kind, number in INITIAL.items():
        (root / "proc/self/ns" / kind).symlink_to(f"{kind}:[{4026532000 if kind in own else number}]")
    (root / "proc/self/mountinfo").write_text(mounts)
    if mark:
        (root / mark).parent.mkdir(exist_ok=True)
        (root / mark).touch()
    return root


# is it one?


@pytest.mark.parametrize("kind", list(INITIAL))
@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv"])
def test_mark_and_a_namespace_of_its_own_make_a_container(tmp_path: Path, kind: str, mark: str) -> None:
    """An engine's file and any namespace that is not the host's: with `pid: host` it is a container all the same."""
    assert is_container({}, machine(tmp_path, own=[kind], mark=mark))


@pytest.mark.parametrize("variable", ["container", "KUBERNETES_SERVICE_HOST"])
def test_variable_of_an_engine_is_a_mark(tmp_path: Path, variable: str) -> None:
    """Engines that leave no file are known by the variable that they set."""
    root = machine(tmp_path, own=["uts"])
    assert is_container({variable: "x"}, root)
    assert not is_container({variable: ""}, root)


def test_one_of_both_alone_makes_no_container(tmp_path: Path) -> None:
    """A machine made from an image has the mark, a service of systemd has namespaces: neither is a container."""
    assert not is_container({"container": "x"}, machine(tmp_path / "vm", mark=".dockerenv"))
    assert not is_container({}, machine(tmp_path / "service", own=list(INITIAL)))
    assert not is_container({"container": "x"}, tmp_path / "no-proc")


# what is in it alone?

MOUNTS = """\
21 1 {other} / / rw - overlay overlay rw,lowerdir=/l
22 21 {here} /srv/lab/.madsci {place} rw,relatime shared:1 - ext4 /dev/sda1 rw
23 21 {here} /etc/hosts /etc/hosts rw - ext4 /dev/sda1 rw
24 21 9:9 / {place}/deep rw - tmpfs tmpfs rw
25 21 9:9 / /a\\040b rw - tmpfs tmpfs rw
"""


def test_mount_of_a_folder_is_the_nearest_above_it_on_its_device(tmp_path: Path) -> None:
    """The mount that holds a folder is found by path and device: an engine mounts single files of the same disk too,
    and a mount may be hidden by a later one above it."""
    device = tmp_path.stat().st_dev
    here, other = f"{os.major(device)}:{os.minor(device)}", "0:999"
    shared = tmp_path.resolve() / "shared"
    (shared / "deep").mkdir(parents=True)
    root = machine(tmp_path / "root", mounts=MOUNTS.format(here=here, other=other, place=shared))
    assert mount_of(shared / "deep", root) == Mount(str(shared), "ext4")
    assert mount_of(tmp_path, root) == Mount("/", "overlay")
    assert not is_alone(mount_of(shared, root))
    assert is_alone(mount_of(tmp_path, root))
    assert mount_of(shared, tmp_path / "no-proc").kind == "unknown"


@pytest.mark.parametrize("kind", ["overlay", "tmpfs", "ramfs", "fuse.fuse-overlayfs"])
def test_mount_in_memory_or_of_the_container_is_alone_wherever_it_is(kind: str) -> None:
    """Memory and a container's own layers are seen in that container alone; a disk at another place than / is not."""
    assert is_alone(Mount("/home/madsci/.madsci", kind))
    assert is_alone(Mount("/", "ext4"))
    assert not is_alone(Mount("/home/madsci/.madsci", "ext4"))


# what follows from it


@pytest.mark.parametrize("kind", ["overlay", "tmpfs", "fuse.fuse-overlayfs"])
def test_database_in_one_container_alone_is_refused_with_the_line_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Status 78, the mount in the form of a compose file, and --ephemeral where that would be taken."""
    monkeypatch.setattr(containers, "mount_of", lambda _folder: Mount("/", kind))
    with pytest.raises(BadConfiguration) as refused:
        surroundings.check_file_system(tmp_path / ".madsci", lasting=True)
    assert refused.value.status == 78
    assert f"`- ./.madsci:{tmp_path}/.madsci`" in str(refused.value)
    assert ("--ephemeral" in str(refused.value)) == (not kind.startswith("fuse"))
    if not kind.startswith("fuse"):
        surroundings.check_file_system(tmp_path / ".madsci")


@pytest.mark.parametrize(
    ("uid_map", "is_known"),
    [("0 0 4294967295\n", True), ("0 1000 1\n1 100000 65536\n", True), ("0 1000 1\n", False), ("", False)],
)
def test_user_that_is_not_mapped_is_refused(tmp_path: Path, uid_map: str, is_known: bool) -> None:
    """A daemon whose own uid is none of its user namespace ends with 77 and says so, before it makes anything."""
    path = tmp_path / "uid_map"
    path.write_text(uid_map)
    if is_known:
        surroundings.check_user(65534, path)
        return
    with pytest.raises(NoPermission, match="not mapped in its user namespace") as refused:
        surroundings.check_user(65534, path)
    assert refused.value.status == 77


@pytest.fixture
def contained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be in a container whose folders are all its own."""
    monkeypatch.setattr(containers, "is_marked", lambda _env, *_root: True)
    monkeypatch.setattr(containers, "has_own_pids", lambda *_root: True)
    monkeypatch.setattr(containers, "is_container", lambda _env, *_root: True)
    monkeypatch.setattr(containers, "mount_of", lambda _folder: Mount("/", "overlay"))


@pytest.mark.usefixtures("contained")
def test_client_in_a_container_alone_says_what_to_mount(tmp_path: Path) -> None:
    """Autostart is refused with the reason, and the hint is the line of the compose file, for a folder that is not
    there yet too; MADSCI_REGISTRY_AUTOSTART=1 leaves it to the daemon."""
    endpoint = choose(tmp_path / ".madsci/registry.json", None, {"HOME": str(tmp_path)}, tmp_path)
    assert f"{tmp_path}/.madsci is in this container alone (on overlay)" in str(refusal(endpoint, {}))
    assert f"`- ./.madsci:{tmp_path}/.madsci`" in hint(endpoint)
    assert refusal(endpoint, {"MADSCI_REGISTRY_AUTOSTART": "1"}) is None
    (found,) = checks.container(Case(endpoint))
    assert found.level == "warning"
    assert f"`- ./.madsci:{tmp_path}/.madsci`" in str(found.fix)


@pytest.mark.usefixtures("contained")
def test_client_that_names_a_socket_is_told_of_the_sockets_folder(tmp_path: Path) -> None:
    """Where a socket is named, its folder is what containers have to share; for the system's registry /run/madsci."""
    env = {"HOME": str(tmp_path)}
    named = choose(None, tmp_path / "s/x.sock", env, tmp_path)
    assert str(lone_folder(named, env)).startswith(f"{tmp_path}/s is in this container alone")
    system = choose("/var/lib/madsci/registry.json", None, env, tmp_path)
    assert str(lone_folder(system, env)).startswith("/run/madsci is in this container alone")


def test_client_in_a_container_that_mounts_the_folder_names_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contained: None
) -> None:
    """A folder that is mounted is not complained of; what is missing is the service that serves it."""
    monkeypatch.setattr(containers, "mount_of", lambda folder: Mount(str(folder), "ext4"))
    endpoint = choose(tmp_path / ".madsci/registry.json", None, {"HOME": str(tmp_path)}, tmp_path)
    assert "this is a container: run madsci-registryd outside" in str(refusal(endpoint, {}))
    assert hint(endpoint).startswith("docker compose up -d registryd")
    assert [found.level for found in checks.container(Case(endpoint))] == ["ok"]


def test_started_daemon_knows_that_it_is_in_a_container() -> None:
    """A daemon that a client starts keeps the engine's marks, and the leave to go with them; no other setting."""
    env = {"container": "podman", "KUBERNETES_SERVICE_HOST": "x", "MADSCI_REGISTRYD_EPHEMERAL": "true"}
    assert clean_environment({**env, "MADSCI_REGISTRYD_STATE_DIR": "/x"}).items() >= env.items()
    assert "MADSCI_REGISTRYD_STATE_DIR" not in clean_environment({"MADSCI_REGISTRYD_STATE_DIR": "/x"})


# the files


def instructions(stage: str) -> list[str]:
    """Return the instructions of a stage of the Dockerfile, each on a line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    stages = re.split(r"^FROM .* AS (\w+)$", text, flags=re.MULTILINE)
    found = dict(zip(stages[1::2], stages[2::2], strict=True))
    return [" ".join(line.split()) for line in found[stage].splitlines() if line.strip()]


def test_image_of_the_daemon_has_what_a_good_one_has() -> None:
    """The last stage is the daemon's: not as root, a health check, a stop signal, no volume that would hide a missing
    mount, and nothing of the sources but the wheel."""
    assert re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.MULTILINE)[-1] == "registryd"
    words = instructions("registryd")
    kinds = [line.split()[0] for line in words]
    assert words.index("RUN install -d -o 1000 -g 1000 /home/madsci/.madsci") < words.index("USER 1000:1000")
    assert {"LABEL", "ENV", "USER", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"} <= set(kinds)
    assert "VOLUME" not in kinds
    (user,) = [line for line in words if line.startswith("USER")]
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", user)
    assert [line for line in words if line.startswith("COPY")] == [
        "COPY --from=installed /opt/madsci-registryd /opt/madsci-registryd"
    ]


def test_image_of_madsci_installs_into_its_environment_and_stays_root() -> None:
    """MADSci's entrypoint drops root by itself: the stage has one instruction, into the environment it runs."""
    (run,) = instructions("madsci")
    assert 'uv pip install --no-cache --python "${MADSCI_VENV}/bin/python" /wheel/*.whl' in run


@pytest.mark.build
def test_what_the_image_copies_is_enough_for_the_wheel(tmp_path: Path) -> None:
    """The wheel is built from what the Dockerfile copies, less what its .dockerignore leaves out, and holds it all."""
    ignored = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = [word for line in instructions("wheel") if line.startswith("COPY") for word in line.split()[1:-1]]
    assert set(copied) == let_in
    for name in copied:
        source = PROJECT / name
        if source.is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=leave)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / name)
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "wheel", "."]
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    assert {"madsci_registryd/schema.sql", "madsci_registry_dropin.pth", "madsci_registryctl/__main__.py"} <= held


def test_dockerfile_has_no_fault_that_hadolint_finds() -> None:
    """hadolint, where it is installed, finds nothing."""
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([program, str(FILES / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def _compose() -> list[str]:
    """Return the command `docker compose`, or skip the test where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            said = subprocess.run([*command, "version"], capture_output=True, text=True, timeout=60, check=False)
            if said.returncode == 0 and "version 1." not in said.stdout:
                return command
    return pytest.skip("needs docker compose (version 2), the plugin of docker's client or docker-compose")


def config(folder: Path, *files: Path, **variables: str) -> dict[str, Any]:
    """Return what docker compose makes of compose files for a lab in `folder`."""
    options = [word for file in files for word in ("-f", str(file))]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
    command = [*_compose(), "--project-directory", str(folder), *options, "config", "--format", "json"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found["services"]  # type: ignore[no-any-return]


def test_compose_service_is_what_docker_compose_makes_of_it(tmp_path: Path) -> None:
    """The service mounts the lab's folder where MADSci's images have it, shared for SELinux and never made as root; it
    has the pids and the name of the host, the user of the folder, no network, and comes back by itself."""
    service = config(tmp_path, FILES / "compose.yaml", USER_ID="1234", GROUP_ID="5678")["registryd"]
    assert service["user"] == "1234:5678"
    assert (service["pid"], service["uts"], service["network_mode"]) == ("host", "host", "none")
    assert (service["restart"], service["read_only"], service["cap_drop"]) == ("unless-stopped", True, ["ALL"])
    assert service["healthcheck"]["test"] == ["CMD", "registryctl", "--timeout", "5", "status"]
    (mount,) = service["volumes"]
    assert (mount["source"], mount["target"]) == (f"{tmp_path}/.madsci", "/home/madsci/.madsci")
    assert mount["bind"].get("selinux") == "z"
    assert not mount["bind"].get("create_host_path")
    registry = re.search(r"MADSCI_REGISTRYD_REGISTRY=(\S+)", DOCKERFILE)
    assert registry is not None
    assert registry[1] == f"{mount['target']}/registry.json"


def test_compose_service_builds_from_the_checkout(tmp_path: Path) -> None:
    """The build's context is the checkout that REGISTRYD_SOURCE names, its target a stage of the Dockerfile."""
    build = config(tmp_path, FILES / "compose.yaml", REGISTRYD_SOURCE=str(PROJECT))["registryd"]["build"]
    assert (build["context"], build["dockerfile"]) == (str(PROJECT), "containers/Dockerfile")
    assert instructions(build["target"])


MANAGERS = ("lab", "event", "experiment", "resource", "data", "location", "workcell")
NODES = ("liquidhandler_1", "liquidhandler_2", "robotarm_1", "platereader_1", "advanced_example_node")
# In the form of MADSci's example lab: managers with their ids in a list, nodes whose own list takes its place.
SERVICE = """\
x-madsci-service: &madsci-service
  image: ghcr.io/ad-sdl/madsci:latest
  environment: ["USER_ID=${{USER_ID:-1000}}", "GROUP_ID=${{GROUP_ID:-1000}}"]
  network_mode: host
  volumes: ["../../.madsci:/home/madsci/.madsci"]
  restart: unless-stopped
services:
  madsci_ferretdb: {{image: database}}
  {managers}
  {nodes}
"""


def test_override_gives_every_service_of_the_example_lab_the_registry(tmp_path: Path) -> None:
    """With the override every manager and node has our image, the drop-in, the same numeric user, the same folder as
    the daemon, and waits until that is healthy; what the lab's own file says besides is kept."""
    lab = tmp_path / "examples/example_lab"
    lab.mkdir(parents=True)
    managers = [f"{name}_manager: {{<<: *madsci-service, depends_on: [madsci_ferretdb]}}" for name in MANAGERS]
    nodes = [f'{name}: {{<<: *madsci-service, environment: ["NODE_NAME={name}"]}}' for name in NODES]
    text = SERVICE.format(managers="\n  ".join(managers), nodes="\n  ".join(nodes))
    (lab / "compose.yaml").write_text(text)
    override = shutil.copy(FILES / "example_lab.override.yaml", lab / "compose.override.yaml")
    variables = {"REGISTRYD_SOURCE": str(PROJECT), "REGISTRYD_FOLDER": "../../.madsci", "USER_ID": "1234"}
    services = config(lab, lab / "compose.yaml", Path(override), **variables)
    assert services["registryd"]["volumes"][0]["source"] == f"{tmp_path}/.madsci"
    assert services["registryd"]["user"] == "1234:1000"
    for name in [*(f"{name}_manager" for name in MANAGERS), *NODES]:
        service = services[name]
        environment = service["environment"]
        assert environment["MADSCI_REGISTRY_DROPIN"] == "1"
        assert (environment["USER_ID"], environment["GROUP_ID"]) == ("1234", "1000")
        assert service["depends_on"]["registryd"]["condition"] == "service_healthy"
        assert service["image"].endswith("-with-registry")
        assert [mount["source"] for mount in service["volumes"]] == [f"{tmp_path}/.madsci"]
        assert environment.get("NODE_NAME", name) == name
    assert "madsci_ferretdb" in services["lab_manager"]["depends_on"]


def test_lab_of_the_document_is_one_that_docker_compose_takes(tmp_path: Path) -> None:
    """The compose file of docs/containers.md, with the example's .env: daemon and node have one user and one folder."""
    document = (PROJECT / "docs/containers.md").read_text()
    (tmp_path / "compose.yaml").write_text(re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)[0])
    shutil.copy(FILES / "dotenv.example", tmp_path / ".env")
    (tmp_path / "madsci-registryd").symlink_to(PROJECT)
    services = config(tmp_path, tmp_path / "compose.yaml")
    daemon, node = services["registryd"], services["liquidhandler_1"]
    assert daemon["volumes"][0]["source"] == node["volumes"][0]["source"] == f"{tmp_path}/.madsci"
    assert daemon["volumes"][0]["target"] == node["volumes"][0]["target"]
    assert daemon["user"] == f"{node['environment']['USER_ID']}:{node['environment']['GROUP_ID']}"
    assert daemon["build"]["context"] == f"{tmp_path}/madsci-registryd"


def test_variables_of_the_compose_files_are_all_in_the_example() -> None:
    """dotenv.example has every variable of compose.yaml with the default that stands there, and no other."""
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (FILES / "compose.yaml").read_text()))
    shown = dict(re.findall(r"^(\w+)=(.*)$", (FILES / "dotenv.example").read_text(), re.MULTILINE))
    assert shown == used


def test_example_is_appended_to_a_file_without_a_last_newline() -> None:
    """Appended to a .env whose last line has no end, dotenv.example spoils no value: it begins with an empty line."""
    assert (FILES / "dotenv.example").read_text().startswith("\n#")


def test_files_hold_no_secret_and_no_path_of_a_machine() -> None:
    """The files name no home but MADSci's, and no password."""
    for path in FILES.iterdir():
        text = path.read_text()
        assert not re.search(r"/(root|home/(?!madsci\b)\w|work|Users)/", text), path
        assert not re.search(r"(?i)password|secret|token", text), path
