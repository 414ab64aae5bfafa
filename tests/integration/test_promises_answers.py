"""Promises 9 and 10: four different answers, and bad input that gets a named error and harms nobody."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from conftest import Workers
from helpers import PATIENCE_S, DaemonProcess
from madsci_registry import RegistryClient, errors
from madsci_registry.protocol import FRAME_MAX_BYTES, PROTOCOL_VERSION


def test_absent_held_unreachable_and_silent_are_different_answers(daemon: DaemonProcess, workers: Workers) -> None:
    """Absent is None, held is HeldError, no daemon is UnavailableError, no answer is RegistryTimeoutError for a read
    and UnknownOutcomeError for a write; never one for the other."""
    holder = workers()
    holder.ask("resolve", "arm")
    with RegistryClient(daemon.registry, timeout=0.5, autostart=False) as client:
        assert client.lookup("nobody") is None
        with pytest.raises(errors.NotFoundError):
            client.get("nobody")
        with pytest.raises(errors.HeldError):
            client.resolve("arm", "node")
        daemon.signal(signal.SIGSTOP)
        try:
            with pytest.raises(errors.UnknownOutcomeError):
                client.resolve("other", "node")
            with pytest.raises(errors.RegistryTimeoutError):
                client.lookup("arm")
        finally:
            daemon.signal(signal.SIGCONT)
        assert client.lookup("arm") is not None
        daemon.kill()
        with pytest.raises(errors.UnavailableError) as away:
            client.lookup("arm")
        assert away.value.hint


def test_lookup_without_a_registry_is_unavailable_and_makes_nothing(registry_path: Path) -> None:
    """A read where no registry is says unavailable; it starts no daemon and makes no file."""
    with RegistryClient(registry_path, timeout=2.0) as client, pytest.raises(errors.UnavailableError):
        client.lookup("arm")
    assert list(registry_path.parent.iterdir()) == []


class Raw:
    """A session spoken by hand, as another language would."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream.settimeout(PATIENCE_S)
        self.stream.connect(str(daemon.lifeline))
        self.stream.sendall(b'{"op":"hello","v":1}\n')
        self.lines = self.stream.makefile("rb")
        self.welcome = json.loads(self.lines.readline())
        self.context = zmq.Context()
        self.request = self.context.socket(zmq.REQ)
        self.request.setsockopt(zmq.LINGER, 0)
        self.request.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self.request.connect(f"ipc://{daemon.socket}")
        self.seq = 0

    def message(self, op: str, **fields: Any) -> dict[str, Any]:
        self.seq += 1
        base = {"op": op, "v": 1, "token": self.welcome["token"], "epoch": self.welcome["epoch"], "seq": self.seq}
        return {**base, **fields}

    def send(self, frame: bytes) -> dict[str, Any]:
        self.request.send(frame)
        reply = json.loads(self.request.recv())
        assert isinstance(reply, dict)
        return reply

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return self.send(json.dumps(self.message(op, **fields)).encode())

    def close(self) -> None:
        self.lines.close()
        self.stream.close()
        self.request.close()
        self.context.term()


@pytest.fixture
def raw(daemon: DaemonProcess) -> Iterator[Raw]:
    session = Raw(daemon)
    yield session
    session.close()


