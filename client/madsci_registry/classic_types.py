"""The values of MADSci's classic registry API, as pydantic models; the only pydantic of the client.

Loaded by whoever asks `madsci_registry` or `madsci_registry.types` for one of them, and by nobody else: a plain resolve
needs no validator, and importing one takes longer than everything else of a client.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from pydantic import AnyUrl, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError
from ulid import ULID

from madsci_registry.errors import InvalidError
from madsci_registry.types import Component, ComponentType

__all__ = ["AnyUrl", "LocalRegistry", "RegistryEntry", "RegistryLock", "RegistryResolveResult"]


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _new_id() -> str:
    return str(ULID())


class _Model(BaseModel):
    """Validated when made and when assigned to, as in MADSci; unknown fields are dropped."""

    model_config = ConfigDict(validate_assignment=True, validate_default=True)


class RegistryLock(_Model):
    """A lock as an entry shows it: a snapshot, which no longer changes when the registry does."""

    holder_pid: int = Field(description="Process id of the holder, in the daemon's PID namespace; 0: not visible.")
    holder_host: str = Field(description="Name of the holder's host.")
    holder_instance: str = Field(default_factory=_new_id, description="Which LockManager or client of that process.")
    acquired_at: datetime = Field(description="When the lock was granted.")
    heartbeat_at: datetime = Field(description="When the holder was last known to live: for a snapshot, its instant.")
    expires_at: datetime = Field(description="Until when the snapshot passes for locked; real locks do not expire.")


class RegistryEntry(_Model):
    """A component as the registry knew it at one instant."""

    id: str = Field(description="Its ULID.")
    component_type: ComponentType = Field(description="node, module, manager, experiment or workcell.")
    created_at: datetime = Field(default_factory=_now, description="When its name was first resolved.")
    last_seen: datetime = Field(default_factory=_now, description="When it was last resolved, or its lock ended.")
    metadata: dict[Any, Any] = Field(default_factory=dict, description="What else is known of it; keys become text.")
    lock: RegistryLock | None = Field(default=None, description="Who holds it; None: nobody.")
    workcell_id: str | None = Field(default=None, description="The workcell that it belongs to, where that was said.")

    def is_locked(self) -> bool:
        """Tell whether the entry has a lock that has not expired; an instant without a time zone counts as UTC."""
        if self.lock is None:
            return False
        until = self.lock.expires_at
        return (until if until.tzinfo else until.replace(tzinfo=timezone.utc)) > _now()

    def is_locked_by(self, instance_id: str) -> bool:
        """Tell whether the entry's lock, expired or not, is that instance's."""
        return self.lock is not None and self.lock.holder_instance == instance_id


class LocalRegistry(_Model):
    """A whole registry, in the format of registry.json."""

    version: int = Field(default=1, description="Of the format.")
    created_at: datetime = Field(default_factory=_now, description="When the registry was made.")
    updated_at: datetime = Field(default_factory=_now, description="When it last changed.")
    entries: dict[str, RegistryEntry] = Field(default_factory=dict, description="Components by name.")


class RegistryResolveResult(_Model):
    """What a resolve gave."""

    name: str = Field(description="The name that was resolved.")
    id: str = Field(description="Its ULID.")
    component_type: ComponentType = Field(description="As the registry has it, whatever was asked for.")
    is_new: bool = Field(default=False, description="True: this very resolve made the ULID.")
    source: str = Field(default="local", description="local: known here; lab: the lab knew it; new: made here.")


def entry_of(component: Component, lock_ttl: timedelta) -> RegistryEntry:
    """Return a component as an entry; where it is held, the entry passes for locked for `lock_ttl` from now.

    The lock of an old program is what that program wrote.
    """
    holder, now = component.holder, _now()
    lock: dict[str, Any] | None = component.old_lock.to_json() if component.old_lock else None
    if holder is not None:
        lock = {
            "holder_pid": holder.pid or 0,
            "holder_host": holder.host,
            "holder_instance": holder.instance,
            "acquired_at": holder.since,
            "heartbeat_at": now,
            "expires_at": now + lock_ttl,
        }
    fields = ("id", "component_type", "created_at", "last_seen", "metadata", "workcell_id")
    return RegistryEntry.model_validate({field: getattr(component, field) for field in fields} | {"lock": lock})


def entries_of(data: Any, *, may_lack: bool) -> dict[str, Any]:
    """Return the entries of a whole registry as JSON objects, by name.

    Args:
        data: in the format of registry.json, instants as text or datetime, entries as objects or RegistryEntry.
        may_lack: True: without "entries" there are none.

    Raises:
        InvalidError: it is no registry, or has no "entries".
    """
    try:
        registry = LocalRegistry.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "data"
        raise InvalidError(f"{field}: {first['msg']}", field=field, reason=first["msg"]) from None
    if "entries" not in registry.model_fields_set and not may_lack:
        raise InvalidError("data: has no entries", field="data", reason="has no entries")
    try:
        entries: dict[str, Any] = registry.model_dump(mode="json")["entries"]
    except PydanticSerializationError as error:
        raise InvalidError(f"entries: {error}", field="entries", reason=str(error)) from None
    given = data.get("entries", {}) if isinstance(data, dict) else {}
    for name, entry in given.items():
        if isinstance(entry, dict) and "other_ids" in entry:  # not in MADSci's models, but in the daemon's export
            entries[name]["other_ids"] = entry["other_ids"]
    return entries
