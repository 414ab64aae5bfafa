"""Unmodified programs of the real MADSci and new programs on the same names, under SIGKILL. `make chaos` runs this."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleets import run_mixed_fleets
from helpers import DaemonProcess
from rounds import fresh_seed

LEAST_GRANTS = 300


@pytest.mark.chaos
@pytest.mark.build
@pytest.mark.timeout(600)
def test_no_name_is_held_by_an_old_and_a_new_program_at_once(daemon: DaemonProcess, installed: Path) -> None:
    """8 processes of the real MADSci and 8 new ones take the same names while they and the daemon are killed: no name
    is held by an old and a new one at once, a killed old one's name is nobody's until its time is over, no name has two
    ULIDs, and the file is whole for whoever has its lock, but where an old program was killed while it wrote."""
    verdict = run_mixed_fleets(
        daemon, old=8, new=8, seconds=90, pause_s=0.7, seed=fresh_seed(), rest_s=0.05, madsci=installed
    )
    assert not verdict.faults, "\n".join(verdict.faults[:20])
    assert min(verdict.grants["old"], verdict.grants["new"]) >= LEAST_GRANTS, f"void: {verdict.grants}"
