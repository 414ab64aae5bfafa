"""registry.json as a real daemon writes it: whole at every instant, as MADSci would write it, and in nobody's way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from exports import MANY, leftovers, lookups_beside_a_large_file, read_while_killed, share, write_many
from helpers import PATIENCE_S, DaemonProcess, until
from madsci_registry import RegistryClient
from madsci_registry.errors import NoSpaceError
from rounds import fresh_seed, spread_ms

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (chown, mount)")
STRANGER = 65533
"""A uid and gid of nobody's."""


# never torn


def test_readers_without_a_lock_never_see_a_broken_file(daemon: DaemonProcess) -> None:
    """Readers that take no lock find a whole file, which only grows, while the daemon is killed under a load of new
    names and started again; every name that was answered is in it, and what a killed write left is swept."""
    seen = read_while_killed(daemon, kills=12, seed=fresh_seed())
    print(f"{seen.reads} reads of {seen.versions} files, {seen.made} names, {seen.left} kills left a temporary file")
    assert seen.broken == []
    assert seen.unswept == set()
    assert seen.missing == set()
    assert seen.versions > 12


def test_start_sweeps_what_a_killed_write_left(daemon: DaemonProcess) -> None:
    """A daemon that starts removes the temporary files of writes that were killed, and nothing else."""
    daemon.kill()
    left = daemon.registry.with_name("registry.json.0123456789ab.tmp")
    others = [daemon.registry.with_name(name) for name in ("registry.json.tmp", "other.json.0123456789ab.tmp")]
    for path in (left, *others):
        path.write_text("{")
    daemon.start()
    assert leftovers(daemon.registry) == set()
    assert all(path.exists() for path in others)


# whose it is


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@AS_ROOT
def test_owner_group_and_mode_stay_over_writes(open_folder: Path) -> None:
    """A registry.json of another user, in that user's folder, keeps owner, group and mode over the daemon's writes."""
    registry = open_folder / "registry.json"
    os.chown(open_folder, STRANGER, STRANGER)
    registry.write_text('{"entries": {}}')
    os.chown(registry, STRANGER, STRANGER - 1)
    registry.chmod(0o640)
    with DaemonProcess(registry) as daemon, RegistryClient(registry, autostart=False) as client:
        client.resolve("arm", "node")
        found = registry.stat()
        assert "arm" in registry.read_text()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (STRANGER, STRANGER - 1, 0o640)
        daemon.restart()
        client.resolve("camera", "node")
        found = registry.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (STRANGER, STRANGER - 1, 0o640)


@AS_ROOT
def test_lock_file_is_usable_by_who_may_use_the_folder(open_folder: Path) -> None:
    """A user who may write the folder by its group takes the file lock that the daemon made, and writes the file; its
    name is taken in."""
    registry = open_folder / "registry.json"
    os.chown(open_folder, 0, STRANGER)
    open_folder.chmod(0o2770)
    program = textwrap.dedent("""
        import fcntl, json, sys
        with open(sys.argv[1] + ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(sys.argv[1]) as file:
                registry = json.load(file)
            entry = {"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "component_type": "node"}
            registry["entries"]["camera"] = entry
            with open(sys.argv[1], "w") as file:
                json.dump(registry, file)
    """)
    with DaemonProcess(registry), RegistryClient(registry, autostart=False) as client:
        client.resolve("arm", "node")
        command = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
        done = subprocess.run(
            [*command, sys.executable, "-I", "-c", program, str(registry)], capture_output=True, text=True, check=False
        )
        if done.returncode in (126, 127) or "setpriv" in done.stderr:
            pytest.skip("this machine's Python may not be run by another user")
        assert done.returncode == 0, done.stderr
        until(lambda: client.lookup("camera") == "01ARZ3NDEKTSV4RRFFQ69G5FAV", "for the name to be taken in")


# what MADSci would write

SEQUENCE = """
import json, sys
from pathlib import Path
from madsci.common.registry import LocalRegistryManager

path = Path(sys.argv[1])
manager = LocalRegistryManager(registry_path=path)
manager.resolve("arm", "node", {"rack": 3, "where": "caf\\u00e9", "deep": {"list": [1, 2.5, None, True, "x"]}})
manager.resolve("camera", "module", acquire_lock=False)
manager.resolve("camera", "module", {"lens": "wide"}, acquire_lock=False)
manager.resolve("lab", "manager")
manager.release("lab")
manager.resolve("run", "experiment", {"n": 1})
manager.release("run")
manager.rename("run", "r\\u00fcn 2")
manager.resolve("cell", "workcell", acquire_lock=False)
entry = {"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "component_type": "node", "workcell_id": "01ARZ3NDEKTSV4RRFFQ69G5FAW"}
manager.import_entries({"entries": {"old": entry}})
manager.import_entries({"entries": {"old": {**entry, "id": "01ARZ3NDEKTSV4RRFFQ69G5FAX"}}})
print(type(manager).__module__, flush=True)
sys.stdin.read()
"""
VALIDATE = """
import json, sys
from madsci.common.types.registry_types import LocalRegistry
with open(sys.argv[1]) as file:
    data = json.load(file)
model = LocalRegistry.model_validate(data)
print(json.dumps([model.model_dump(mode="json") == data, sorted(n for n, e in model.entries.items() if e.is_locked())]))
"""