NOT_JSON = [
    b"", b"\0", b"\xff\xfe", b"{", b"[]", b"null", b"7", b'"text"', b"[" * 200_000, b'{"op":' * 50_000,
    b'{"op": "lookup", "v": 1e999}', b'{"op": "lookup", "v": NaN}', b'{"op": "lookup", "name": "\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("frame", NOT_JSON, ids=range(len(NOT_JSON)))
def test_frame_that_is_no_request_is_refused(raw: Raw, frame: bytes) -> None:
    """A frame that is no request is answered `invalid`, and the next request is served."""
    assert raw.send(frame)["error"]["code"] == "invalid"
    assert raw.ask("lookup", name="arm") == {"ok": {"id": None}}


BAD_FIELDS = [
    ("invalid", "op", {"op": "lookup_all"}),
    ("invalid", "colour", {"op": "lookup", "name": "a", "colour": "red"}),
    ("invalid", "name", {"op": "lookup"}),
    ("invalid", "name", {"op": "lookup", "name": 7}),
    ("invalid", "name", {"op": "resolve", "name": "", "component_type": "node", "instance": "i"}),
    ("invalid", "name", {"op": "resolve", "name": "a\nb", "component_type": "node", "instance": "i"}),
    ("invalid", "name", {"op": "resolve", "name": "e\u0301", "component_type": "node", "instance": "i"}),
    ("invalid", "name", {"op": "resolve", "name": "n" * 256, "component_type": "node", "instance": "i"}),
    ("invalid", "component_type", {"op": "resolve", "name": "a", "component_type": "robot", "instance": "i"}),
    ("invalid", "wait_s", {"op": "resolve", "name": "a", "component_type": "node", "instance": "i", "wait_s": -1}),
    ("invalid", "metadata", {"op": "resolve", "name": "a", "component_type": "node", "instance": "i",
                             "metadata": {"k": [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}}),
    ("too_large", "metadata", {"op": "resolve", "name": "a", "component_type": "node", "instance": "i",
                               "metadata": {"k": "x" * 17_000}}),
    ("session_required", None, {"op": "lookup", "name": "a", "token": "f" * 64}),
    ("stale_epoch", None, {"op": "lookup", "name": "a", "epoch": 1}),
    ("protocol_version", None, {"op": "lookup", "name": "a", "v": PROTOCOL_VERSION + 1}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "field", "message"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_request_with_a_bad_field_is_refused_by_name(
    raw: Raw, code: str, field: str | None, message: dict[str, Any]
) -> None:
    """A bad field is refused with a stable code and the field's name; nothing is made of it."""
    error = raw.send(json.dumps({**raw.message("lookup"), **message}).encode())["error"]
    assert error["code"] == code
    if field:
        assert field in error["field"]
    assert raw.ask("list") == {"ok": {"components": [], "cursor": None}}


def test_oversized_frame_ends_its_own_connection_only(raw: Raw, daemon: DaemonProcess) -> None:
    """A frame over 1 MiB closes the connection that sent it; the daemon and other clients go on."""
    pid = daemon.pid
    raw.request.send(b" " * (FRAME_MAX_BYTES + 1))
    with RegistryClient(daemon.registry) as client:
        assert client.lookup("arm") is None
        assert client.status()["pid"] == pid


@pytest.mark.parametrize(
    "line",
    [b"\n", b"no json\n", b"[]\n", b'{"op":"hello","v":99}\n', b'{"op":"resume","v":1,"token":"x"}\n', b"\xff\n"],
    ids=range(6),
)
def test_lifeline_that_begins_badly_is_refused_and_closed(daemon: DaemonProcess, line: bytes) -> None:
    """A first line that is no hello or resume is answered `refused` with a code, and the connection is closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(PATIENCE_S)
        stream.connect(str(daemon.lifeline))
        stream.sendall(line)
        answer = b"".join(iter(lambda: stream.recv(65536), b""))
    refused = json.loads(answer)
    assert refused["op"] == "refused"
    assert refused["error"]["code"] in ("invalid", "protocol_version", "session_required")


def test_bad_request_in_a_batch_spoils_no_neighbour(daemon: DaemonProcess, workers: Workers) -> None:
    """Requests that fail change nothing for the others that are decided with them."""
    crowd = [workers() for _ in range(4)]
    for turn in range(25):
        for number, worker in enumerate(crowd):
            name = "clash" if number % 2 else f"good-{number}-{turn}"
            kind = ("node", "module")[number // 2] if number % 2 else "node"
            worker.tell("resolve", name, kind, acquire_lock=False)
        answers = [_answer(worker) for worker in crowd]
        assert answers[0] == answers[2] == "ok"
        assert sorted({answers[1], answers[3]}) == ["ok", "wrong_type"]
    with RegistryClient(daemon.registry) as client:
        assert len(client.list("good-*")) == 50


def _answer(worker: Any) -> str:
    try:
        worker.answer()
    except errors.RegistryError as error:
        return error.code
    return "ok"


def test_release_said_before_a_stop_is_done(daemon: DaemonProcess, raw: Raw) -> None:
    """What a client said on its lifeline before the daemon was told to stop is done before it ends."""
    ok = raw.ask("resolve", name="arm", component_type="node", instance="i")["ok"]
    daemon.signal(signal.SIGSTOP)
    line = {"op": "release", "instance": "i", "name": "arm", "fencing_token": ok["fencing_token"]}
    raw.stream.sendall(json.dumps(line).encode() + b"\n")
    daemon.signal(signal.SIGTERM)
    daemon.signal(signal.SIGCONT)
    assert daemon.wait() == 0
    daemon.start()
    with RegistryClient(daemon.registry, autostart=False) as client:
        assert not client.get("arm").locked


def test_line_that_is_no_message_ends_the_connection_and_the_session_resumes(raw: Raw) -> None:
    """Rubbish on a lifeline is refused and cuts the connection, so that a flood of it ends; locks can be resumed."""
    raw.ask("resolve", name="arm", component_type="node", instance="i")
    raw.stream.sendall(b"\n" * 1000)
    assert json.loads(raw.lines.readline())["op"] == "refused"
    assert raw.lines.readline() == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as again:
        again.settimeout(PATIENCE_S)
        again.connect(raw.stream.getpeername())
        again.sendall(json.dumps({"op": "resume", "token": raw.welcome["token"]}).encode() + b"\n")
        with again.makefile("rb") as lines:
            assert [lock["name"] for lock in json.loads(lines.readline())["held"]] == ["arm"]
