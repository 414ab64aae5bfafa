"""The judge of the hammer tests notices what it is there for: each broken promise, put into records by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hammer import judge


def records(folder: Path, *texts: str, killed_at: float | None = None) -> Any:
    """Write a record a client."""
    made = []
    for number, text in enumerate(texts):
        path = folder / f"record-{number}"
        path.write_text(text)
        made.append(SimpleNamespace(record=path, killed_at=killed_at))
    return made


def test_clean_records_show_no_fault(tmp_path: Path) -> None:
    """One after the other, with growing tokens and one ULID, is as it should be."""
    verdict = judge(records(tmp_path, "G a 1 X 1.0\nR a 1 2.0\n", "G a 2 X 2.5\nR a 2 3.0\nI b Y 4.0\n"))
    assert verdict.faults == []
    assert (verdict.grants, verdict.identities) == (2, {"a": "X", "b": "Y"})


def test_line_cut_by_a_kill_counts_for_nothing(tmp_path: Path) -> None:
    """What a killed client had not written whole was never recorded."""
    assert judge(records(tmp_path, "G a 1 X 1.0\nR a 1 2.0\nG a 2", killed_at=3.0)).grants == 1


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("held twice", "G a 1 X 1.0\nR a 1 2.0\n", "G a 2 X 1.5\nR a 2 3.0\n"),
        ("did not grow", "G a 2 X 1.0\nR a 2 2.0\n", "G a 2 X 2.5\nR a 2 3.0\n"),
        ("two ULIDs", "I a X 1.0\n", "I a Y 2.0\n"),
        ("nobody took", "G a 1 X 1.0\nL a 1 2.0\nR a 1 2.0\n", ""),
    ],
)
def test_broken_promise_is_noticed(tmp_path: Path, fault: str, first: str, second: str) -> None:
    """A name held twice, a token that does not grow, a second ULID and an unexplained loss are each a fault."""
    assert any(fault in found for found in judge(records(tmp_path, first, second)).faults)


def test_killed_client_held_until_it_was_killed(tmp_path: Path) -> None:
    """A client that was killed held what it had until just before: a grant within that time is a fault."""
    hammers = records(tmp_path, "G a 1 X 1.0\n", killed_at=5.0)
    second = tmp_path / "record-9"
    second.write_text("G a 2 X 4.0\nR a 2 6.0\n")
    assert judge([*hammers, SimpleNamespace(record=second, killed_at=None)]).faults  # type: ignore[list-item]
    second.write_text("G a 2 X 5.1\nR a 2 6.0\n")
    assert judge([*hammers, SimpleNamespace(record=second, killed_at=None)]).faults == []  # type: ignore[list-item]
