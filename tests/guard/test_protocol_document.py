"""docs/protocol.md, which other languages are written from, says what the code does; and operations.md the exits."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest

from helpers import PROJECT
from madsci_registry import errors, protocol

PROTOCOL = (PROJECT / "docs" / "protocol.md").read_text()
OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
_ENVELOPE = {"op", "v", "token", "epoch", "seq"}


def section(heading: str) -> str:
    """Return the text under a heading of protocol.md."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,4}} |\Z)", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert found, f"protocol.md has no heading {heading!r}"
    return found[2]


def documented_fields(heading: str) -> dict[str, bool]:
    """Read the table of a section: field name -> whether it must be given."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", section(heading), re.MULTILINE)
    return {name: default.strip() == "required" for name, default in rows}


def model_fields(model: Any, envelope: set[str]) -> dict[str, bool]:
    """Read a model of the protocol: field name -> whether it must be given."""
    return {
        f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(model) if f.name not in envelope
    }


@pytest.mark.parametrize("op", sorted(protocol.REQUESTS))
def test_request_is_documented_field_by_field(op: str) -> None:
    """Each request's section lists exactly the fields of its model, and which must be given."""
    assert documented_fields(f"`{op}`") == model_fields(protocol.REQUESTS[op], _ENVELOPE)


@pytest.mark.parametrize("op", sorted(protocol.LINES))
def test_lifeline_line_is_documented_field_by_field(op: str) -> None:
    """Each line's section lists exactly the fields of its model, and which must be given."""
    assert documented_fields(f"`{op}` (lifeline)") == model_fields(protocol.LINES[op], {"op"})


def test_nothing_else_is_documented() -> None:
    """The document tells of no request and no line that the code does not know."""
    requests = re.findall(r"^### `(\w+)`$", PROTOCOL, re.MULTILINE)
    lines = re.findall(r"^### `(\w+)` \(lifeline\)$", PROTOCOL, re.MULTILINE)
    assert sorted(requests) == sorted(protocol.REQUESTS)
    assert sorted(lines) == sorted(protocol.LINES)


def test_every_error_code_is_documented_with_its_facts() -> None:
    """Each error code has its row: the facts it carries, and whether a retry helps."""
    for code, cls in errors.BY_CODE.items():
        row = re.search(rf"^\| `{code}` \|(.*?)\| (yes|no) \| (.*?) \|$", PROTOCOL, re.MULTILINE)
        assert row, f"protocol.md has no row for {code}"
        assert re.findall(r"`(\w+)`", row[1]) == list(errors.fact_names(cls)), code
        assert (row[2] == "yes") == cls.retry, code


def test_limits_are_those_of_the_code() -> None:
    """Each limit stands in the document with the value that the code has."""
    for name in ("FRAME_MAX_BYTES", "PAGE_BYTES", "LINE_MAX_BYTES", "WAIT_MAX_S", "RENEW_S", "RESUME_S", "GRACE_S"):
        value = getattr(protocol, name)
        assert re.search(rf"^\| `{name}` \| {value:.0f}( bytes)? \|", PROTOCOL, re.MULTILINE), name
    assert f"version {protocol.PROTOCOL_VERSION}" in PROTOCOL


def test_exit_statuses_of_the_daemon_are_those_of_the_code() -> None:
    """The table of the daemon's exit statuses lists every fault's status."""
    from madsci_registryd import faults

    classes = [c for _, c in inspect.getmembers(faults, inspect.isclass) if issubclass(c, faults.StartFault)]
    for cls in classes:
        assert re.search(rf"^\| {cls.status} \|", _table("madsci-registryd"), re.MULTILINE), cls


def test_every_error_code_has_its_exit_status_documented() -> None:
    """The table of registryctl's exit statuses names every error code, with the status that the program gives it."""
    from madsci_registryctl import exits

    rows = re.findall(r"^\| (\d+) \| .*? \| (.*?) \|$", _table("registryctl"), re.MULTILINE)
    documented = {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert documented == {code: exits.status_of(cls("why")) for code, cls in errors.BY_CODE.items()}


def _table(program: str) -> str:
    found = re.search(rf"^## Exit statuses of {program}\n(.*?)(?=^## |\Z)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert found, f"operations.md has no exit statuses of {program}"
    return found[1]
