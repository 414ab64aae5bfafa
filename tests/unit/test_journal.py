"""Log messages: what the journal gets, what stderr gets, and the ids of the rare ones, which never change."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import PROJECT, FakeClock, environment
from madsci_registryd import journal, messages
from madsci_registryd.messages import MESSAGES

OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
DAEMON = PROJECT / "daemon" / "madsci_registryd"

# Alerts of users rest on these: a row is never changed and never removed; new messages get a row of their own.
PINNED = {
    "started": "54355af0ab2643d8a94611ccfde7c250",
    "reloaded": "0c17258fb3c54586a0b77962c1f3d2a2",
    "not_reloaded": "322540225e54400a94d77fa325ca4b0a",
    "manager_unreachable": "6274f5c1ce324f68947da7002fc63618",
    "stopped": "46242ae9ab06495a8375d5d7f93e5eff",
    "not_started": "f39ae8dbf1c540068437e605270d8010",
    "schema_migrated": "0daba51f2aa44f26a0a98e30202bf7c2",
    "restored": "efaad8bed9c1480eaf5e4d2756b2410c",
    "served_elsewhere_unknown": "914fd4645abe4f0b9b0d1cde477a2c51",
    "io_error": "f1ec22081d964afc8bbf302ee0b2fb67",
    "checking_after_io_error": "16c3cf8074b142c19a3013eaef19c88f",
    "disk_full": "23d5c3c38c1e4d4f90cac3ce6194ed2a",
    "database_deleted": "269ccbba8b0f405e84c7a71c3889c16f",
    "database_saved": "3d61aa88419f4c51b554d2a648c18ebb",
    "database_not_saved": "d291bcbb300c4b079418328f0612b107",
    "database_replaced": "7dc262f1bd44427b90b42bc27e768a54",
    "socket_made_again": "3435c76d185f42b49ddba28882979018",
    "cannot_listen": "edcc19717b134e24bcb13de7c7f36c3c",
    "cannot_accept": "7f3ef65cbbc14eb6afcc36e2e7b61eff",
    "peer_unseen": "d70ae19ee1414bcbaae43c7398579efb",
    "access_refused": "be225f58227c47ab932bdd98a337bb4d",
    "quota_refused": "276fed545b1149c7898eb2e78a8df2c2",
    "line_refused": "514cc76f130f48b7a85d45cd4c8595ab",
    "lock_broken": "0bf2ff7dafa647ce87e12a55799e810e",
    "registry_json_put_aside": "62ac24942dd8445d8d70d8b88fc10dc0",
    "registry_json_failing": "dcf396f35dcd430b9ffab1a4b7f69628",
    "registry_json_kept_again": "9eaf7b4ea89549f7b44d648f711462d4",
    "registry_json_behind": "4594fa03e3084b0086afe1a8c267d4fb",
    "old_change_refused": "0a38e9dfecb746e2a373b8ce61b52037",
    "old_names_taken_in": "ff1e3b7a37674af7974ef5818eb5e7e8",
    "held_twice": "6bb51461e3544fe99caf6a179bd58283",
    "lab_up": "b129ae631b634577931c8522a8514fa7",
    "lab_away": "03e021f997d04028a8d7aa4987b7c56c",
    "lab_refused": "de3398bc133a48e88dd6e57c734e5085",
    "lab_host_new": "6b5c124f0166411aab736e9211b75e37",
    "held_in_lab_too": "21baad7161744bf8b60eb6c171422142",
    "lost_to_lab": "9723b85b2fb04b359b9b687887f3df22",
    "lab_conflict": "0560f5f5043f4edb8efa552ca35d73a4",
    "lab_change_refused": "df8fae5fef124e22a9fe22454e0550de",
    "fault": "7df30153673e47dc9d6ccf6f8dcd723f",
    "answer_too_large": "805a645f5db545c6a16971183309f6ff",
    "metrics_failing": "e0d48dc93d054003b2a7ec6beb663421",
}


def fields_of(datagram: bytes) -> dict[str, list[str]]:
    """Read a datagram as journald does (systemd.io/JOURNAL_NATIVE_PROTOCOL): every field with its values."""
    found: dict[str, list[str]] = {}
    while datagram:
        line, datagram = datagram.split(b"\n", 1)
        name, equals, value = line.partition(b"=")
        if not equals:
            length = struct.unpack("<Q", datagram[:8])[0]
            value = datagram[8 : 8 + length]
            assert datagram[8 + length : 9 + length] == b"\n"
            datagram = datagram[9 + length :]
        found.setdefault(name.decode(), []).append(value.decode())
    return found


class Logged:
    """A handler, the socket that its journal sends to, and the stream beside it."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(folder / "journal"))
        self.socket.setblocking(False)
        self.journal = journal.Journal(folder / "journal")
        self.stream = io.StringIO()
        self.handler = journal.Handler(self.stream, self.journal, self.clock)
        self.handler.registry = "/lab/registry.json"

    def log(self, level: int, text: str, *args: Any, extra: dict[str, Any] | None = None, exc_info: Any = None) -> None:
        logger = logging.getLogger("madsci_registryd.test")
        record = logger.makeRecord(logger.name, level, "file.py", 1, text, args, exc_info, "function", extra)
        self.handler.handle(record)

    def entry(self) -> dict[str, list[str]]:
        return fields_of(self.socket.recv(1 << 20))

    def entries(self) -> Iterator[dict[str, list[str]]]:
        try:
            while True:
                yield self.entry()
        except BlockingIOError:
            return


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Logged]:
    made = Logged(tmp_path)
    yield made
    made.journal.close()
    made.socket.close()


