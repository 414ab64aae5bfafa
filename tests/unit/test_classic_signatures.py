"""The classic classes have the signatures, defaults and class variables that MADSci's documentation gives them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest

import madsci_registry
from helpers import PROJECT, environment
from madsci_registry import errors, identity_resolver, local_registry, lock_manager, types

TYPES = "Literal['node', 'module', 'manager', 'experiment', 'workcell']"

# As documented for madsci.common.registry 0.8, but for the names of modules in front of types.
DOCUMENTED = {
    "IdentityResolver": {
        "__init__": "(self, lab_url: AnyUrl | None = None, local_registry: LocalRegistryManager | None = None)",
        "lookup": "(self, name: str) -> str | None",
        "release": "(self, name: str) -> None",
        "release_all": "(self) -> None",
        "resolve": f"(self, name: str, component_type: {TYPES}, metadata: dict[str, Any] | None = None,"
        " retry_timeout: float | None = None) -> str",
        "resolve_with_info": f"(self, name: str, component_type: {TYPES}, metadata: dict[str, Any] | None = None,"
        " retry_timeout: float | None = None) -> RegistryResolveResult",
    },
    "LocalRegistryManager": {
        "__init__": "(self, registry_path: Path | None = None, lock_manager: LockManager | None = None)",
        "clean_stale": "(self, older_than_days: int = 7, dry_run: bool = False) -> list[str]",
        "export": "(self) -> dict[str, Any]",
        "get_entry": "(self, name: str) -> RegistryEntry | None",
        "import_entries": "(self, data: dict[str, Any], merge: bool = True) -> None",
        "list_entries": f"(self, component_type: {TYPES} | None = None, include_stale: bool = False)"
        " -> list[tuple[str, RegistryEntry]]",
        "lookup": "(self, name: str) -> str | None",
        "refresh_lock": "(self, name: str) -> None",
        "release": "(self, name: str) -> None",
        "rename": "(self, old_name: str, new_name: str, force: bool = False) -> str",
        "resolve": f"(self, name: str, component_type: {TYPES}, metadata: dict[str, Any] | None = None,"
        " acquire_lock: bool = True, retry_timeout: float | None = None) -> str",
    },
    "LockManager": {
        "__init__": "(self, instance_id: str | None = None, lock_ttl: timedelta | None = None,"
        " heartbeat_interval: int | None = None)",
        "acquire": "(self, entry: RegistryEntry) -> RegistryEntry",
        "can_acquire": "(self, entry: RegistryEntry) -> tuple[bool, str]",
        "create_lock": "(self) -> RegistryLock",
        "refresh": "(self, entry: RegistryEntry) -> RegistryEntry",
        "release": "(self, entry: RegistryEntry) -> RegistryEntry",
        "start_heartbeat": "(self, name: str, registry: LocalRegistryManager)",
        "stop_all_heartbeats": "(self) -> None",
        "stop_heartbeat": "(self, name: str) -> None",
    },
}
METHODS = [(cls, method) for cls, methods in DOCUMENTED.items() for method in methods]


def signature(cls: str, method: str) -> str:
    """Return a method's signature as the documentation writes it."""
    found = inspect.signature(getattr(getattr(madsci_registry, cls), method))
    if "->" not in DOCUMENTED[cls][method]:
        found = found.replace(return_annotation=inspect.Signature.empty)
    # A lab_url may also be given as text, as MADSci's own examples do.
    return str(found).replace("'", "").replace("ComponentType", TYPES).replace("AnyUrl | str", "AnyUrl")


@pytest.mark.parametrize(("cls", "method"), METHODS, ids=lambda part: part)
def test_signature_is_the_documented_one(cls: str, method: str) -> None:
    """Each documented method has the documented parameters, types, defaults and result."""
    assert signature(cls, method) == DOCUMENTED[cls][method].replace(TYPES, "#").replace("'", "").replace("#", TYPES)


@pytest.mark.parametrize("cls", DOCUMENTED)
def test_nothing_public_is_there_beyond_the_documented(cls: str) -> None:
    """A classic class has the documented methods and no others of its own."""
    methods = {name for name, _ in inspect.getmembers(getattr(madsci_registry, cls), inspect.isfunction)}
    assert {name for name in methods if not name.startswith("_")} == set(DOCUMENTED[cls]) - {"__init__"}


