"""The models of the classic API: made, changed, compared and written as MADSci's are."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from classic import OTHER_ULID, ULID
from madsci_registry import LocalRegistry, RegistryEntry, RegistryLock, RegistryResolveResult
from madsci_registry.classic_types import entries_of, entry_of
from madsci_registry.names import is_ulid
from madsci_registry.types import Component


def lock(expires_in_s: float = 30.0, **fields: Any) -> RegistryLock:
    now = datetime.now(timezone.utc)
    given: dict[str, Any] = {"holder_pid": 7, "holder_host": "lab1", "acquired_at": now, "heartbeat_at": now}
    return RegistryLock(**{**given, "expires_at": now + timedelta(seconds=expires_in_s), **fields})


def test_entry_needs_only_id_and_type() -> None:
    """An entry made of id and type was created and seen now, has no metadata, no lock and no workcell."""
    began = datetime.now(timezone.utc)
    entry = RegistryEntry(id=ULID, component_type="node")
    assert (entry.metadata, entry.lock, entry.workcell_id) == ({}, None, None)
    assert began <= entry.created_at <= entry.last_seen <= datetime.now(timezone.utc)
    assert entry.created_at.tzinfo is not None


@pytest.mark.parametrize(
    "wrong", [{"id": 5}, {"component_type": "robot"}, {"metadata": 1}, {"created_at": "never"}, {"lock": {"a": 1}}]
)
def test_entry_is_validated(wrong: dict[str, Any]) -> None:
    """What cannot be an entry is refused when it is made, with pydantic's ValidationError."""
    with pytest.raises(ValidationError):
        RegistryEntry(**{"id": ULID, "component_type": "node", **wrong})


def test_metadata_may_have_keys_that_are_no_text() -> None:
    """Metadata is a dict as MADSci's: keys of other types are taken in, and are text in JSON; deep copies are equal."""
    entry = RegistryEntry(id=ULID, component_type="node", metadata={1: "x"})
    assert entry.metadata == {1: "x"} and entry.model_dump(mode="json")["metadata"] == {"1": "x"}
    assert copy.deepcopy(entry) == entry and copy.copy(entry) == entry


def test_assignment_is_validated_and_unknown_fields_are_dropped() -> None:
    """An entry stays an entry when it is assigned to; fields that it does not have are dropped."""
    entry = RegistryEntry(id=ULID, component_type="node", colour="red")
    assert "colour" not in entry.model_dump()
    with pytest.raises(ValidationError):
        entry.component_type = "robot"  # type: ignore[assignment]
    given: Any = lock().model_dump()
    entry.lock = given
    assert isinstance(entry.lock, RegistryLock)


def test_locked_until_it_expires() -> None:
    """An entry is locked while its lock has not expired; whose lock it is does not expire."""
    entry = RegistryEntry(id=ULID, component_type="node")
    assert not entry.is_locked() and not entry.is_locked_by("me")
    entry.lock = lock(30, holder_instance="me")
    assert entry.is_locked() and entry.is_locked_by("me") and not entry.is_locked_by("you")
    entry.lock = lock(-1, holder_instance="me")
    assert not entry.is_locked() and entry.is_locked_by("me")


def test_instant_without_a_zone_is_utc() -> None:
    """A lock whose instants have no time zone can be asked, and counts as UTC."""
    now = datetime.now(timezone.utc)
    ahead = (now + timedelta(hours=1)).replace(tzinfo=None)
    assert RegistryEntry(id=ULID, component_type="node", lock=lock(expires_at=ahead)).is_locked()
    assert not RegistryEntry(id=ULID, component_type="node", lock=lock(expires_at=now.replace(tzinfo=None))).is_locked()


def test_lock_needs_holder_and_instants() -> None:
    """A lock must say pid, host and its three instants; without an instance it is one of its own."""
    with pytest.raises(ValidationError) as refused:
        RegistryLock()  # type: ignore[call-arg]
    missing = {error["loc"][0] for error in refused.value.errors()}
    assert missing == {"holder_pid", "holder_host", "acquired_at", "heartbeat_at", "expires_at"}
    assert is_ulid(lock().holder_instance) and lock().holder_instance != lock().holder_instance


def test_models_come_back_from_json_as_equal() -> None:
    """model_dump, model_dump_json and model_validate are there, and what comes back is equal to what went."""
    entry = RegistryEntry(id=ULID, component_type="node", metadata={"x": [1]}, lock=lock())
    registry = LocalRegistry(entries={"arm": entry})
    assert LocalRegistry.model_validate_json(registry.model_dump_json()) == registry
    assert LocalRegistry.model_validate(registry.model_dump()) == registry
    assert LocalRegistry.model_validate(json.loads(json.dumps(registry.model_dump(mode="json")))) == registry
    assert registry.model_dump(mode="json")["entries"]["arm"]["lock"]["expires_at"].endswith("Z")
    assert pickle.loads(pickle.dumps(entry)) == entry
    assert entry.model_copy(update={"id": "x"}) != entry


def test_entry_shows_who_holds_it_old_programs_too() -> None:
    """A held component is an entry whose lock lasts lock_ttl from now; an old program's lock is what that one wrote."""
    wire: dict[str, Any] = {"name": "arm", "id": ULID, "component_type": "node", "state": "held", "locked": True}
    wire |= {"fencing_token": None, "metadata": {}, "holder": None, "waiting": 0}
    wire |= dict.fromkeys(("created_at", "last_seen"), "2026-01-01T00:00:00.000000Z")
    theirs = lock(holder_instance="old")
    old = entry_of(Component.from_wire(wire | {"old_lock": theirs.model_dump(mode="json")}), timedelta(minutes=1))
    assert old.lock == theirs and old.is_locked()
    holder = {"pid": None, "uid": 0, "gid": 0, "proof": "pidfd", "host": "lab1", "session": "s", "instance": "new"}
    new = entry_of(Component.from_wire(wire | {"holder": holder | {"since": wire["created_at"]}}), timedelta(minutes=1))
    assert new.lock is not None and new.is_locked_by("new") and new.lock.holder_pid == 0
    assert new.lock.expires_at - new.lock.heartbeat_at == timedelta(minutes=1)


def test_registry_and_result_have_their_defaults() -> None:
    """An empty registry is version 1; a result is local and not new unless it says so."""
    assert (LocalRegistry().version, LocalRegistry().entries) == (1, {})
    result = RegistryResolveResult(name="arm", id=ULID, component_type="node")
    assert (result.is_new, result.source) == (False, "local")


def test_other_ulids_of_an_export_are_handed_on() -> None:
    """The other ULIDs of a component, which the daemon's export has and MADSci's models drop, go into an import."""
    entry = {"id": ULID, "component_type": "node", "other_ids": [OTHER_ULID]}
    data = {"entries": {"arm": entry, "leg": {"id": OTHER_ULID, "component_type": "node"}}}
    entries = entries_of(data, may_lack=True)
    assert entries["arm"]["other_ids"] == [OTHER_ULID] and "other_ids" not in entries["leg"]
    assert entries_of(LocalRegistry.model_validate(data), may_lack=True)["arm"]["id"] == ULID
