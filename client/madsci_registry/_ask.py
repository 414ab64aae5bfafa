"""One request, before and while it is asked: what it says, how long it may take, what was heard of it so far."""

from __future__ import annotations

import enum
import time
from typing import Any

from madsci_registry import protocol
from madsci_registry._ledger import Call
from madsci_registry._lifeline import Connection
from madsci_registry.errors import (
    InvalidError,
    RegistryError,
    RegistryTimeoutError,
    TooLargeError,
    UnknownOutcomeError,
)


class Start(enum.Enum):
    """What a request may do where no daemon answers."""

    NEVER = "say at once that none is there"
    WAIT = "wait for one"
    EXISTING = "start one if the registry exists"
    MAKE = "start one, make the folder"


class Moved(Exception):
    """A request that only made sense on one connection found that it has ended."""


class Ask:
    """One request: what it says, how long it may take, and what was heard of it so far."""

    def __init__(
        self,
        body: dict[str, Any],
        timeout_s: float,
        *,
        start: Start = Start.EXISTING,
        is_write: bool = False,
        wait_s: float = 0.0,
        only: Connection | None = None,
        call: Call | None = None,
    ) -> None:
        self.body = body
        self.timeout_s = timeout_s
        self.start = start
        self.is_write = is_write
        self.only = only
        """The connection that it must go over."""
        self.call = call or Call("", ())
        self.wait_until = time.monotonic() + wait_s
        self.deadline = self.wait_until + timeout_s
        self.waits = wait_s > 0
        self.is_in_doubt = False
        """It was sent, and what became of it is not known."""
        self.session: str | None = None
        """Whose session it was asked in last."""

    def frame(self, connection: Connection) -> bytes:
        """Encode it for a connection, with what is left of its wait."""
        message = {**self.body, **connection.stamp, "seq": self.call.seq}
        if self.waits:
            left_s = max(0.0, self.wait_until - time.monotonic())
            message["wait_s"] = min(left_s, protocol.WAIT_MAX_S)
            if self.body["op"] == "resolve":
                message["renew"] = left_s > protocol.WAIT_MAX_S
        return encode(message)

    def unanswered(self) -> RegistryError:
        """Say what it means that no answer came: a write that was sent may have been done."""
        if self.is_write and self.is_in_doubt:
            return UnknownOutcomeError(f"{self.body['op']} was sent and not answered in time: it may have been done")
        return RegistryTimeoutError(f"no answer to {self.body['op']} in time ({self.timeout_s:g} s)")

    def answer_by(self) -> float:
        """Say by which monotonic instant the next answer is due."""
        now = time.monotonic()
        left_s = min(max(0.0, self.wait_until - now), protocol.WAIT_MAX_S)
        return min(self.deadline, now + left_s + self.timeout_s)


def encode(message: dict[str, Any]) -> bytes:
    """Return a request as a frame. Raises: InvalidError, TooLargeError."""
    try:
        frame = protocol.encode(message)
    except UnicodeEncodeError:
        bad = next((k for k, v in message.items() if isinstance(v, str) and not _is_text(v)), "request")
        raise InvalidError(f"{bad}: holds a lone surrogate, which is not text", field=bad, reason="no text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError(f"request: is no JSON: {error}", field="request", reason="is no JSON") from None
    if len(frame) > protocol.FRAME_MAX_BYTES:
        reason = f"is {len(frame)} bytes, at most {protocol.FRAME_MAX_BYTES} are allowed"
        raise TooLargeError(f"request: {reason}", field="request", reason=reason)
    return frame


def encode_stamped(body: dict[str, Any], stamp_json: str, seq: int) -> bytes:
    """Return a request as a frame, its stamp encoded once for the connection. Raises: as `encode`."""
    try:
        frame = f'{{"seq":{seq},{stamp_json},{protocol.encode_text(body)[1:]}'.encode()
    except (TypeError, ValueError, RecursionError):
        return encode(body)  # which says what is wrong
    return frame if len(frame) <= protocol.FRAME_MAX_BYTES else encode({**body, "seq": seq})


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
