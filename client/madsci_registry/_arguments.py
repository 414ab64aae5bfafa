"""What a caller may hand to a RegistryClient, checked before anything is sent."""

from __future__ import annotations

import math
from typing import Any

from madsci_registry.errors import InvalidError
from madsci_registry.names import check_metadata
from madsci_registry.types import COMPONENT_TYPES, ComponentType

Item = tuple[str, ComponentType] | tuple[str, ComponentType, "dict[str, Any] | None"]
"""One name of a resolve_many: (name, component_type) or (name, component_type, metadata)."""


def item(name: str, component_type: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a resolve says of one name. Raises InvalidError, TooLargeError."""
    checked: dict[str, Any] = {"name": text(name, "name"), "component_type": component_type}
    if component_type not in COMPONENT_TYPES:
        reason = f"must be one of {', '.join(COMPONENT_TYPES)}, not {component_type!r}"
        raise InvalidError(f"component_type: {reason}", field="component_type", reason=reason)
    if metadata is not None:
        check_metadata(metadata)
        checked["metadata"] = metadata
    return checked


def text(value: object, field: str) -> str:
    """Return `value` if it is text. Raises InvalidError."""
    # What a name may be is for the daemon to say: an old one stays resolvable whatever it is.
    if not isinstance(value, str):
        reason = f"must be text, not {type(value).__name__}"
        raise InvalidError(f"{field}: {reason}", field=field, reason=reason)
    return value


def seconds(value: object, field: str, *, least: float) -> float:
    """Return `value` if it is a number of seconds, at least `least`. Raises InvalidError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < least:
        reason = f"must be a number of seconds, at least {least:g} (math.inf: for ever), not {value!r}"
        raise InvalidError(f"{field}: {reason}", field=field, reason=reason)
    return float(value)
