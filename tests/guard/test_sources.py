"""What the sources may not hold: paths of a machine, stray clocks, stray environment."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from helpers import PROJECT

FOLDERS = ("client", "daemon", "lab", "tests", "bench", "docs", "systemd")
KINDS = (".py", ".sql", ".md", ".toml", ".json", ".sh", ".service", ".socket", ".timer", ".conf")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (PROJECT / folder).rglob("*")
    if path.is_file() and path.suffix in KINDS and "__pycache__" not in path.parts
) + [PROJECT / name for name in ("pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", ".ci/run", "schema.sql")]
_HOME = re.compile(r"/(root|home/[a-z]\w*|work|Users/\w+)/\w")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_file_names_no_machine(path: Path) -> None:
    """No project file holds a path of somebody's home or build machine."""
    found = [line for line in path.read_text().splitlines() if _HOME.search(line) and "_HOME" not in line]
    assert not found


def _module_files() -> list[Path]:
    return [path for path in FILES if path.suffix == ".py" and path.relative_to(PROJECT).parts[0] in FOLDERS[:3]]


def _attributes(path: Path) -> set[str]:
    """List what a module reads as `name.attribute`."""
    tree = ast.parse(path.read_text())
    return {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


READS_ENVIRONMENT = {
    "madsci_registry/_endpoint.py",  # which registry
    "madsci_registry/_autostart.py",  # whether it may be started, and the environment that it gets
    "madsci_registryd/settings.py",
    "madsci_registry_lab/settings.py",
    "madsci_registryctl/run.py",  # hands its environment on to the command
    "madsci_registryctl/render.py",  # NO_COLOR
    "madsci_registryctl/invocation.py",  # NO_COLOR
}


def test_environment_is_read_in_few_places() -> None:
    """The environment is read in the settings and endpoint modules alone (and handed on by `registryctl run`)."""
    readers = {
        str(Path(*path.parts[-2:])) for path in _module_files() if {"os.environ", "os.getenv"} & _attributes(path)
    }
    assert readers - READS_ENVIRONMENT == set()


def test_client_starts_its_threads_in_one_place() -> None:
    """The client starts no threading.Thread: a Ctrl-C in its start() can look as if it had not started (_threads)."""
    users = {
        path.name
        for path in _module_files()
        if path.parent.name == "madsci_registry"
        and {"threading.Thread", "_thread.start_new_thread"} & _attributes(path)
    }
    assert users == {"_threads.py"}


@pytest.mark.parametrize("package", ["madsci_registryd", "madsci_registry_lab"])
def test_servers_take_time_from_their_clock(package: str) -> None:
    """Daemon and lab each read wall and monotonic time in one module, so that tests can turn them."""
    clocks = {"time.time", "time.monotonic", "time.time_ns", "time.monotonic_ns", "datetime.now", "datetime.utcnow"}
    readers = {path.name for path in _module_files() if path.parent.name == package and clocks & _attributes(path)}
    assert readers <= {"clock.py"}


def test_lab_has_sql_in_its_store_alone() -> None:
    """No module of the lab but its SQLite store holds SQL, so that another store can stand behind the same routes."""
    sql = re.compile(r"\b(SELECT .* FROM|INSERT (OR \w+ )?INTO|DELETE FROM|UPDATE \w+ SET)\b")
    found = {path.name for path in (PROJECT / "lab").rglob("*.py") if sql.search(path.read_text())}
    assert found
    assert all(name.startswith("sqlite_") for name in found)
