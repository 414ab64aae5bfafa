"""What can still be read of a registry.json that is torn or damaged.

The text is read by the JSON machine of loose_json.py, every character a few times at most. While the structure holds,
it knows what is an entry and what lies inside of one. Where the structure breaks it looks for the next place at which
an entry can begin. In a file with a member a line (MADSci's own are) that is a key with just the indentation of the
entries; in any other a keyed object that has all that an entry has, so that an object of somebody's metadata does not
pass for one.

Pure functions without side effects, safe in every thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from madsci_registry.loose_json import (
    DEPTH_MAX,
    Damage,
    LooseText,
    Unfit,
    decode,
    has_surrogate_escape,
    is_deep,
    is_storable,
    shown,
)
from madsci_registry.types import COMPONENT_TYPES

FORMAT_VERSION = 1
"""The version of registry.json's format, MADSci's own."""
FAULTS_MAX = 10_000
"""Enough to mend a file by; a hostile one has millions."""

_INDENTED = re.compile(r"\n(?: {4}|\t\t|)\"")
_ANYWHERE = re.compile(r'(?:[,{][ \t\r\n]*|\n)(?=")')
_BAD_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Fault:
    """What could not be read of a file."""

    line: int | None
    """Where it begins, from 1; None: it is about the whole file."""
    name: str | None
    """The entry, where that is known and can be shown."""
    reason: str

    def __str__(self) -> str:
        """Say it in a line, for people."""
        place = [] if self.line is None else [f"line {self.line}"]
        return ": ".join([*place, *([] if self.name is None else [repr(self.name)]), self.reason])


@dataclass
class Salvage(LooseText):
    """What was read of one text. `salvage()` makes it."""

    strict: bool
    """True: the file is known to be damaged, so what stands where it should not tells of a lost bracket."""
    created_at: str | None = None
    entries: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    has_entries: bool = False
    version: Any = FORMAT_VERSION
    indent: str | None = None
    """Of the keys of the entries; None where it is unknown, or tells nothing."""
    found: list[tuple[int, str | None, str]] = field(default_factory=list)
    """Faults by position, in the order in which they were met."""
    lost: int = 0
    """Faults beyond those."""
    _at: dict[str, int] = field(default_factory=dict)
    """Where each name stood first."""
    _twice: set[str] = field(default_factory=set)
    _open: tuple[int, str | None] | None = None
    """The entry that is being read: where it begins, and its name."""
    _quiet: bool = False
    """True: this damaged region was reported, and nothing was taken after it."""
    _damages: int = 0
    _has_guessed: bool = False
    _is_flat: bool = False
    """True: all keys stand at the beginning of lines."""
    _awaits_entries: bool = True
    """True: the object of entries of this document has not begun."""

    def __post_init__(self) -> None:
        self._is_flat = '\n"id"' in self.text

    def faults(self) -> Iterator[Fault]:
        """Yield the faults by line."""
        line, counted = 1, 0
        for at, name, reason in sorted(self.found, key=lambda f: f[0]):
            line += self.text.count("\n", counted, at)
            counted = at
            yield Fault(line, name, reason)
        if self.lost:
            yield Fault(None, None, f"and {self.lost} more")

    def fault(self, at: int, name: str | None, reason: str) -> None:
        """Note what could not be read."""
        if len(self.found) < FAULTS_MAX:
            self.found.append((at, name, reason))
        else:
            self.lost += 1

    # the way through the text

    def read(self) -> None:
        """Read all of it."""
        at, inside = 0, False
        while True:
            try:
                at = self._rest_of_root(self._members(at)) if inside else self._root(at)
                at = self.skip(at)
                if at == len(self.text):
                    return
                self._damaged(at, "something follows the end of the registry")
                if self.text[at] == "{":
                    inside, self._awaits_entries = False, True
                    continue
            except Damage as damage:
                self._damaged(damage.at, str(damage))
                at = damage.at
            self._open = None
            key = self._resync(at)
            if key is None:
                return
            at, inside = key, True

    def _damaged(self, at: int, reason: str) -> None:
        self.whole = False
        self._damages += 1
        begin, name = self._open or (at, None)
        if name is not None or not self._quiet:
            self.fault(begin, name, reason)
        self._quiet = True

    def _root(self, at: int) -> int:
        at = self.skip(at)
        if self.text[at : at + 1] != "{":
            raise Damage(at, "is empty" if at == len(self.text) and not at else "no JSON object begins here")
        at = self.skip(at + 1)
        if self.text[at : at + 1] == "}":
            return at + 1
        return self._root_members(at)

    def _root_members(self, at: int) -> int:
        seen: set[str] = set()
        while True:
            key_at = at
            key, at = self.key(at)
            if key in seen:
                self.whole = False
                self.fault(key_at, None, f"{shown(key)!r} stands twice in the registry")
            seen.add(key)
            if self.text[at : at + 1] == "{" and (key == "entries" or self._must_be_entries(at)):
                at = self._entries(at)
            else:
                end = self.value_end(at)
                if self.strict and _looks_like_an_entry(self.text[at:end]):
                    self._take(key_at, key, self.text[at:end])  # the object of entries was closed by a lost bracket
                else:
                    self._root_value(key, key_at, self.text[at:end])
                at = end
            at = self.skip(at)
            if self._closes(at):
                return at + 1
            at = self.skip(at + 1)

    def _must_be_entries(self, at: int) -> bool:
        """Tell whether a damaged key may have been that of the entries."""
        return self.strict and self._awaits_entries and self._is_entry_at(self.skip(at + 1)) is True

    def _rest_of_root(self, at: int) -> int:
        at = self.skip(at)
        return at + 1 if self._closes(at) else self._root_members(self.skip(at + 1))

    def _root_value(self, key: str, at: int, text: str) -> None:
        try:
            value = decode(text)
        except (ValueError, RecursionError):
            self.whole = False
            self.fault(at, None, f"the registry's {shown(key)!r} cannot be read")
            return
        if key == "version":
            self.version = value
            if isinstance(value, bool) or value != FORMAT_VERSION:
                self.whole = False
        elif key == "created_at":
            self.created_at = value if isinstance(value, str) and is_storable(value) else None
        elif key == "entries":
            self.whole = False
            self.fault(at, None, "'entries' is no object")

    def _entries(self, at: int) -> int:
        self.has_entries, self._awaits_entries = True, False
        begin = at + 1
        key_at = self.skip(begin)
        if self.text[key_at : key_at + 1] == "}":
            return key_at + 1
        _, value_at = self.key(key_at)
        if self.text[value_at : value_at + 1] == "{":
            self.indent = self._indent_of(self.text[begin:key_at])
        return self._members(key_at)

    def _indent_of(self, space: str) -> str | None:
        _, is_line, indent = space.rpartition("\n")
        if not is_line or not indent and self._is_flat:
            return None
        return indent

    def _members(self, at: int) -> int:
        """Read the entries from a key on; return where the object of entries has ended."""
        while True:
            self._open = (at, None)
            name, end = self.key(at)
            self._open = (at, name if is_storable(name) else None)
            begin = end
            end = self.value_end(begin)
            self._take(at, name, self.text[begin:end])
            self._open, self._quiet = None, False
            at = self.skip(end)
            if self._closes(at):
                return at + 1
            at = self.skip(at + 1)
            if at == len(self.text):
                raise Damage(at, "the file ends here")

    def _closes(self, at: int) -> bool:
        """Tell whether an object ends here, as opposed to going on."""
        here = self.text[at : at + 1]
        if here not in ("}", ","):
            raise Damage(at, "is damaged here" if here else "the file ends here")
        return here == "}"

    def _take(self, at: int, name: str, text: str) -> None:
        reason, entry = self._entry(name, text)
        known = name if is_storable(name) else None
        before = self._at.setdefault(name, at)
        if before != at:
            self.whole = False
        if reason:
            self.fault(at, known, reason)
        elif name in self._twice:
            self.fault(at, known, "stands twice, with another id: neither is taken")
        elif name in self.entries:
            self._again(before, at, name, entry)
        else:
            self.entries[name] = entry

    def _again(self, before: int, at: int, name: str, entry: Any) -> None:
        if self.entries[name].get("id") == entry.get("id"):
            self.entries[name] = entry  # the later one, as MADSci reads it
            if not self._damages:  # in a file that was written over by another one, that is no news
                self.fault(before, name, "stands twice, with the same id: the last one is taken")
                self.fault(at, name, "stands twice, with the same id: this one is taken")
            return
        del self.entries[name]
        self._twice.add(name)
        self.fault(before, name, "stands twice, with another id: neither is taken")
        self.fault(at, name, "stands twice, with another id: neither is taken")

    def _entry(self, name: str, text: str) -> tuple[str, Any]:
        """Return what is wrong with an entry, or '' and its value."""
        if not is_storable(name):
            if _BAD_BYTE.search(name):
                self.whole = False
            return f"its name is not text: {shown(name)}", None
        if _BAD_BYTE.search(text):
            self.whole = False
            return "is not UTF-8", None
        if not text.startswith("{"):
            return "is no object", None
        try:
            entry = decode(text)
        except Unfit as unfit:
            return str(unfit), None
        except ValueError:
            self.whole = False
            return "is not JSON", None
        except RecursionError:
            return f"is nested deeper than {DEPTH_MAX}", None
        if is_deep(entry):
            return f"is nested deeper than {DEPTH_MAX}", None
        if has_surrogate_escape(text) and not is_storable(entry):
            return "holds a lone surrogate, which is not text", None
        return "", entry

    # after damage

    def _resync(self, at: int) -> int | None:
        """Return the next place after some damage where the key of an entry may begin, None where there is none."""
        if self.indent is None and not self._has_guessed:
            self._has_guessed = True
            guess = _INDENTED.search(self.text)
            self.indent = self._indent_of(guess[0][:-1]) if guess else None
        here = self.skip(at)
        if self.text[here : here + 1] == '"' and self._is_entry_at(here) is True:
            return here
        beginning = _ANYWHERE if self.indent is None else re.compile(rf"\n{self.indent}(?=\")")
        back = len(self.indent or "") + 1  # where it stopped may be just where an entry begins
        while (candidate := beginning.search(self.text, max(at - back, 0))) is not None:
            key_at = candidate.end()
            found = self._is_entry_at(key_at)
            if found is True:
                return key_at
            at = max(key_at + 1, found)
        return None

    def _is_entry_at(self, key_at: int) -> bool | int:
        """Tell whether an entry may begin with the key there; if not, the place before which none can."""
        try:
            name, begin = self.key(key_at)
        except Damage:
            return False
        if self.text[begin : begin + 1] != "{":
            return False
        if self.indent is not None and self.text.endswith(f"\n{self.indent}", 0, key_at):
            return True
        if name == "entries" and self._awaits_entries:
            self.has_entries, self._awaits_entries = True, False
            return begin + 1
        try:
            end = self.value_end(begin)
        except Damage as damage:
            return damage.at
        return _looks_like_an_entry(self.text[begin:end]) or end

    def is_misplaced(self, at: int, value: int, depth: int) -> bool:
        """Tell whether a key tells of a lost bracket: inside an entry it has the indentation of the entries, or is of
        another object than an entry has; or it is that of the entries, inside of something else."""
        if not self.strict:
            return False
        if self._open is None:
            return self._awaits_entries and self.text.startswith('"entries"', at)
        if self.indent is not None and self.text.endswith(f"\n{self.indent}", 0, at):
            return True
        is_own = self.text.startswith(('"metadata"', '"lock"'), at)
        return depth == 1 and self.text[value : value + 1] == "{" and not is_own


def _looks_like_an_entry(text: str) -> bool:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and entry.get("component_type") in COMPONENT_TYPES
        and {"metadata", "last_seen"} <= entry.keys()
    )


def salvage(text: str) -> Salvage:
    """Read what can be read of a text. Bytes that are no UTF-8 are in it as lone surrogates (surrogateescape)."""
    found = Salvage(text, strict=False)
    found.read()
    if not (found.whole and found.has_entries):
        again = Salvage(text, strict=True, indent=found.indent)
        again.read()
        return again
    return found