def test_rare_message_comes_to_the_journal_with_its_id_and_facts(logged: Logged) -> None:
    """An entry has text, priority, program, registry, the message's id and name, and the facts that are known."""
    extra = messages.LOCK_BROKEN(name="arm", uid=0, pid=None)
    logged.log(logging.WARNING, "the lock of %r was broken", "arm", extra=extra)
    assert logged.entry() == {
        "MESSAGE": ["the lock of 'arm' was broken"],
        "PRIORITY": ["4"],
        "SYSLOG_IDENTIFIER": ["madsci-registryd"],
        "CODE_MODULE": ["madsci_registryd.test"],
        "CODE_FUNC": ["function"],
        "MADSCI_REGISTRY": ["/lab/registry.json"],
        "MESSAGE_ID": [messages.LOCK_BROKEN.id],
        "MADSCI_MESSAGE": ["lock_broken"],
        "MADSCI_NAME": ["arm"],
        "MADSCI_UID": ["0"],
    }
    assert logged.stream.getvalue() == ""


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3"), (logging.CRITICAL, "2")],
)
def test_level_is_the_priority_of_syslog(logged: Logged, level: int, priority: str) -> None:
    """`journalctl -p warning` shows warnings and worse."""
    logged.log(level, "text")
    entry = logged.entry()
    assert entry["PRIORITY"] == [priority]
    assert "MESSAGE_ID" not in entry


HOSTILE = "arm\nMESSAGE_ID=00000000000000000000000000000000\nPRIORITY=0\n\x1b[2J\udc80\u2028end"


def test_name_with_newlines_begins_no_field_in_the_journal(logged: Logged) -> None:
    """Whatever a name holds, it is the value of its own field, and one line of the text."""
    logged.log(logging.WARNING, "refused %s", HOSTILE, extra=messages.OLD_CHANGE_REFUSED(name=HOSTILE))
    entry = logged.entry()
    assert entry["PRIORITY"] == ["4"]
    assert entry["MESSAGE_ID"] == [messages.OLD_CHANGE_REFUSED.id]
    assert entry["MADSCI_NAME"] == [HOSTILE.replace("\udc80", "\\udc80")]
    assert entry["MESSAGE"][0].startswith("refused arm\\nMESSAGE_ID=0")
    assert entry["MESSAGE"][0].isprintable()


