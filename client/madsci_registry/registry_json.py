"""The format of registry.json: what a file says, what an entry may be, and which locks in it are ours.

Pure functions without side effects, safe in every thread; the daemon and registryctl share them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from madsci_registry.errors import RegistryError, TooLargeError
from madsci_registry.loose_json import decode, has_surrogate_escape, is_deep, is_storable
from madsci_registry.names import NAME_MAX_BYTES, check_metadata, is_ulid
from madsci_registry.salvage import FORMAT_VERSION, Fault, salvage
from madsci_registry.types import COMPONENT_TYPES

__all__ = [
    "CLAIM_INSTANCE",
    "FORMAT_VERSION",
    "Document",
    "Fault",
    "entry_fault",
    "instant",
    "is_claim",
    "is_foreign_id",
    "is_id",
    "parse",
]

CLAIM_INSTANCE = "madsci-registryd"
"""How the holder_instance of a claim begins: a lock that the daemon writes on a name so that old programs wait."""
ID_MAX_BYTES = 255
"""Of an id that is no ULID."""
FOREIGN_ID = "id is no ULID: kept as it is"
"""What a report says of an entry whose id MADSci did not make."""

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
_INSTANT = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass
class Document:
    """What a registry.json says."""

    created_at: str | None = None
    entries: dict[str, Any] = field(default_factory=dict)
    """By name; each is an object that can be stored, not necessarily an entry (see `entry_fault`)."""
    faults: list[Fault] = field(default_factory=list)
    """What could not be read."""
    whole: bool = True
    """False: the file is torn, damaged, ambiguous or of another version. Old MADSci reads it wrongly or not at all."""


def parse(content: bytes) -> Document:
    """Read a registry.json, or what can be read of one that is torn or damaged. Never raises; linear in its length.

    `{"entries": {}}` is whole. A value in one entry that cannot be stored (NaN, a lone surrogate, nested too deeply, a
    number that is too large, a key twice) is that entry's fault alone: it is not in `entries`, and the file is whole.
    """
    try:
        text = content.decode()
        document = None if text.startswith(_BOM) else _of_a_plain_file(text)
    except UnicodeDecodeError:
        text, document = content.decode("utf-8", "surrogateescape"), None
    return document or _of_any_file(text)


def _of_a_plain_file(text: str) -> Document | None:
    """Return what a file says in which nothing is out of order, else None: Python's own parser is the quickest."""
    try:
        registry = decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(registry, dict) or not isinstance(registry.get("entries"), dict):
        return None
    entries, created_at = registry["entries"], registry.get("created_at")
    if not _is_ours(registry.get("version", FORMAT_VERSION)):
        return None
    if not all(isinstance(entry, dict) and not is_deep(entry) for entry in entries.values()):
        return None
    if has_surrogate_escape(text) and not is_storable([created_at, entries]):
        return None
    return Document(created_at if isinstance(created_at, str) else None, entries)


def _is_ours(version: Any) -> bool:
    return version == FORMAT_VERSION and not isinstance(version, bool)


def _of_any_file(text: str) -> Document:
    begin = len(_BOM) if text.startswith(_BOM) else 0
    found = salvage(text[begin:])
    if not _is_ours(found.version):
        shown = json.dumps(found.version)[:40] if isinstance(found.version, (str, int, float)) else "no number"
        fault = Fault(None, None, f"the version of its format is {shown}, only {FORMAT_VERSION} can be read")
        return Document(found.created_at, {}, [fault], whole=False)
    faults = list(found.faults())
    if begin:
        faults.insert(0, Fault(1, None, "begins with a byte order mark, which JSON has not"))
    if found.whole and not found.has_entries:
        faults.append(Fault(None, None, "has no entries"))
    whole = found.whole and found.has_entries and not begin
    return Document(found.created_at, found.entries, faults, whole)


def is_claim(lock: object) -> bool:
    """Tell whether the lock of an entry is one that the daemon wrote, and no lock of an old program."""
    instance = lock.get("holder_instance") if isinstance(lock, dict) else None
    return isinstance(instance, str) and instance.startswith(CLAIM_INSTANCE)


def is_foreign_id(entry: Any) -> bool:
    """Tell whether an entry, otherwise sound, has an id that is no ULID."""
    return not is_ulid(entry["id"])


def entry_fault(name: str, entry: object) -> str:
    """Say what is wrong with an entry of registry.json, '' where nothing is.

    Limits for what is new do not bind it: the name may be longer, the metadata larger, the id no ULID.
    """
    return identity_fault(name, entry) or detail_fault(entry)


def identity_fault(name: str, entry: object) -> str:
    """Say why an entry cannot be a component, '' where it can."""
    if not name or len(name.encode("utf-8", "replace")) > 4 * NAME_MAX_BYTES or "\0" in name or not _is_text(name):
        return "name is empty, too long, holds a NUL or is no text"
    if not isinstance(entry, dict):
        return "is no object"
    if not is_id(entry.get("id")):
        return f"id is no ULID and cannot be kept as it is: {_shown(entry.get('id'))}"
    if entry.get("component_type") not in COMPONENT_TYPES:
        return f"component_type is unknown: {_shown(entry.get('component_type'))}"
    for key in ("created_at", "last_seen"):
        if entry.get(key) is not None and instant(entry[key]) is None:
            return f"{key} is no instant: {_shown(entry[key])}"
    return ""


def detail_fault(entry: Any) -> str:
    """Say what of an entry that can be a component cannot be kept beside its identity, '' where all can."""
    try:
        check_metadata(entry.get("metadata") or {})
    except TooLargeError:
        pass  # limits bind what is new
    except RegistryError as error:
        return error.message[:200]
    workcell_id = entry.get("workcell_id")
    if workcell_id is not None and (not isinstance(workcell_id, str) or not _is_text(workcell_id)):
        return "workcell_id is no text"
    if workcell_id is not None and len(workcell_id.encode()) > ID_MAX_BYTES:
        return f"workcell_id has more than {ID_MAX_BYTES} bytes"
    return ""


def is_id(id: object) -> bool:
    """Tell whether an id, a ULID or not, may stay as it is: 1 to 255 bytes of text without control characters."""
    if not isinstance(id, str) or not _is_text(id):
        return False
    return 0 < len(id.encode()) <= ID_MAX_BYTES and not any(c < " " or "\x7f" <= c <= "\x9f" for c in id)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return repr(str(value)[:40].encode("utf-8", "backslashreplace").decode())


def instant(text: Any) -> str | None:
    """Return an ISO 8601 instant as the registry writes it (UTC, microseconds, 'Z'), None where `text` is none."""
    if not isinstance(text, str):
        return None
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        when = when.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
    return when.strftime(_INSTANT) if when.year >= 1000 else None  # below that, text would not sort as time
