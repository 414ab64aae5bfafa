"""Requests to the lab's registry over HTTP: one answer, or one error that says what it was. The daemon's only httpx.

Rules
- What comes back is data. Only an answer that says that it is a lab registry's counts: anything else, a 404 above all,
  is no answer. What no answer is, is LabUnavailableError.
- Nothing is sent anywhere but to the URLs of the settings: no proxy of the environment, no redirect.
- A request ends in time, whatever the other side does: slowly, endlessly, or not at all. (But for the lookup of its
  host's name: who waits for an answer counts the time for itself.)
"""

from __future__ import annotations

import json
import logging
import ssl
import threading
from collections.abc import Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, NamedTuple

import httpcore
import httpx

from madsci_registry.errors import LabUnavailableError
from madsci_registry.names import name_fault
from madsci_registryd.clock import SystemClock
from madsci_registryd.faults import BadConfiguration
from madsci_registryd.lab_answers import refusal_of

MARK = "x-madsci-lab-registry"
"""The header by which a lab registry says what it is."""
MARK_VALUE = "1"
ANSWER_MAX_BYTES = 4 << 20
"""The longest, to a keepalive with 10,000 locks of long names, has 3 MiB."""
TOKEN_FILE_MAX_BYTES = 64 * 1024
_SAID_CHARS = 200
_now = SystemClock().monotonic

for _noisy in ("httpx", "httpcore"):  # they would log each request
    logging.getLogger(_noisy).setLevel(logging.WARNING)


class Pass(NamedTuple):
    """What lets this host into the lab."""

    host: str
    token: str


def read_pass(path: Path) -> Pass:
    """Read this host's line `HOST TOKEN` of the lab's token file; `#` begins a comment.

    Raises:
        BadConfiguration: it cannot be read, others may read it, or it has no such line; which no message holds.
    """
    where = f"lab.token_file: {path}"
    try:
        with path.open("rb") as file:
            if path.stat().st_mode & 0o007:
                raise BadConfiguration(f"{where} can be read by everybody: chmod o= {path}")
            text = file.read(TOKEN_FILE_MAX_BYTES).decode()
    except OSError as error:
        raise BadConfiguration(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadConfiguration(f"{where} is not UTF-8") from None
    lines = [words for line in text.splitlines() if (words := line.split("#", 1)[0].split())]
    if len(lines) != 1 or len(lines[0]) != 2 or not lines[0][1].isascii() or name_fault(lines[0][0]):
        raise BadConfiguration(f"{where} is not one line: HOST TOKEN, as the lab's own token file has it for this host")
    return Pass(*lines[0])


class Deadline(threading.local):
    """Until when (monotonic) what this thread asks is to be over."""

    until = 0.0

    def left(self, timeout: float | None) -> float:
        """Return how long one step may take. Raises httpcore.ReadTimeout: there is no time left."""
        left_s = self.until - _now()
        if left_s <= 0:
            raise httpcore.ReadTimeout("it took too long")
        return left_s if timeout is None else min(timeout, left_s)


class _Stream(httpcore.NetworkStream):
    """A connection whose steps end with the thread's deadline: by itself each may take as long as all together."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left(timeout))
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    """Makes such connections."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **more: Any
    ) -> httpcore.NetworkStream:
        stream = super().connect_tcp(host, port, self._deadline.left(timeout), *args, **more)
        return _Stream(stream, self._deadline)


class _Transport(httpx.HTTPTransport):
    """httpx's own, over such connections."""

    def __init__(self, verify: ssl.SSLContext | bool, deadline: Deadline) -> None:
        context = httpx.create_ssl_context(verify=verify, trust_env=False)
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.ConnectionPool(ssl_context=context, network_backend=_Backend(deadline))


class Gateway:
    """The lab, by one or several URLs of equal services. Threads may share it."""

    def __init__(self, urls: Sequence[str], token: str | None = None, ca_file: Path | None = None) -> None:
        """Connect to nobody yet.

        Args:
            urls: of the same lab; one that does not answer is left for the next one.
            token: this host's, sent with each request.
            ca_file: certificates (PEM) that the lab's is to be signed by; None: those of the system.

        Raises:
            BadConfiguration: `ca_file` holds none.
        """
        self._urls = list(urls)
        self._at = 0
        try:
            verify = ssl.create_default_context(cafile=str(ca_file)) if ca_file is not None else True
        except (OSError, ssl.SSLError) as error:
            raise BadConfiguration(f"lab.ca_file: {ca_file}: {error}") from None
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._deadline = Deadline()
        self._client = httpx.Client(
            transport=_Transport(verify, self._deadline),
            headers=headers,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none is taken
            trust_env=False,
            follow_redirects=False,
        )

    @property
    def url(self) -> str:
        """Which of the lab's services is asked now."""
        return self._urls[self._at]

    def post(self, route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        """Ask the lab, of several services the first one that answers.

        Args:
            route: such as `/registry/lock`.
            body: what is asked, JSON.
            within_s: for all of it.

        Raises:
            LabUnavailableError: nobody answered in time, or not as a lab does; what was asked for may have been done.
            RegistryError: what the lab said no with.
        """
        until, first, count = _now() + within_s, self._at, len(self._urls)
        text = json.dumps(body, ensure_ascii=False).encode()
        for n in range(count):
            at, now = (first + n) % count, _now()
            try:
                return self._exchange(self._urls[at], route, text, now + (until - now) / (count - n))
            except LabUnavailableError:
                self._at = (at + 1) % count
                if n == count - 1:
                    raise
        raise AssertionError("there is one URL at least")

    def _exchange(self, url: str, route: str, text: bytes, until: float) -> dict[str, Any]:
        try:
            status, marked, said = self._send(url + route, text, until)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise LabUnavailableError(f"{url}: {type(error).__name__}: {error}") from None
        if not marked:
            raise LabUnavailableError(f"{url} answered {status} and does not say that it is a lab registry")
        try:
            answer = json.loads(said, parse_constant=_refuse)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise LabUnavailableError(f"{url} answered {status} with something else than a JSON object")
        if 200 <= status < 300:
            return answer
        refusal = refusal_of(answer)
        if refusal is None or status >= 500 or status == 429:
            shown = str(answer.get("detail"))[:_SAID_CHARS]
            raise LabUnavailableError(f"{url} answered {status}: {shown}")
        raise refusal

    def _send(self, url: str, text: bytes, until: float) -> tuple[int, bool, bytes]:
        """Send one request; return the status, whether a lab registry says so, and the body.

        Raises: httpx.HTTPError, OSError, ValueError: there was no whole answer in time, or it was too long.
        """
        left_s = until - _now()
        if left_s <= 0:
            raise ValueError("there was no time left for it")
        headers = {"Content-Type": "application/json"}
        self._deadline.until = until
        with self._client.stream("POST", url, content=text, headers=headers, timeout=left_s) as response:
            said = bytearray()
            for piece in response.iter_raw():
                said += piece
                if len(said) > ANSWER_MAX_BYTES:
                    raise ValueError(f"the answer is longer than {ANSWER_MAX_BYTES} bytes")
            return response.status_code, response.headers.get(MARK) == MARK_VALUE, bytes(said)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