def test_name_with_newlines_makes_no_line_on_stderr() -> None:
    """On stderr a message is one line, what is not printable escaped; with the short name of a rare one."""
    stream = io.StringIO()
    handler = journal.Handler(stream, None, FakeClock())
    logger = logging.getLogger("madsci_registryd.test")
    extra = messages.OLD_CHANGE_REFUSED(name=HOSTILE)
    handler.handle(logger.makeRecord(logger.name, logging.WARNING, "", 1, "refused %s", (HOSTILE,), None, None, extra))
    line = stream.getvalue()
    assert line.count("\n") == 1 and line[:-1].isprintable()
    at = rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z level=WARNING pid={os.getpid()} at=madsci_registryd.test"
    assert re.fullmatch(rf"{at} id=old_change_refused refused arm\\nMESSAGE_ID=.*\n", line)


def test_traceback_can_be_told_from_messages(logged: Logged) -> None:
    """The lines of a traceback are indented on stderr, also where the error's text pretends to be a message; in the
    journal they belong to the entry."""
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z level=INFO pid=1 at=fake id=stopped stopping")
    except ValueError:
        caught = sys.exc_info()
    logged.log(logging.ERROR, "a request broke", exc_info=caught, extra=messages.FAULT())
    entry = logged.entry()
    assert entry["MESSAGE"][0].startswith("a request broke\nTraceback (most recent call last):")
    assert entry["MESSAGE_ID"] == [messages.FAULT.id]
    logged.handler.journal = None
    logged.log(logging.ERROR, "a request broke", exc_info=caught)
    first, *rest = logged.stream.getvalue().splitlines()
    assert first.endswith("a request broke")
    assert rest and all(line.startswith("    ") for line in rest)


def test_fault_that_ends_the_program_is_a_rare_message() -> None:
    """An error that nobody catches is logged with its traceback under `fault`; the exit status is Python's own, 1."""
    program = "from madsci_registryd import journal; journal.set_up(None); raise ValueError('x')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    assert " level=CRITICAL " in first and " id=fault " in first
    assert rest[-1] == "    ValueError: x"


def test_journal_that_does_not_read_costs_entries_and_no_time(logged: Logged) -> None:
    """When the journal's queue is full, what is logged is dropped: the daemon's loop does not wait for it."""
    for number in range(3000):  # far above net.unix.max_dgram_qlen
        logged.log(logging.DEBUG, "message %d", number)
    received = list(logged.entries())
    assert 0 < len(received) < 3000
    assert received[0]["MESSAGE"] == ["message 0"]
    logged.log(logging.INFO, "again")
    assert logged.entry()["MESSAGE"] == ["again"]


def test_message_goes_to_stderr_where_the_journal_is_gone(logged: Logged, tmp_path: Path) -> None:
    """A journal that has ended, or whose socket is not there, loses no message."""
    logged.socket.close()
    logged.log(logging.INFO, "refused")
    (tmp_path / "journal").unlink()
    logged.log(logging.INFO, "gone")
    assert [line.split()[-1] for line in logged.stream.getvalue().splitlines()] == ["refused", "gone"]


def test_stream_that_is_full_or_closed_ends_nothing() -> None:
    """What can be written nowhere is lost; logging raises nothing."""
    stream = io.StringIO()
    stream.close()
    handler = journal.Handler(stream, None, FakeClock())
    handler.handle(logging.makeLogRecord({"msg": "text", "levelno": logging.INFO, "levelname": "INFO"}))


def test_huge_message_is_cut_and_comes(logged: Logged) -> None:
    """A message and its facts fit a datagram, whatever their length."""
    logged.log(logging.WARNING, "%s", "☃" * 1_000_000, extra=messages.LOCK_BROKEN(name="☃" * 100_000))
    entry = logged.entry()
    assert len(entry["MESSAGE"][0]) == journal.MESSAGE_MAX
    assert len(entry["MADSCI_NAME"][0]) == journal.FACT_MAX


