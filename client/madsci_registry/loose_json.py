"""JSON that may be damaged: a machine that says where it stopped, and what of a sound text can be stored.

The machine needs no recursion and passes every character once, whatever the text is.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

DEPTH_MAX = 64
"""Of an entry. Metadata may be nested 16 levels; Python's own functions read and write so many anywhere."""
_DIGITS_MAX = 308
"""Of an integer: a number with more is above what a double holds, and other programs read it as infinite."""

_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class Unfit(ValueError):
    """A value that is JSON, or nearly, and that cannot be stored; the text says why."""


def decode(text: str) -> Any:
    """Return the value of a JSON text that is nested no deeper than Python reads.

    Raises:
        Unfit: a key twice in one object, NaN, Infinity, a number that no double holds.
        ValueError: it is no JSON. RecursionError: it is nested deeper.
    """
    return json.loads(
        text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unfit(f"{shown(twice)!r} stands twice in one object")
    return made


def _no_constant(text: str) -> Any:
    raise Unfit(f"holds {text}, which JSON has not")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Unfit("holds a number that is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS_MAX:
        raise Unfit("holds a number that is too large")
    return int(text)


def shown(text: str) -> str:
    """Return a text as it can be shown and stored: lone surrogates escaped, at most 200 characters of it."""
    return text[:200].encode("utf-8", "backslashreplace").decode()


def is_storable(value: Any) -> bool:
    """Tell whether a JSON value, not nested deeply, is text in UTF-8: no lone surrogates in it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def has_surrogate_escape(text: str) -> bool:
    r"""Tell whether a JSON text holds an escape that may be a lone surrogate, \ud800 to \udfff."""
    return _SURROGATE_ESCAPE.search(text) is not None


def is_deep(value: Any, levels: int = DEPTH_MAX) -> bool:
    """Tell whether a JSON value is nested deeper than so many levels."""
    layer = [value]
    while layer and levels > 0:
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        levels -= 1
    return bool(layer)


class Damage(Exception):
    """The structure ends at `at`."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at


@dataclass
class LooseText:
    """A text of JSON, or of what is left of it. Bytes that are no UTF-8 are in it as lone surrogates."""

    text: str

    def is_misplaced(self, at: int, value: int, depth: int) -> bool:
        """Tell whether a key cannot stand there, as deep as that, before that value. Here: it always can."""
        return False

    def skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        return match.end() if match else at

    def key(self, at: int) -> tuple[str, int]:
        """Read a key and its colon; return it and where its value begins."""
        if self.text[at : at + 1] != '"':
            raise Damage(at, "is damaged here" if at < len(self.text) else "the file ends here")
        end = self.string_end(at)
        try:
            key = json.loads(self.text[at:end])
        except ValueError:
            raise Damage(end, "its name is not JSON") from None
        colon = self.skip(end)
        if self.text[colon : colon + 1] != ":":
            raise Damage(colon, "is damaged after its name" if colon < len(self.text) else "is torn: the file ends")
        return key, self.skip(colon + 1)

    def string_end(self, at: int) -> int:
        text, at = self.text, at + 1
        while True:
            plain = _PLAIN.match(text, at)
            at = plain.end() if plain else at
            here = text[at : at + 1]
            if here == '"':
                return at + 1
            if here != "\\":
                raise Damage(at, self._reason(at))
            at += 2

    def value_end(self, at: int) -> int:
        """Return where the JSON value that begins at `at` ends. Raises Damage."""
        text = self.text
        closing = bytearray()  # of the brackets that are open
        while True:
            here = text[at : at + 1]  # a value begins
            if here and here in "{[":
                closing.append(ord("}" if here == "{" else "]"))
                at = self.skip(at + 1)
                if ord(text[at : at + 1] or " ") != closing[-1]:
                    at = self._inner_key(at, len(closing)) if here == "{" else at
                    continue
                at += 1
                closing.pop()
            elif here == '"':
                at = self.string_end(at)
            else:
                scalar = _SCALAR.match(text, at)
                if scalar is None:
                    raise Damage(at, self._reason(at))
                at = scalar.end()
            while closing:  # a value has ended
                at = self.skip(at)
                here = text[at : at + 1]
                if here == ",":
                    at = self.skip(at + 1)
                    at = self._inner_key(at, len(closing)) if closing[-1] == ord("}") else at
                    break
                if here != chr(closing[-1]):
                    raise Damage(at, self._reason(at))
                at += 1
                closing.pop()
            else:
                return at

    def _inner_key(self, at: int, depth: int) -> int:
        if self.text[at : at + 1] != '"':
            raise Damage(at, self._reason(at))
        colon = self.skip(self.string_end(at))
        if self.text[colon : colon + 1] != ":":
            raise Damage(colon, self._reason(colon))
        value = self.skip(colon + 1)
        if self.is_misplaced(at, value, depth):
            raise Damage(at, self._reason(at))
        return value

    def _reason(self, at: int) -> str:
        if at >= len(self.text):
            return "is torn: the file ends in it"
        return "is damaged: NUL bytes in it" if self.text[at] == "\0" else "is damaged"
