"""What a user sees is exported, documented, and cheap to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import madsci_registry
from helpers import PROJECT, environment
from madsci_registry import errors, types

SOURCES = sorted(path for part in ("client", "daemon", "lab") for path in PROJECT.glob(f"{part}/**/*.py"))
TESTS = sorted(PROJECT.glob("tests/**/test_*.py"))


def test_exports_are_complete() -> None:
    """Every name in __all__ exists, and every error class and value type can be imported from the package."""
    for name in madsci_registry.__all__:
        assert getattr(madsci_registry, name) is not None
    wanted = {"RegistryClient", "Registration", "RegistryError", *(cls.__name__ for cls in errors.BY_CODE.values())}
    assert wanted - set(madsci_registry.__all__) == set()
    for name in ("Component", "Holder", "Event", "SessionInfo", "ImportReport"):
        assert getattr(madsci_registry, name) is getattr(types, name)


def test_errors_say_where_they_are_public() -> None:
    """Every code has one class, and every class comes back from the wire as itself."""
    for code, cls in errors.BY_CODE.items():
        again = errors.from_wire(cls("why").to_wire())
        assert type(again) is cls
        assert again.code == code


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_public_objects_have_docstrings(path: Path) -> None:
    """Every public module, class and function has a docstring (a method or error class whose name says all may not)."""
    tree = ast.parse(path.read_text())
    bare = [] if ast.get_docstring(tree) or path.name == "__init__.py" else ["the module"]
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node) and path.name != "errors.py":
            bare.append(node.name)
    assert not bare, f"without docstring: {', '.join(bare)}"


@pytest.mark.parametrize("name", ["RegistryClient", "Registration"])
def test_client_methods_have_docstrings(name: str) -> None:
    """Every public method and property of the client has a docstring."""
    bare = [
        member
        for member, value in vars(getattr(madsci_registry, name)).items()
        if not member.startswith("_") and (callable(value) or isinstance(value, property)) and not inspect.getdoc(value)
    ]
    assert not bare


@pytest.mark.parametrize("path", TESTS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_tests_state_their_fact(path: Path) -> None:
    """Every test says in its docstring what is so."""
    assert [name for name, doc in _tests(path) if not doc] == []


def _tests(path: Path) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, ast.get_docstring(node)


def test_client_imports_no_validator_no_daemon_and_no_sqlite() -> None:
    """Importing the package and its client class loads neither pydantic, apsw, sqlite3 nor the daemon."""
    program = (
        "import sys; from madsci_registry import RegistryClient, errors;"
        "print([m for m in ('pydantic', 'apsw', 'sqlite3', 'madsci_registryd', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_command_line_imports_no_daemon() -> None:
    """Registryctl loads neither the daemon nor SQLite nor, for a start, rich."""
    program = (
        "import sys; import madsci_registryctl.__main__;"
        "print([m for m in ('pydantic', 'apsw', 'sqlite3', 'madsci_registryd', 'rich', 'zmq') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_entry_points_exist() -> None:
    """The commands of the distribution have a main()."""
    for module in ("madsci_registryd.__main__", "madsci_registryctl.__main__", "madsci_registry_lab.__main__"):
        assert callable(importlib.import_module(module).main)