def shape(value: Any, key: str = "") -> Any:
    """Return a value with what differs from run to run replaced by its format."""
    if isinstance(value, dict):
        return {k: shape(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", value):
        return "an instant"
    if key == "id" and isinstance(value, str) and re.fullmatch(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", value):
        return value if value.startswith("01ARZ3NDEK") else "a ULID"
    return type(value).__name__ if key in ("holder_pid", "holder_instance") else value


def python_of(programs: Path, dropin: bool, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start MADSci's Python, with its own registry or with ours in its place."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MADSCI_"))}
    env |= {"MADSCI_REGISTRY_DROPIN": "1" if dropin else "0", "MADSCI_REGISTRY_AUTOSTART": "0", "COLUMNS": "200"}
    pipe = subprocess.PIPE
    command = [str(programs / "python"), *map(str, arguments)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env, cwd=programs)


def said(process: subprocess.Popen[str]) -> str:
    """Let a program end; return its stdout."""
    out, err = process.communicate(timeout=4 * PATIENCE_S)
    assert process.returncode == 0, err
    return out


@pytest.mark.build
@pytest.mark.timeout(400)
def test_file_is_what_madsci_would_write(installed: Path, daemon: DaemonProcess) -> None:
    """After the same calls the file has the same fields, types and formats as MADSci's own: its model reads ours and
    would write the same again, and its command line lists it."""
    theirs_path = daemon.registry.with_name("theirs.json")
    running = [
        python_of(installed, dropin, "-c", SEQUENCE, path)
        for dropin, path in ((False, theirs_path), (True, daemon.registry))
    ]
    modules = [process.stdout.readline().strip() for process in running if process.stdout]
    assert modules == ["madsci.common.registry.local_registry", "madsci_registry.local_registry"], [
        process.communicate()[1] for process in running
    ]
    theirs = json.loads(theirs_path.read_text())
    with RegistryClient(daemon.registry, autostart=False) as client:
        assert client.get("arm").locked
    assert daemon.terminate() == 0  # with it go the claims on what nobody holds, which are kept for 10 s otherwise
    ours = json.loads(daemon.registry.read_text())
    for process in running:
        said(process)
    assert shape(ours) == shape(theirs)
    assert list(ours) == list(theirs)

    same, locked = json.loads(said(python_of(installed, False, "-c", VALIDATE, daemon.registry)))
    assert (same, locked) == (True, ["arm"])
    madsci = (installed / "madsci", "registry", "--registry-path", daemon.registry, "list", "--include-stale", "--json")
    listed = json.loads(said(python_of(installed, False, *madsci)))
    assert {entry["name"]: (entry["id"], entry["locked"]) for entry in listed} == {
        name: (entry["id"], name == "arm") for name, entry in ours["entries"].items()
    }


# in nobody's way


@pytest.mark.timeout(300)
def test_lookups_go_on_beside_a_large_file(registry_path: Path) -> None:
    """With 10,000 names lookups are answered while the file is written, and while an old program rewrites all of it."""
    write_many(registry_path)
    with DaemonProcess(registry_path) as daemon:
        taken = lookups_beside_a_large_file(daemon, seconds=3.0)
        with RegistryClient(registry_path, autostart=False) as client:
            assert client.status()["names"] == MANY
    assert min(taken.exported, taken.rewritten) >= 3
    for times in (taken.exports, taken.rewrites):
        print(spread_ms(times))
        assert share(times, 0.99) < 0.050
        assert max(times) < 0.500


def test_export_off_writes_nothing(registry_path: Path) -> None:
    """With `--no-export` there is no registry.json and no lock file, one that is there stays as it is, and status and
    doctor say so."""
    with (
        DaemonProcess(registry_path, "--no-export") as daemon,
        RegistryClient(registry_path, autostart=False) as client,
    ):
        client.resolve("arm", "node")
        assert client.status()["export"] == {"state": "off"}
        assert list(registry_path.parent.glob("registry.json*")) == []
        registry_path.write_text('{"entries": {"camera": 1')
        daemon.restart()
        client.resolve("camera", "node")
        assert registry_path.read_text() == '{"entries": {"camera": 1'
        assert list(registry_path.parent.glob("registry.json*")) == [registry_path]


# a full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a file system of 1 MB."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("this machine does not let us mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def fill(ballast: Path) -> None:
    """Write a file until there is no room left."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


@AS_ROOT
def test_full_disk_under_the_file_refuses_new_names_only(small_disk: Path, registry_path: Path) -> None:
    """Where the disk of registry.json is full, what is known or claimed is served, new names are `no_space`, and the
    old file stays whole; with room again the same daemon goes on and writes the file."""
    registry, state = small_disk / "registry.json", registry_path.parent
    daemon = DaemonProcess(registry, "--state-dir", str(state))
    daemon.log_path = state / "daemon.log"
    daemon.socket = state / "run" / "registry.sock"
    daemon.lifeline = daemon.socket.with_suffix(".life")
    with daemon, RegistryClient(socket=daemon.socket, autostart=False) as client:
        held = client.resolve("arm", "node")
        known = client.resolve("camera", "node", {"note": "x" * 8000}, acquire_lock=False).id
        ballast = small_disk / "ballast"
        fill(ballast)
        before = registry.read_bytes()
        for _ in range(3):
            with pytest.raises(NoSpaceError):
                client.resolve("new", "node")
        assert held.held and client.lookup("camera") == known
        held.release()
        assert client.resolve("arm", "node").id == held.id
        client.set_metadata("arm", {"rack": 4})
        until(lambda: client.status()["export"]["state"] == "failing", "for status to tell")
        assert registry.read_bytes() == before
        assert leftovers(registry) == set()
        ballast.unlink()
        made = client.resolve("new", "node", wait=0)
        until(lambda: client.status()["export"]["state"] == "on", "for the file to be written")
        until(lambda: json.loads(registry.read_bytes())["entries"]["arm"]["metadata"] == {"rack": 4}, "for the rest")
        assert json.loads(registry.read_bytes())["entries"]["new"]["id"] == made.id
        assert client.status()["degraded"] == []
        assert client.status()["pid"] == daemon.pid
