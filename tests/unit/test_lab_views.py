"""What a lab says is another program's word: whatever it is, registryctl shows it, and it steers no terminal."""

from __future__ import annotations

from typing import Any

import pytest

from madsci_registryctl.invocation import Invocation
from madsci_registryctl.lab import views

NASTY = "a\x1b[2J\u202e\n"
RUBBISH: list[Any] = [None, 0, 7, True, "", NASTY, [], [NASTY], {}, {NASTY: NASTY}]
ENTRY = (
    "name",
    "id",
    "component_type",
    "retired",
    "metadata",
    "created_at",
    "changed_at",
    "host",
    "term",
    "other_ids",
    "lock",
)
CONFLICT = ("name", "id", "reason", "host", "at", "decided_at", "said", "entry")
EVENT = ("revision", "at", "kind", "name", "id", "host", "why")
HOST = ("host", "label", "since", "locks")
LOCK = ("name", "term", "host", "since", "holder")


def show(value: dict[str, Any]) -> None:
    """Show an object wherever one is shown."""
    views.print_entry(value)
    views.print_entries(Invocation(), [value])
    views.print_events(Invocation(), [value])
    views.print_conflicts(Invocation(), [value, {"said": value, "entry": value}], {})
    views.print_status({**value, "hosts": [value]})
    views.print_entry({"lock": value})
    views.print_entry({"lock": {"holder": value}})


@pytest.mark.parametrize("rubbish", RUBBISH, ids=repr)
def test_rubbish_of_a_lab_is_shown_and_steers_nothing(rubbish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A field that is missing, or of any type, or holds control characters, is shown without an error, escaped."""
    for fields in (ENTRY, CONFLICT, EVENT, HOST, LOCK, (*views._HEALTH, NASTY), ("pid", "comm", "user")):
        show(dict.fromkeys(fields, rubbish))
        for field in fields:
            show({field: rubbish})
    printed = capsys.readouterr().out
    assert not {c for c in printed if not c.isprintable()} - {"\n"} and "\u202e" not in printed


def test_status_shows_what_there_is_to_say() -> None:
    """How a daemon stands with its lab is told in few lines: nothing of what is not so."""
    assert views.standing({"state": "off"}) == {"lab": "off"}
    assert views.standing({"state": "up"}) == {"lab": "up"}
