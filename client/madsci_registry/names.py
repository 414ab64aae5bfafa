"""What a name, a ULID and a component's metadata may be.

Pure functions without side effects, safe in every thread; the client checks early with them, the daemon checks again.
Limits bind what is new: what an old file brought in stays resolvable (`design: bad input`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from madsci_registry.errors import InvalidError, TooLargeError

# A file name's limit on every common file system: a name can always become one.
NAME_MAX_BYTES = 255
# Metadata describes a component; 16 KiB holds every module definition that MADSci ships, 64 of them fit a frame.
METADATA_MAX_BYTES = 16 * 1024
METADATA_MAX_DEPTH = 16

_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", re.ASCII)


def is_ulid(text: str) -> bool:
    """Tell whether `text` is a canonical ULID: 26 upper-case Crockford base-32 characters below 2^128."""
    return _ULID.fullmatch(text) is not None


def check_name(name: object, field: str = "name") -> str:
    """Return `name` if it may be given to a new component.

    A name is 1 to 255 bytes of UTF-8 in NFC, without control characters, and not only blanks.

    Raises:
        InvalidError: naming `field` and the rule that was broken; nothing changed.
    """
    reason = name_fault(name)
    if reason:
        raise InvalidError(f"{field}: {reason}", field=field, reason=reason)
    assert isinstance(name, str)
    return name


def name_fault(name: object) -> str | None:
    """Say which rule `name` breaks, or None where it breaks none."""
    if not isinstance(name, str):
        return f"must be text, not {type(name).__name__}"
    if name.isascii() and name.isprintable() and 0 < len(name) <= NAME_MAX_BYTES and not name.isspace():
        return None  # the usual name, told quickly
    return _slow_name_fault(name)


def _slow_name_fault(name: str) -> str | None:
    if not name or name.isspace():
        return "must not be empty or only blanks"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "holds a lone surrogate, which is not text"
    if size > NAME_MAX_BYTES:
        return f"is {size} bytes of UTF-8, at most {NAME_MAX_BYTES} are allowed"
    control = next((c for c in name if unicodedata.category(c) == "Cc" or c in "\u2028\u2029"), None)
    if control:
        return f"holds the control character U+{ord(control):04X}"
    if not unicodedata.is_normalized("NFC", name):
        return "is not in Unicode form NFC"
    return None


def check_metadata(metadata: object, field: str = "metadata") -> str:
    """Return `metadata` as compact JSON text if it may be stored: an object, at most 16 KiB, depth 16.

    Raises:
        InvalidError: not a JSON object; NaN or Infinity; a lone surrogate; a NUL; nested deeper than 16.
        TooLargeError: more than 16 KiB as compact JSON. Nothing changed in either case.
    """
    if not isinstance(metadata, dict):
        raise _invalid(field, f"must be a JSON object, not {type(metadata).__name__}")
    _check_value(metadata, field, METADATA_MAX_DEPTH)
    try:
        text = json.dumps(metadata, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(field, "holds a lone surrogate, which is not text") from None
    except ValueError:
        raise _invalid(field, "holds NaN or Infinity, which JSON has not") from None
    if size > METADATA_MAX_BYTES:
        reason = f"is {size} bytes as JSON, at most {METADATA_MAX_BYTES} are allowed"
        raise TooLargeError(f"{field}: {reason}", field=field, reason=reason)
    return text


def _check_value(value: Any, path: str, depth: int) -> None:
    if isinstance(value, (dict, list, tuple)):
        if depth == 0:
            raise _invalid(path, f"is nested deeper than {METADATA_MAX_DEPTH}")
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            if isinstance(value, dict):
                if not isinstance(key, str):
                    raise _invalid(path, f"has a key that is no text: {key!r}")
                _check_value(key, path, depth - 1)
            _check_value(item, f"{path}.{key}" if len(path) < 200 else path, depth - 1)
    elif isinstance(value, str):
        if "\0" in value:
            raise _invalid(path, "holds a NUL character")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise _invalid(path, f"is no JSON value: {type(value).__name__}")


def _invalid(field: str, reason: str) -> InvalidError:
    shown = field.encode("utf-8", "backslashreplace").decode()
    return InvalidError(f"{shown}: {reason}", field=shown, reason=reason)
