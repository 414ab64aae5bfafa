"""The notes beside the lock: whatever stands there keeps nobody from a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import FakeClock
from madsci_registryd import database
from madsci_registryd.core import Core
from madsci_registryd.faults import CorruptDatabase
from madsci_registryd.instance import InstanceLock

EPOCH_LIMIT = 1 << 33
WALL = 1_790_000_000


def core(folder: Path, lock: InstanceLock, clock: FakeClock) -> Core:
    """Begin as a daemon does."""
    db = database.open_database(folder / "registry.db")
    try:
        made = Core(db, folder / "registry.db", clock, host="here", status=dict, epoch_floor=lock.noted_epoch())
        made.begin("test", lambda tx, session: None)
    except BaseException:
        db.close()
        raise
    return made


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"[" * 60_000,
        b'{"a":' * 13_000,
        b"\xff\xfe\x00",
        b"\0" * 4096,
        b"17",
        b"null",
        b"[1, 2]",
        b'{"epoch": true}',
        b'{"epoch": null}',
        b'{"epoch": -5}',
        b'{"epoch": 1.5}',
        b'{"epoch": 1e400}',
        b'{"epoch": NaN}',
        b'{"epoch": "1800000000"}',
        b'{"epoch": [1]}',
        b'{"epoch": %d}' % EPOCH_LIMIT,
        b'{"epoch": %d}' % (1 << 40),
        b'{"epoch": %d}' % ((1 << 63) - 1),
        b'{"epoch": %s}' % (b"9" * 30),
        b'{"epoch": %s}' % (b"9" * 5000),
        b'{"io_error": [1], "restored": {}, "pid": "x"}',
    ],
    ids=lambda text: text[:24].decode("latin-1"),
)
def test_garbage_in_the_lock_file_is_no_note(tmp_path: Path, text: bytes) -> None:
    """Whatever somebody wrote into the lock file, the daemon starts, with an epoch by its clock, and notes its own."""
    path = tmp_path / "registry.db.lock"
    path.write_bytes(text)
    lock = InstanceLock(path)
    try:
        started = core(tmp_path, lock, FakeClock(wall=WALL))
        assert started.epoch == WALL
        started.close()
        lock.note(pid=1, epoch=started.epoch)
        assert json.loads(path.read_bytes()) == {"pid": 1, "epoch": WALL}
    finally:
        lock.close()


def test_epoch_that_the_last_daemon_noted_counts_without_its_database(tmp_path: Path) -> None:
    """Where the database was lost, the next epoch is above the one that the lock file tells."""
    path = tmp_path / "registry.db.lock"
    path.write_text(json.dumps({"epoch": WALL + 5}))
    lock = InstanceLock(path)
    started = core(tmp_path, lock, FakeClock(wall=WALL))
    assert started.epoch == WALL + 6
    started.close()
    lock.close()


def test_clock_in_a_time_without_tokens_is_refused(tmp_path: Path) -> None:
    """A start by a clock so far ahead that tokens would not be below 2^53 is refused, and the clock set right helps."""
    lock = InstanceLock(tmp_path / "registry.db.lock")
    with pytest.raises(CorruptDatabase, match="clock"):
        core(tmp_path, lock, FakeClock(wall=EPOCH_LIMIT))
    started = core(tmp_path, lock, FakeClock(wall=WALL))
    assert started.epoch == WALL
    started.close()
    lock.close()
