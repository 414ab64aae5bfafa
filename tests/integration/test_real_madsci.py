"""Unmodified programs of the real MADSci, from the package index, on our daemon by way of the drop-in.

They and our wheel are in an environment of their own: tests/real_madsci.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from ctl import Ctl
from helpers import _DIES_WITH_PARENT, PATIENCE_S, DaemonProcess, end_daemons_under, until

pytestmark = [pytest.mark.build, pytest.mark.timeout(400)]

MACHINE = 3
"""How much slower than a person's machine a loaded one of CI may be."""
NODE = """
from madsci.node_module.rest_node_module import RestNode

class Arm(RestNode):
    pass

if __name__ == "__main__":
    Arm().start_node()
"""
WHO = "from madsci.common.registry.lock_manager import LockManager\nprint(LockManager.__module__)\n"
OURS, THEIRS = "madsci_registry.lock_manager", "madsci.common.registry.lock_manager"


# a lab


class Lab:
    """A folder in which programs of MADSci run, with a registry; a context manager that ends what it started."""

    def __init__(self, programs: Path, registry: Path) -> None:
        self.programs = programs
        self.registry = registry
        self.folder = registry.parent / "lab"
        self.folder.mkdir()
        (self.folder / "node.py").write_text(NODE)
        (self.folder / "who.py").write_text(WHO)
        self.python = str(programs / "python")
        self._processes = ExitStack()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()
        end_daemons_under(self.registry.parent)

    def environment(self, **extra: str) -> dict[str, str]:
        """Return an environment with this registry and the drop-in, in which nothing of the checkout is found."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MADSCI_"))}
        env = {
            **plain,
            "HOME": str(self.folder),
            "PATH": f"{self.programs}:{plain['PATH']}",
            "MADSCI_REGISTRY_PATH": str(self.registry),
            "MADSCI_REGISTRY_AUTOSTART": "1",
            "MADSCI_REGISTRY_DROPIN": "1",
            "COLUMNS": "200",
            **extra,
        }
        return {key: value for key, value in env.items() if value}

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """Run a program, check that it ended well, and return its stdout. An empty variable is none."""
        done = self.ended(*command, cwd=cwd, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def ended(self, *command: str, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        folder, env, patience_s = cwd or self.folder, self.environment(**env), MACHINE * PATIENCE_S
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=patience_s, check=False
        )

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a Python program that serves; it ends with the lab."""
        log = self._processes.enter_context((self.folder / "served.log").open("ab"))
        process = subprocess.Popen(
            [self.python, "-c", _DIES_WITH_PARENT, *arguments],
            cwd=self.folder,
            env=self.environment(**env),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._processes.callback(_end, process)
        return process

    def get(self, port: int, path: str, process: subprocess.Popen[bytes]) -> Any:
        """Return what a program that starts answers, as soon as it does."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def answer() -> Any:
            assert process.poll() is None, (self.folder / "served.log").read_text()
            try:
                with opener.open(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S) as reply:
                    return json.load(reply)
            except OSError:
                return None

        return until(answer, f"for {path}", MACHINE * PATIENCE_S)

    def node(self, port: int, wait_s: float = 0) -> dict[str, str]:
        """Return the settings of the node `arm`, as a lab's .env would have them."""
        url = f"http://127.0.0.1:{port}/"
        return {"NODE_NAME": "arm", "NODE_URL": url, "NODE_REGISTRY_LOCK_TIMEOUT": str(wait_s)}

    def start_node(self) -> tuple[str, subprocess.Popen[bytes]]:
        """Start the node `arm`, which does not wait for its name; return its ID as its REST server says it."""
        port = _free_port()
        process = self.start("node.py", **self.node(port))
        return self.get(port, "/info", process)["node_id"], process

    def start_manager(self) -> tuple[str, subprocess.Popen[bytes]]:
        """Start the Lab Manager `lab`, which does not wait for its name; return its ID as its REST server says it."""
        port = _free_port()
        env = {
            "LAB_MANAGER_NAME": "lab",
            "LAB_SERVER_URL": f"http://127.0.0.1:{port}/",
            "LAB_REGISTRY_LOCK_TIMEOUT": "0",
        }
        process = self.start("-m", "madsci.squid.lab_server", **env)
        return self.get(port, "/settings", process)["settings"]["manager_id"], process


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, which outlive it
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def lab(installed: Path, registry_path: Path) -> Iterator[Lab]:
    """A lab on a registry that no daemon serves yet."""
    with Lab(installed, registry_path) as made:
        yield made


# nodes and managers


@pytest.mark.parametrize(("start", "name"), [(Lab.start_node, "arm"), (Lab.start_manager, "lab")])
def test_killed_program_has_its_id_at_once_when_it_is_back(
    lab: Lab, start: Callable[[Lab], tuple[str, subprocess.Popen[bytes]]], name: str
) -> None:
    """A real node and a real manager that were killed have the same ID when started again, and wait for nothing."""
    before, process = start(lab)
    assert Ctl(lab.registry)("lookup", name).strip() == before
    process.kill()
    process.wait()
    again, other = start(lab)  # registry_lock_timeout is 0: a name that were not free at once would end it
    assert again == before
    holder = Ctl(lab.registry).json("show", name)["holder"]
    assert holder["pid"] == other.pid


def test_second_instance_of_a_running_node_is_refused(lab: Lab) -> None:
    """A second node of the same name ends with an error that says which process has it, and the first goes on."""
    _, first = lab.start_node()
    second = lab.ended(lab.python, "node.py", env=lab.node(_free_port()))
    assert second.returncode != 0
    assert f"RegistryLockError: 'arm' is held by pid {first.pid} " in " ".join(second.stderr.split())
    assert first.poll() is None


def test_node_without_a_daemon_ends(lab: Lab) -> None:
    """With no daemon, and none that may be started, a node ends with an error within registry_lock_timeout + 5 s."""
    _assert_fails_in_time(lab, MADSCI_REGISTRY_AUTOSTART="0")


def test_node_on_a_daemon_that_hangs_ends(lab: Lab) -> None:
    """With a daemon that does not answer, a node ends with an error within registry_lock_timeout + 5 s."""
    with DaemonProcess(lab.registry) as daemon:
        daemon.signal(signal.SIGSTOP)
        _assert_fails_in_time(lab)


def _assert_fails_in_time(lab: Lab, **env: str) -> None:
    began, wait_s = time.monotonic(), 1.0
    done = lab.ended(lab.python, "node.py", env={**lab.node(_free_port(), wait_s), **env})
    assert time.monotonic() - began < MACHINE * (wait_s + 5)
    assert done.returncode != 0
    assert "RegistryLockError: " in done.stderr


# the command line


def test_commands_of_madsci_work(lab: Lab) -> None:
    """`madsci registry` import, list, resolve, rename, export and clean work through `registryctl dropin`."""

    def madsci(*words: str) -> str:
        command = ("registryctl", "dropin", "--", "madsci", "registry", *words)
        return lab.run(*command, MADSCI_REGISTRY_DROPIN="")

    ulid, registryctl = "01ARZ3NDEKTSV4RRFFQ69G5FAV", Ctl(lab.registry)
    entry = {"id": ulid, "component_type": "node", "last_seen": "2020-01-01T00:00:00Z"}
    (lab.folder / "old.json").write_text(json.dumps({"entries": {"camera": entry}}))
    madsci("import", "old.json", "--force")
    assert registryctl("lookup", "camera").strip() == ulid
    assert [(e["name"], e["id"], e["locked"]) for e in json.loads(madsci("list", "--json"))] == [
        ("camera", ulid, False)
    ]
    assert json.loads(madsci("resolve", "camera", "--json"))["id"] == ulid
    assert ulid in madsci("rename", "camera", "eye")
    madsci("export", "--output", "new.json")
    assert json.loads((lab.folder / "new.json").read_text())["entries"]["eye"]["id"] == ulid
    assert "eye" in madsci("clean", "--older-than", "1", "--force")
    assert "No registry entries" in madsci("list")
    assert registryctl("resolve", "eye", "--type", "node").strip() == ulid


def test_values_are_models_of_madsci(lab: Lab) -> None:
    """What our classes give an unmodified program is MADSci's RegistryEntry, with its methods, and is taken back."""
    (lab.folder / "values.py").write_text("""
from madsci.common.registry import IdentityResolver, LocalRegistryManager, LockManager
from madsci.common.types.base_types import MadsciBaseModel
from madsci.common.types.registry_types import RegistryEntry, RegistryResolveResult

manager = LocalRegistryManager()
assert type(manager).__module__ == "madsci_registry.local_registry"
manager.resolve("arm", "node", {"rack": 3})
entry = manager.get_entry("arm")
assert type(entry) is RegistryEntry and isinstance(entry, MadsciBaseModel) and entry.is_locked()
entry.to_yaml("entry.yaml")
assert RegistryEntry.from_yaml("entry.yaml") == entry
assert type(IdentityResolver().resolve_with_info("eye", "module")) is RegistryResolveResult
own = RegistryEntry(id="01ARZ3NDEKTSV4RRFFQ69G5FAV", component_type="node")
locks = LockManager()
assert locks.release(locks.refresh(locks.acquire(own))).lock is None
manager.import_entries({"entries": {"new": own}})
assert manager.lookup("new") == own.id
""")
    lab.run(lab.python, "values.py")


# who is reached


@pytest.mark.parametrize("options", [("who.py",), ("-m", "who"), ("-E", "who.py"), ("-I", "who.py")], ids=str)
def test_program_is_reached_however_python_is_started(lab: Lab, options: tuple[str, ...]) -> None:
    """A script, `-m`, `-E`, `-I` and a PYTHONPATH, as MADSci's module template sets one, lose nothing."""
    assert lab.run(lab.python, *options, PYTHONPATH=str(lab.folder)) == OURS


def test_program_without_the_variable_has_madscis_own(lab: Lab) -> None:
    """Our wheel in an environment changes nothing by itself."""
    assert lab.run(lab.python, "who.py", MADSCI_REGISTRY_DROPIN="") == THEIRS


def test_line_in_the_env_file_of_the_lab_is_enough(lab: Lab) -> None:
    """A .env above the working folder or MADSCI_SETTINGS_DIR switches it on; the environment has the last word."""
    deeper, elsewhere = lab.folder / "nodes" / "arm", lab.registry.parent / "elsewhere"
    deeper.mkdir(parents=True)
    elsewhere.mkdir()
    (lab.folder / ".env").write_text('LAB_NAME="the lab"\nMADSCI_REGISTRY_DROPIN=1\n')
    who, none = str(lab.folder / "who.py"), {"MADSCI_REGISTRY_DROPIN": ""}
    assert lab.run(lab.python, who, cwd=deeper, **none) == OURS
    assert lab.run(lab.python, who, cwd=elsewhere, **none) == THEIRS
    assert lab.run(lab.python, who, cwd=elsewhere, **none, MADSCI_SETTINGS_DIR=str(deeper)) == OURS
    assert lab.run(lab.python, who, cwd=deeper, MADSCI_REGISTRY_DROPIN="0") == THEIRS


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_are_reached(lab: Lab, method: str) -> None:
    """A child of multiprocessing is reached, in whichever of the three ways it was started."""
    (lab.folder / "pool.py").write_text("""
import multiprocessing, sys

def who(_):
    from madsci.common.registry import LockManager
    return LockManager.__module__

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(*pool.map(who, [0]))
""")
    assert lab.run(lab.python, "pool.py", method) == OURS


def test_uvicorn_workers_are_reached(lab: Lab) -> None:
    """Each worker process of uvicorn is reached."""
    (lab.folder / "app.py").write_text("""
import json, os
from madsci.common.registry import LockManager

async def app(scope, receive, send):
    answer = json.dumps([os.getpid(), LockManager.__module__]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})
""")
    port = _free_port()
    parent = lab.start("-m", "uvicorn", "app:app", "--workers", "2", "--port", str(port), "--lifespan", "off")
    pid, module = lab.get(port, "/", parent)
    assert module == OURS
    assert pid != parent.pid
    parent.terminate()
    parent.wait(PATIENCE_S)


def test_pytest_is_reached(lab: Lab) -> None:
    """Tests of a module are reached, and pytest finds nothing to complain about."""
    test = "def test_who():\n    from madsci.common.registry import LockManager\n    assert LockManager.__module__ == "
    (lab.folder / "test_who.py").write_text(f"{test}{OURS!r}\n")
    assert "1 passed" in lab.run(lab.python, "-m", "pytest", "-q", "-W", "error", "test_who.py")
