"""JSON as the registry takes it from a file: whole, unambiguous, and each fault named with its place."""

from __future__ import annotations

import json
import math
from typing import Any

from madsci_registry.errors import InvalidError


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object before its keys are known to be distinct."""


class _Constant(str):
    """NaN, Infinity or -Infinity, which Python reads and JSON has not."""

    __slots__ = ()


def loads(text: bytes, field: str) -> Any:
    """Return the JSON value of `text`, in UTF-8.

    Raises:
        InvalidError: no UTF-8, no JSON, a key twice in one object, NaN, Infinity or a number that no double holds, a
            lone surrogate, nested too deeply. Its `field` is `field` and the place inside, as `registry.entries.a`.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_Object, parse_constant=_Constant)
        return _checked(value, field)
    except UnicodeDecodeError as error:
        raise _invalid(field, f"is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _invalid(field, f"is not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise _invalid(field, f"is not JSON that can be read: {error}") from None
    except RecursionError:
        raise _invalid(field, "is nested too deeply") from None


def _checked(value: Any, place: str) -> Any:
    if isinstance(value, _Object):
        return _checked_object(value, place)
    if isinstance(value, list):
        return [_checked(item, f"{place}.{i}") for i, item in enumerate(value)]
    if isinstance(value, _Constant):
        raise _invalid(place, f"holds {value}, which JSON has not")
    if isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _invalid(place, "holds a number that is too large")
    return value


def _checked_object(pairs: _Object, place: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in pairs:
        _check_text(key, place)
        inside = f"{place}.{key}"
        if key in checked:
            raise _invalid(inside, "stands twice in one object")
        checked[key] = _checked(value, inside)
    return checked


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(place, "holds a lone surrogate, which is not text") from None


def _invalid(place: str, reason: str) -> InvalidError:
    return InvalidError(f"{place}: {reason}", field=place, reason=reason)
