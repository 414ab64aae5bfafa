"""The harness of the long runs notices what it is there for: each broken promise, put into records by hand."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from conftest import Workers
from helpers import DaemonProcess
from madsci_registry.protocol import RESUME_S
from records import Record, judge
from rounds import check_database_at_rest, check_nothing_left, descriptors_at_rest


def records(*texts: str, killed_at: float | None = None) -> list[Record]:
    """Make the record of a client of each text."""
    return [Record(f"client-{i}", text.splitlines(), killed_at, "label") for i, text in enumerate(texts)]


def test_clean_records_show_no_fault() -> None:
    """One after the other, with growing tokens and one ULID, is as it should be."""
    verdict = judge(records("G a 1 X 1.0\nH a 1 1.5\nR a 1 2.0\nE busy 2.0", "G a 2 X 2.5\nR a 2 3.0\nI b Y 4.0"))
    assert verdict.faults == []
    assert (verdict.grants, verdict.identities, verdict.errors) == (2, {"a": "X", "b": "Y"}, {"busy": 1})


def test_line_cut_by_a_kill_counts_for_nothing(tmp_path: Path) -> None:
    """What a killed client had not written whole was never recorded."""
    (tmp_path / "record").write_text("G a 1 X 1.0\nR a 1 2.0\nG a 2")
    assert Record.read(tmp_path / "record").lines == ["G a 1 X 1.0", "R a 1 2.0"]
    assert Record.read(tmp_path / "none", 3.0) == Record("none", [], 3.0)


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("held twice", "G a 1 X 1.0\nR a 1 2.0", "G a 2 X 1.5\nR a 2 3.0"),
        ("held twice", "G a 1 X 1.0\nK 2.0", "G a 2 X 1.5\nR a 2 3.0"),
        ("did not grow", "G a 2 X 1.0\nR a 2 2.0", "G a 2 X 2.5\nR a 2 3.0"),
        ("two ULIDs", "I a X 1.0", "I a Y 2.0"),
        ("two ULIDs", "G a 1 X 1.0\nR a 1 2.0", "I a Y 2.0"),
        ("nobody took", "G a 1 X 1.0\nL a 1 2.0", ""),
        ("changed under it", "G a 1 X 1.0\nH a 2 2.0\nR a 1 3.0", ""),
        ("changed under it", "G a 1 X 1.0\nR a 2 3.0", ""),
        ("without a grant", "H a 1 2.0", ""),
        ("while it held it", "G a 1 X 1.0\nG a 2 X 2.0\nR a 2 3.0", ""),
        ("was not killed", "G a 1 X 1.0", ""),
    ],
)
def test_broken_promise_is_noticed(fault: str, first: str, second: str) -> None:
    """A name held twice, a token that does not grow or does not stay, a second ULID, a lock of a living holder that is
    lost or given anew, and a client that ends without anybody's doing are each a fault."""
    assert any(fault in found for found in judge(records(first, second)).faults)


@pytest.mark.parametrize(("first", "killed_at"), [("G a 1 X 1.0", 5.0), ("G a 1 X 1.0\nK 5.0", None)])
def test_killed_client_held_until_it_was_killed(first: str, killed_at: float | None) -> None:
    """A client that was killed, by another or by itself, held what it had until just before: a grant within that time
    is a fault."""
    killed = records(first, killed_at=killed_at)
    assert judge([*killed, *records("G a 2 X 4.0\nR a 2 6.0")]).faults
    assert judge([*killed, *records("G a 2 X 5.1\nR a 2 6.0")]).faults == []


def test_client_that_cut_its_lifeline_held_until_it_could_not_resume() -> None:
    """A client that ended its lifeline and lives on held what it had until the time to resume was over, or until it was
    killed before that."""
    cut = "G a 1 X 1.0\nC 2.0"
    early, late = f"G a 2 X {2 + RESUME_S - 0.1}\nR a 2 9.0", f"G a 2 X {2 + RESUME_S + 0.1}\nR a 2 9.0"
    assert judge(records(cut, early)).faults
    assert judge(records(cut, late)).faults == []
    assert judge([*records(cut, killed_at=3.0), *records(early)]).faults == []


def test_hand_overs_and_first_grants_are_measured() -> None:
    """The figures are those of who waited already when the holder's time ended, and of each epoch's first grant."""
    epoch, label = 1 << 20, "label"
    first, waiting = f"G a {epoch} X 1.0\nK 2.0", f"W a 1.5\nG a {epoch + 1} X 2.25\nR a {epoch + 1} 3.0"
    late = f"W a 3.5\nG a {2 * epoch} X 4.0\nR a {2 * epoch} 5.0"
    verdict = judge(records(late, waiting, first))
    assert verdict.faults == []
    assert verdict.hand_overs == {label: [0.25]}
    assert verdict.first_grants == {1: 1.0, 2: 4.0}


def test_descriptor_that_was_left_is_noticed(daemon: DaemonProcess) -> None:
    """A daemon with a connection more than before is not at rest."""
    at_rest = descriptors_at_rest(daemon)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(daemon.lifeline))
        with pytest.raises(AssertionError, match="'socket': 1"):
            check_nothing_left(daemon, at_rest, patience_s=0.2)
    check_nothing_left(daemon, at_rest)


def test_session_that_was_left_is_noticed(daemon: DaemonProcess, workers: Workers) -> None:
    """A daemon with a session more than there should be is not at rest, and neither is its database afterwards."""
    at_rest = descriptors_at_rest(daemon)
    workers().ask("resolve", "arm")
    with pytest.raises(AssertionError, match="other sessions"):
        check_nothing_left(daemon, at_rest, patience_s=0.2)
    assert daemon.terminate() == 0
    with pytest.raises(AssertionError, match=r"left in the database: {'sessions': \[\('"):
        check_database_at_rest(daemon.registry.with_suffix(".db"))
