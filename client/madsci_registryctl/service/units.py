"""The unit files that are shipped, and how systemd writes the path of a folder into a unit's name. Pure but for `read`.

A file that is written begins with a mark: the hash of all that follows. So a later run knows whether a person has
changed it since, and what a person has changed is neither replaced nor removed.
"""

from __future__ import annotations

import hashlib
import os
import re
from importlib.resources import files
from pathlib import Path, PurePath

from madsci_registry.errors import InvalidError

PROGRAMS = "/opt/madsci-registryd/bin/"
"""Where the shipped units say that the programs are."""

_MARK = "# By `registryctl service install`, which replaces it as long as nobody changed it: "
_MARKED = re.compile(re.escape(_MARK) + "[0-9a-f]{16}\n")
# unit_name_escape() of systemd: these stay, but for a dot at the beginning. "-" stands for "/".
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.")
# What is special in an ExecStart= of systemd, or in a shell. A program whose path has none of it needs no quoting.
_UNQUOTED = re.compile(r"(?:[\w/.+@:,=-])+")
UNIT_NAME_MAX_BYTES = 255
"""UNIT_NAME_MAX of systemd, with the suffix."""


def read(name: str, programs: PurePath) -> str:
    """Return a shipped file, such as `sysusers.d/madsci-registryd.conf`, for programs in the folder `programs`.

    Raises:
        InvalidError: the folder's path cannot stand in a unit file.
    """
    if not _UNQUOTED.fullmatch(str(programs)):
        reason = "cannot stand in a unit file: install the program where the path has neither spaces nor quotes"
        raise InvalidError(f"{programs} {reason}", field="program", reason=reason)
    text = files("madsci_registryctl.service").joinpath("units", *name.split("/")).read_text(encoding="utf-8")
    return marked(text.replace(PROGRAMS, f"{programs}/"))


def read_configuration() -> str:
    """Return the shipped configuration, which sets nothing."""
    return marked(files("madsci_registryctl.service").joinpath("registryd.toml").read_text(encoding="utf-8"))


def marked(text: str) -> str:
    """Put the mark on top of a file's text."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{_MARK}{digest}\n{text}"


def is_as_written(content: bytes) -> bool:
    """Tell whether a file is as `service install` wrote it, this version's or an earlier one's."""
    text = content.decode("utf-8", "replace")
    mark = _MARKED.match(text)
    return mark is not None and marked(text[mark.end() :]) == text


def instance(folder: PurePath) -> str:
    """Return an absolute path as the instance of a template unit, as `systemd-escape --path` does."""
    path = str(folder).strip("/").encode("utf-8", "surrogateescape")
    if not path:
        return "-"
    escaped = ""
    for place, byte in enumerate(path):
        if byte == ord("/"):
            escaped += "-"
        elif byte in _PLAIN and not (place == 0 and byte == ord(".")):
            escaped += chr(byte)
        else:
            escaped += f"\\x{byte:02x}"
    return escaped


def folder_of(unit: str) -> Path:
    """Return the folder that a unit of a template serves: what `unit_of` was given."""
    instance = unit.partition("@")[2].rpartition(".")[0].replace("-", "/")
    path = re.sub(rb"\\x([0-9a-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()), instance.encode())
    return Path("/", os.fsdecode(path))


def daemons_in(text: str) -> list[Path]:
    """Return the programs `madsci-registryd` that a unit file runs; none: it is about something else."""
    words = " ".join(re.findall(r"^ExecStart=(.*)", text, re.MULTILINE)).split()
    return [Path(word.lstrip("-@:+!")) for word in words if word.endswith("/madsci-registryd")]


def unit_of(template: str, folder: PurePath) -> str:
    """Return the unit of a folder: `name@.service` with the folder's path as its instance.

    Raises:
        InvalidError: the path is too long for a unit's name.
    """
    unit = template.replace("@.", f"@{instance(folder)}.")
    if len(unit) > UNIT_NAME_MAX_BYTES:
        reason = f"its unit's name would have {len(unit)} bytes of at most {UNIT_NAME_MAX_BYTES}: use a shorter path"
        raise InvalidError(f"--folder: {folder}: {reason}", field="folder", reason=reason)
    return unit
