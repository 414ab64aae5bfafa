"""A connection of the lab's server: uvicorn's, with the bounds that strangers meet before any route does.

Whoever can reach the port can open connections. That shall not cost those who are served: a connection above the limit
is closed at once, and those that were there before go on (uvicorn would refuse the requests of all); one on which a
request has begun, or not even that, must have it whole in time. (Between requests, uvicorn counts.)
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS_MAX = 2000
"""A daemon has some four: its requests, and the feed."""
REQUEST_S = 20.0
"""For 1 MiB, 50 KiB/s. A host gives up much sooner."""


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._connections_max, self.limit_concurrency = self.config.limit_concurrency or CONNECTIONS_MAX, None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self._connections_max:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect()
        else:
            self._expect_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect(self) -> None:
        """Wait for the rest of a request, no longer than from its beginning."""
        if self._late is None:
            self._late = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
