"""The judge of the lab's long runs notices what it is there for: each broken promise, put into records by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab_members import Device, judge


def records(**texts: str) -> dict[str, list[str]]:
    """Make the record of a member on each host."""
    return {f"{host}/1": text.splitlines() for host, text in texts.items()}


def test_clean_records_show_no_fault() -> None:
    """One confirmed holder after the other with growing tokens, and unconfirmed ones beside them, are right."""
    verdict = judge(
        records(
            a="G n 1 X 1.0\nC n 1 1.5\nC n 1 1.9\nR n 2.0\nE held 2.0",
            b="G n 2 X 2.5\nC n 2 3.0\nL n 2 4.0\nR n 4.1",
            c="G n 9 X 1.2\nR n 3.0\nI own Y 4.0",
        )
    )
    assert verdict.faults == []
    assert (verdict.grants, verdict.confirmed, verdict.moves, verdict.lost) == (3, 2, 1, 1)
    assert verdict.ids == {"n": {"X"}, "own": {"Y"}} and verdict.errors == {"held": 1}


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("two confirmed holders", "G n 1 X 1.0\nC n 1 1.1\nC n 1 2.0\nR n 2.1", "G n 2 X 1.5\nC n 2 1.6\nR n 3.0"),
        ("did not grow", "G n 2 X 1.0\nC n 2 1.1\nR n 2.0", "G n 2 X 2.5\nC n 2 2.6\nR n 3.0"),
        ("fell for", "G n 2 X 1.0\nC n 2 1.1\nC n 1 1.2\nR n 2.0", ""),
        ("after a device has refused it", "G n 1 X 1.0\nF n 1 2 1.1\nC n 1 1.2\nR n 2.0", ""),
    ],
)
def test_broken_promise_is_noticed(fault: str, first: str, second: str) -> None:
    """Two confirmed holders at once, a token that does not grow, or falls, and a lock that is confirmed for whom a
    device has refused are each a fault."""
    assert any(fault in found for found in judge(records(a=first, b=second)).faults)


def test_device_refuses_lower_tokens(tmp_path: Path) -> None:
    """A device does what it is told with the highest token that it has seen, and with no lower one."""
    device = Device(tmp_path)
    assert [device.use("n", token) for token in (5, 5, 9, 5, 10)] == [5, 5, 9, 9, 10]
