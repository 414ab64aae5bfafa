"""`rollback`: the way back to old MADSci, for a registry that nobody serves.

A claim keeps old programs away from a name for hours, also after the daemon's death. This clears the claims and leaves
all else of registry.json as it is. It needs no database: that may be missing or damaged.
"""

from __future__ import annotations

import json
from typing import Any

from madsci_registry import registry_json
from madsci_registryd import offline
from madsci_registryd.faults import CannotCreate, CorruptDatabase, StartFault, os_fault
from madsci_registryd.registry_file import FileFault, LockTimeout, RegistryFile
from madsci_registryd.settings import Places, Settings

LOCK_WAIT_S = 10.0
"""Old programs hold the file's lock for as long as they write it."""


def clear_claims(settings: Settings) -> list[str]:
    """Clear every claim in registry.json and return the names that had one; none where there is no file.

    Raises: StartFault where a daemon serves the registry, or the file cannot be read or written; it is as it was.
    """
    places = Places(settings)
    if not places.registry.parent.is_dir():
        return []
    try:
        places.state.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise os_fault(error, str(places.state)) from error
    with offline.locked(places):
        try:
            return _clear_file(RegistryFile(places.registry))
        except FileFault as fault:
            raise CannotCreate(str(fault), path=str(places.registry)) from fault
        except LockTimeout as timeout:
            raise StartFault(f"{timeout}; try again", path=str(places.registry)) from timeout


def _clear_file(file: RegistryFile) -> list[str]:
    try:
        if file.stamp() is None:
            return []
        with file.locked(LOCK_WAIT_S):
            return _clear(file)
    finally:
        file.close()


def _clear(file: RegistryFile) -> list[str]:
    found = file.read()
    if found is None:
        return []
    registry = _registry(found[0], file)
    claimed = [
        name
        for name, entry in registry["entries"].items()
        if isinstance(entry, dict) and registry_json.is_claim(entry.get("lock"))
    ]
    for name in claimed:
        registry["entries"][name]["lock"] = None
    if claimed:
        file.write([json.dumps(registry, indent=2).encode()])
    return claimed


def _registry(content: bytes, file: RegistryFile) -> dict[str, Any]:
    document = registry_json.parse(content)
    reason = str(document.faults[0]) if document.faults else "cannot be read"
    if document.whole:
        try:  # not the document: what it calls a fault of one entry is left as it is, too
            registry: dict[str, Any] = json.loads(content)
            return registry
        except (ValueError, RecursionError) as error:
            reason = str(error)
    raise CorruptDatabase(
        f"{file.path} is not whole ({reason}); it was left as it is. Starting the daemon once puts it aside and writes "
        f"it anew from the database; then roll back again",
        path=str(file.path),
    )
