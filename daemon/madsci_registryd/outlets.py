"""Where metrics go by themselves: a listener on a loopback address, and a file for node_exporter.

The loop renders the text, at most every RENDER_S, and only where one of the two is configured. The listener's thread
serves the text that it was given last and knows nothing else. It takes one connection at a time and cuts each one off
after PATIENCE_S, whatever came of it: whoever keeps connections open costs the daemon no descriptors, which libzmq
would not survive, and keeps nobody else from the metrics for longer. A text that is too old is not served: a loop that
hangs shall not look well.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from madsci_registryd import messages
from madsci_registryd.clock import Clock, Timers

log = logging.getLogger(__name__)

RENDER_S = 10.0
"""Prometheus asks every 15 to 60 s."""
STALE_S = 3 * RENDER_S
PATIENCE_S = 2.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Listener(HTTPServer):
    """Serves the last text. Its thread ends with `stop`."""

    allow_reuse_port = False  # a port that another program has is taken
    patience_s = PATIENCE_S

    def __init__(self, address: tuple[str, int], clock: Clock) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Request)
        self._clock = clock
        self._last: tuple[float, bytes] = (-STALE_S, b"")
        self._served: socket.socket | None = None
        self._thread = threading.Thread(target=self.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Bind as a plain TCP server does; HTTPServer asks the name service for the host's name."""
        TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; where descriptors have run out, not again at once: it waits in the backlog."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one connection. A timeout of its socket would begin anew with each byte that comes."""
        self._served = request
        limit = threading.Timer(self.patience_s, _cut, (request,))
        limit.daemon = True
        limit.start()
        try:
            super().finish_request(request, client_address)
        finally:
            limit.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: who asked has gone in the middle of it."""
        log.debug("a request for metrics was broken off")

    def give(self, text: bytes) -> None:
        """Serve this text from now on."""
        self._last = self._clock.monotonic(), text  # one assignment: the other thread sees this or the one before

    def fresh(self) -> bytes | None:
        """Return the text, None where the loop has not given one for too long."""
        at, text = self._last
        return text if self._clock.monotonic() - at < STALE_S else None

    def stop(self) -> None:
        """End the thread; the connection that it is at is cut off."""
        if self._served is not None:
            _cut(self._served)
        self.shutdown()
        self._thread.join()
        self.server_close()


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


class _Request(BaseHTTPRequestHandler):
    server: Listener
    server_version, sys_version = "madsci-registryd", ""

    def do_GET(self) -> None:
        text = self.server.fresh() if self.path.split("?")[0] == "/metrics" else b""
        if not text:
            self.send_error(404 if text is not None else 503)
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: whoever asks is no event."""


class Outlets:
    """The listener and the file, as configured. Belongs to the loop's thread."""

    def __init__(
        self,
        clock: Clock,
        timers: Timers,
        render: Callable[[], str],
        *,
        listen: tuple[str, int] | None,
        file: Path | None,
    ) -> None:
        self._clock = clock
        self._render = render
        self._address = listen
        self._file = file
        self._listener: Listener | None = None
        self._faults: list[str] = []
        if listen is not None or file is not None:
            self._look()
            timers.every(RENDER_S, self._look)

    def _look(self) -> None:
        """Give out what is so now. What cannot be done is tried again; the registry is served all the same."""
        text = self._render().encode()
        faults = []
        listen = f"{self._address[0]} port {self._address[1]}" if self._address else None
        for give, where in ((self._listen, listen), (self._write, self._file)):
            try:
                give(text)
            except OSError as error:
                faults.append(f"{where}: {error.strerror}")
        if faults and faults != self._faults:
            log.warning("metrics cannot be given out: %s", "; ".join(faults), extra=messages.METRICS_FAILING())
        self._faults = faults

    def _listen(self, text: bytes) -> None:
        if self._address is None:
            return
        if self._listener is None:
            self._listener = Listener(self._address, self._clock)
        self._listener.give(text)

    def _write(self, text: bytes) -> None:
        """Replace the file whole, readable by everybody. Not synced: after a power loss it is written anew."""
        if self._file is None:
            return
        fd, name = tempfile.mkstemp(dir=self._file.parent, prefix=f".{self._file.name}.")  # no .prom: nobody reads it
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(self._file)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise

    def close(self) -> None:
        """Stop listening, and remove the file: what it says is over."""
        if self._listener is not None:
            self._listener.stop()
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()