def test_flood_of_one_kind_is_cut_and_told(logged: Logged) -> None:
    """Of one kind of message 30 a minute are logged; the next one after that says how many were not. Other kinds, and
    debug messages, are not touched."""
    count = 0
    for number in range(100):
        logged.log(logging.INFO, "refused a line: %s", number, extra=messages.LINE_REFUSED())
        logged.log(logging.DEBUG, "refused a line: %s", number)
        count += sum("MESSAGE_ID" in entry for entry in logged.entries())
    assert count == journal.LINES_A_MINUTE
    logged.log(logging.INFO, "refused a line: %s", "quota", extra=messages.QUOTA_REFUSED())
    assert logged.entry()["MADSCI_MESSAGE"] == ["quota_refused"]
    logged.clock.advance(60)
    logged.log(logging.INFO, "refused a line: %s", "later", extra=messages.LINE_REFUSED())
    assert logged.entry()["MESSAGE"] == ["refused a line: later (and 70 more of these were left out before)"]
    logged.log(logging.INFO, "refused a line: %s", "last", extra=messages.LINE_REFUSED())
    assert logged.entry()["MESSAGE"] == ["refused a line: last"]


def test_journal_is_used_where_it_reads_stderr_and_nowhere_else(tmp_path: Path) -> None:
    """$JOURNAL_STREAM counts only if it names the device and inode that stderr has: a redirected stderr is not it."""
    with (tmp_path / "stderr").open("w") as stream:
        found = os.fstat(stream.fileno())
        assert journal.is_journal(stream, (found.st_dev, found.st_ino))
        assert not journal.is_journal(stream, (found.st_dev, found.st_ino + 1))
        assert not journal.is_journal(stream, None)
    assert not journal.is_journal(stream, (found.st_dev, found.st_ino))


@pytest.mark.parametrize(
    ("value", "named"), [("9:8765", (9, 8765)), ("", None), ("9", None), ("9:", None), (":7", None), ("a:b", None)]
)
def test_journal_stream_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, named: tuple[int, int] | None
) -> None:
    """Anything but two numbers means that no journal reads stderr."""
    from madsci_registryd.settings import journal_stream

    monkeypatch.setenv("JOURNAL_STREAM", value)
    assert journal_stream() == named
    monkeypatch.delenv("JOURNAL_STREAM")
    assert journal_stream() is None


# the table


def test_ids_of_messages_never_change() -> None:
    """Every message that there ever was has the id that it began with, and each new one is pinned here."""
    assert {message.name: message.id for message in MESSAGES.values()} == PINNED


def test_ids_of_messages_are_random_and_their_own() -> None:
    """Each id is 128 bits that uuid4 made, in the form of the journal, and no two messages share one."""
    ids = [message.id for message in MESSAGES.values()]
    assert len(set(ids)) == len(ids)
    for id in ids:
        assert re.fullmatch(r"[0-9a-f]{32}", id)
        assert uuid.UUID(id).version == 4
    assert {name for name, value in vars(messages).items() if isinstance(value, messages.Message)} == {
        name.upper() for name in MESSAGES
    }


def test_every_message_is_explained() -> None:
    """docs/operations.md has a row for each message and no other: its id, what it means, what to do."""
    section = OPERATIONS.split("\n## Log messages\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([0-9a-f]+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert [(name, id) for name, id, _, _ in rows] == [(message.name, message.id) for message in MESSAGES.values()]
    assert all(meaning.strip() and todo.strip() for _, _, meaning, todo in rows)


def test_every_warning_of_the_daemon_is_a_rare_message_with_an_id() -> None:
    """No log call of the daemon above `info` is without an id, and every message of the table is said somewhere."""
    sources = {path: path.read_text() for path in DAEMON.glob("*.py")}
    calls: Callable[[str], list[str]] = re.compile(
        r"^ *log\.(?:warning|error|critical|exception)\((.*?\n? *)\)$", re.MULTILINE | re.DOTALL
    ).findall
    bare = [f"{path.name}: {call}" for path, text in sources.items() for call in calls(text) if "extra=" not in call]
    assert bare == []
    used = set(re.findall(r"messages\.([A-Z_]+)\b", "\n".join(sources.values())))
    assert {message.name.upper() for message in MESSAGES.values()} - used == set()
