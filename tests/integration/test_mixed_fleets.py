"""Old and new programs on the same names, small: the real MADSci and many kills are in tests/chaos."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleets import judge, run_mixed_fleets
from helpers import DaemonProcess
from records import Record
from rounds import fresh_seed


def test_no_name_is_held_by_an_old_and_a_new_program_at_once(daemon: DaemonProcess) -> None:
    """Three old and three new processes take the same names while they and the daemon are killed: no name is held by
    an old and a new one at once, no name has two ULIDs, and the file is whole for whoever has its lock."""
    verdict = run_mixed_fleets(daemon, old=3, new=3, seconds=8, pause_s=0.8, seed=fresh_seed(), rest_s=0.02)
    assert verdict.faults == []
    assert min(verdict.grants["old"], verdict.grants["new"]) >= 20, f"void: {verdict.grants}"


@pytest.mark.parametrize(
    ("fault", "old", "new"),
    [
        ("a new and an old one", "T a 1.4\nG a X 1.5\nR a 2.5", "G a X 1.0\nR a 2.0"),
        ("an old and a new one", "T a 0.9\nG a X 1.0\nR a 2.0", "G a X 1.5\nR a 2.5"),
        ("an old and a new one", "T a 0.9\nG a X 1.0\nB a 2.5\nR a 4.0", "G a X 3.5\nR a 4.5"),
        ("two ULIDs", "I a X 1.0", "G a Y 1.5\nR a 2.5"),
        ("was not killed", "T a 0.9\nG a X 1.0", ""),
        ("", "T a 0.9\nG a X 1.0\nR a 2.0", "T a 1.0\nG a X 2.1\nR a 3.0"),
        ("", "T a 0.9\nG a X 1.0\nR a 9.0", "T a 1.0\nG a X 3.1\nR a 4.0"),
    ],
)
def test_judge_notices_what_is_broken(fault: str, old: str, new: str) -> None:
    """Two holders of two kinds, two ULIDs and a name that is not given back are faults; a hand-over, and an old holder
    that outstays its time to live, are none."""
    new = "\n".join(f"T a 0.0\n{line}" if line.startswith("G") else line for line in new.split("\n"))
    records = [(Record("old", old.splitlines()), True), (Record("new", new.split("\n") if new else []), False)]
    found = judge([(record, is_old) for record, is_old in records], ttl_s=2.0).faults
    assert (fault in " ".join(found)) if fault else found == []


@pytest.mark.parametrize(("granted_at", "is_fault"), [(2.8, True), (3.0, False)])
def test_judge_lets_a_killed_old_holder_have_its_time(granted_at: float, is_fault: bool) -> None:
    """A killed old program's lock counts until its time is over."""
    old = Record("old", ["T a 0.9", "G a X 1.0"], killed_at=1.5)
    new = Record("new", ["T a 1.0", f"G a X {granted_at}", "R a 5.0"])
    assert bool(judge([(old, True), (new, False)], ttl_s=2.0).faults) is is_fault


def test_record_of_a_killed_new_holder_ends_with_it(tmp_path: Path) -> None:
    """A killed new program held until just before it was killed."""
    new = Record("new", ["T a 0.9", "G a X 1.0"], killed_at=2.0)
    for begin, faults in ((1.9, 1), (2.1, 0)):
        old = Record("old", [f"T a {begin}", f"G a X {begin}", f"R a {begin + 1}"])
        assert len(judge([(new, False), (old, True)], ttl_s=2.0).faults) == faults