def test_class_variables_are_the_documented_ones() -> None:
    """The class variables have the documented names, types and values."""
    manager, holder = madsci_registry.LocalRegistryManager, madsci_registry.LockManager
    assert (manager.FILE_LOCK_TIMEOUT, type(manager.FILE_LOCK_TIMEOUT)) == (5, int)
    assert (holder.HEARTBEAT_INTERVAL, type(holder.HEARTBEAT_INTERVAL)) == (10, int)
    assert timedelta(seconds=30) == holder.LOCK_TTL
    assert local_registry.RETRY_INTERVAL_SECONDS == 2.0


def test_lab_client_is_a_property() -> None:
    """IdentityResolver.lab_client is there without a call, as documented."""
    assert isinstance(inspect.getattr_static(madsci_registry.IdentityResolver, "lab_client"), property)


def test_classes_are_where_madsci_has_them_and_on_top() -> None:
    """Modules are named as in madsci.common.registry and madsci.common.types; all of it is on top, too."""
    on_top: Any = madsci_registry
    assert identity_resolver.IdentityResolver is on_top.IdentityResolver
    assert local_registry.LocalRegistryManager is on_top.LocalRegistryManager
    assert local_registry.RegistryError is on_top.RegistryError is errors.RegistryError
    assert lock_manager.LockManager is on_top.LockManager
    assert lock_manager.RegistryLockError is on_top.RegistryLockError
    for name in ("ComponentType", "RegistryEntry", "RegistryLock", "LocalRegistry", "RegistryResolveResult"):
        assert getattr(types, name) is getattr(on_top, name)
    assert set(dir(on_top)) >= {"ComponentType"}
    assert {*DOCUMENTED, "RegistryLockError", "RegistryEntry", "RegistryResolveResult"} <= set(on_top.__all__)


def test_name_that_there_is_not_is_an_attribute_error() -> None:
    """A misspelt name of the types is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="RegistryEntri"):
        types.RegistryEntri  # type: ignore[attr-defined] # noqa: B018


@pytest.mark.parametrize("cls", [*DOCUMENTED, "RegistryLockError", "RegistryEntry", "RegistryLock"])
def test_public_members_have_docstrings(cls: str) -> None:
    """Every public class, method and property of the classic API says what it does."""
    found = getattr(madsci_registry, cls)
    own = {name: value for name, value in vars(found).items() if not name.startswith("_") and name != "model_config"}
    bare = [n for n, v in own.items() if (inspect.isfunction(v) or isinstance(v, property)) and not inspect.getdoc(v)]
    assert found.__doc__ and not bare


def test_every_documented_member_is_in_the_table_of_differences() -> None:
    """docs/migration.md has a row for each class, method and class variable of the documented API."""
    text = (PROJECT / "docs" / "migration.md").read_text()
    for cls, methods in DOCUMENTED.items():
        section = re.search(rf"^### {cls}\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
        assert section, cls
        rows = set(re.findall(r"`(\w+)(?:\(|`)", "\n".join(re.findall(r"^\| (.*?) \|", section[1], re.MULTILINE))))
        wanted = {cls if method == "__init__" else method for method in methods}
        wanted |= {name for name in vars(getattr(madsci_registry, cls)) if name.isupper()}
        assert rows >= wanted, wanted - rows


ONLY_WHAT_IS_USED = """
import sys
{use}
print([m for m in ("pydantic", "httpx", "zmq") if m in sys.modules])
"""


@pytest.mark.parametrize(
    ("use", "loaded"),
    [
        ("import madsci_registry, madsci_registry.types", []),
        ("from madsci_registry import RegistryClient", ["zmq"]),
        ("from madsci_registry import IdentityResolver as I; I('http://lab').lab_client, I().release('a')", ["zmq"]),
        ("from madsci_registry.types import ComponentType, RegistryEntry", ["pydantic"]),
    ],
)
def test_libraries_are_loaded_by_who_needs_them(use: str, loaded: list[str]) -> None:
    """Pydantic comes with the models, httpx with the first question to a lab, and neither with anything else."""
    done = subprocess.run(
        [sys.executable, "-c", ONLY_WHAT_IS_USED.format(use=use)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == str(loaded)
