"""Speaks with etcd through the JSON gateway of its members (/v3/...). The lab's only httpx.

Rules
- Any member answers anything. A try that is not answered, or with 5xx, goes on at the next one: its outcome is unknown,
  so whoever sends a Txn makes a repeat of it harmless (etcd_transaction.py). 4xx is a definite no.
- A try is short (a member that lost its leader answers after 7 s only, or is paused), and there is a last instant.
- Reads are linearizable: etcd's default.
- A token that has run out (401) is got anew, once a call, of the member that is asked then: others may not know it yet.
- All answers are of one cluster. An endpoint of another one, or the same one made anew of a backup under a new token,
  is as good as silent: half a lab in each of two clusters would be worse.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import httpx

from madsci_registry.errors import InternalError, NoSpaceError, UnavailableError
from madsci_registry_lab.clock import SystemClock
from madsci_registry_lab.etcd_access import EtcdAccess
from madsci_registry_lab.etcd_wire import Done, Found, News, Range, Txn, Watch, done_of, found_of, news_of, revision_of

TRY_S = (0.5, 0.5, 0.5, 0.5, 1.0, 2.0)
"""How long each try may take, the last one for all after it. A new leader is there after 1 to 1.6 s, and what was
proposed to a member meanwhile is dropped without a word; a slow cluster gets more time."""
TOTAL_S = 8.0
"""After that the outcome stays unknown. Clients of the lab wait longer."""
PAUSE_S = 0.05
"""Before the next member is asked where one refused at once."""
QUIET_S = 2.0
"""A watch that says nothing for so long is begun anew at the next member: its own may be paused, or cut off."""
CONNECTIONS_MAX = 128

_UNAUTHENTICATED, _EXHAUSTED, _OUT_OF_RANGE = 16, 8, 11
"""gRPC's codes, which the gateway has in its answers."""


class EtcdRefusedError(InternalError):
    """etcd said a definite no; nothing changed. `status` is HTTP's, `grpc` gRPC's code."""

    status: int | None = None
    grpc: int | None = None


class RevisionCompactedError(EtcdRefusedError):
    """A revision that was asked for is not kept any more."""


class EtcdGateway:
    """A lab's etcd. Thread-safe; `close` ends watches too."""

    def __init__(self, access: EtcdAccess, *, total_s: float = TOTAL_S) -> None:
        self.access = access
        self._total_s = total_s
        self._clock = SystemClock()
        limits = httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX)
        self._verify = access.tls or False  # without TLS there is nothing to verify, and no authorities to load
        self._http = httpx.Client(verify=self._verify, trust_env=False, limits=limits)
        self._turn = 0
        """Which member is asked: the last one that answered."""
        self._watch_turn = len(access.endpoints) - 1
        """Which one is watched: another one, where there are several."""
        self._token = ""
        self._cluster = ""
        self.is_replaced = False
        """Who answered last is another cluster than at first: this one was made anew."""
        self._guard = threading.Lock()
        self._watching: set[socket.socket] = set()
        self._over = False

    def close(self) -> None:
        """End watches and connections."""
        with self._guard:
            self._over = True
            for connection in self._watching:
                with suppress(OSError):  # the base class's: an SSL socket's own would first take the reader's state
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self._http.close()

    def range(self, request: Range) -> Found:
        """Read. Raises: see call."""
        return found_of(self.call("/v3/kv/range", request.wire()))

    def txn(self, request: Txn) -> Done:
        """Do a transaction. Raises: see call; UnavailableError: its outcome is unknown."""
        return done_of(self.call("/v3/kv/txn", request.wire()))

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request to one member after the other until one answers.

        Raises:
            UnavailableError: none did in time; what was asked may have happened.
            NoSpaceError: etcd's quota is reached; nothing changed.
            EtcdRefusedError: it cannot be; nothing changed.
        """
        content = json.dumps(body).encode()
        until, trouble, tries, renewed = self._clock.monotonic() + self._total_s, "", 0, False
        while (left := until - self._clock.monotonic()) > 0 and not self._over:
            turn, begun = self._turn, self._clock.monotonic()
            try:
                answer = self._post(self._member(turn), path, content, min(TRY_S[min(tries, len(TRY_S) - 1)], left))
                if answer.is_success:
                    return self._ours(answer)
            except (httpx.HTTPError, ValueError) as error:  # nothing, or something that is not of this etcd
                trouble = f"{self._member(turn)}: {_word(error)}"
            else:
                trouble = f"{self._member(turn)}: {answer.status_code} {_said(answer)[1]}"
                if not _is_passing(answer):
                    if renewed or not self._renew(answer):
                        _refuse(answer, path)
                    renewed = True
                    continue
            self._move_on(turn)
            tries += 1
            if self._clock.monotonic() - begun < PAUSE_S:
                time.sleep(PAUSE_S * random.uniform(0.5, 1.5))
        raise UnavailableError(f"etcd does not answer: {trouble or 'this lab registry ends'}")

    def get(self, member: str, path: str) -> httpx.Response:
        """Get a page of one member. Raises UnavailableError."""
        try:
            return self._http.get(member + path, timeout=TRY_S[-1])
        except httpx.HTTPError as error:
            raise UnavailableError(f"{member}: {_word(error)}") from None

    def ask(self, member: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask one member alone. Raises: see call."""
        try:
            answer = self._post(member, path, json.dumps(body).encode(), TRY_S[-1])
            if not answer.is_success and self._renew(answer):
                answer = self._post(member, path, json.dumps(body).encode(), TRY_S[-1])
        except httpx.HTTPError as error:
            raise UnavailableError(f"{member}: {_word(error)}") from None
        if not answer.is_success:
            _refuse(answer, path)
        try:
            return self._ours(answer)
        except ValueError as error:
            raise UnavailableError(f"{member}: {error}") from None

    @contextmanager
    def watch(self, request: Watch) -> Iterator[Iterator[News]]:
        """Begin a watch; what comes ends with UnavailableError when the member says nothing, or nothing more."""
        member = self._member(self._watch_turn)
        try:
            with (
                httpx.Client(verify=self._verify, trust_env=False, timeout=QUIET_S) as http,
                http.stream(
                    "POST",
                    f"{member}/v3/watch",
                    json=request.wire(),
                    # With it a member that has lost its leader says so; else it would be silent.
                    headers={**self._headers(), "Grpc-Metadata-hasleader": "true"},
                ) as answer,
            ):
                if not answer.is_success:
                    answer.read()
                    self._renew(answer)
                    raise UnavailableError(f"etcd: {answer.status_code} {_said(answer)[1]}")
                with self._interruptible(answer):
                    yield _news(answer)
        except (httpx.HTTPError, ValueError) as error:
            self._watch_turn += 1
            raise UnavailableError(f"{member}: {_word(error)}") from None
        except UnavailableError:
            self._watch_turn += 1
            raise

    @contextmanager
    def _interruptible(self, answer: httpx.Response) -> Iterator[None]:
        connection = answer.extensions["network_stream"].get_extra_info("socket")
        with self._guard:
            if self._over:
                raise UnavailableError("this lab registry ends")
            self._watching.add(connection)
        try:
            yield
        finally:
            with self._guard:
                self._watching.discard(connection)

    def _ours(self, answer: httpx.Response) -> dict[str, Any]:
        """Return what an answer says. Raises ValueError: it is of another cluster than the first one, or none."""
        said = _answer(answer)
        cluster = said.get("header", {}).get("cluster_id")
        if cluster is None:  # of an alarm, for one
            return said
        with self._guard:
            self._cluster = self._cluster or cluster
            self.is_replaced = self._cluster != cluster
        if self.is_replaced:
            raise ValueError("is of another cluster than those asked before")
        return said

    def _member(self, turn: int) -> str:
        return self.access.endpoints[turn % len(self.access.endpoints)]

    def _move_on(self, turn: int) -> None:
        """Ask the next member from now on, unless another thread has seen to that."""
        with self._guard:
            if self._turn == turn:
                self._turn += 1

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token else {}

    def _post(self, member: str, path: str, content: bytes, timeout_s: float) -> httpx.Response:
        headers = {"Content-Type": "application/json", **self._headers()}
        try:
            return self._http.post(member + path, content=content, headers=headers, timeout=timeout_s)
        except RuntimeError as error:  # the client was closed meanwhile
            raise UnavailableError("this lab registry ends") from error

    def _renew(self, answer: httpx.Response) -> bool:
        """Get a new token where that is what was missing; tell whether that was done."""
        code, said = _said(answer)
        stale = code == _UNAUTHENTICATED or "user name is empty" in said or "auth store is old" in said
        if not stale or self.access.user is None:
            return False
        body = json.dumps({"name": self.access.user, "password": self.access.password}).encode()
        with suppress(httpx.HTTPError, ValueError):
            given = self._http.post(
                str(answer.url.join("/v3/auth/authenticate")), content=body, timeout=TRY_S[-1]
            )  # fmt: skip
            if given.is_success:
                self._token = str(_answer(given).get("token", ""))
                return True
        return False


def _word(error: Exception) -> str:
    return str(error) or type(error).__name__


def _answer(answer: httpx.Response) -> dict[str, Any]:
    """Return what an answer says. Raises ValueError: it is none of etcd, which tells its revision with all it reads."""
    said = answer.json()
    if isinstance(said, dict) and ("/kv/" not in answer.url.path or revision_of(said)):
        return said
    raise ValueError("what answers there is no etcd")


def _news(answer: httpx.Response) -> Iterator[News]:
    for line in answer.iter_lines():
        if line:
            yield _news_of(line)
    raise UnavailableError("etcd ended a watch")


def _news_of(line: str) -> News:
    try:
        said = json.loads(line)
        if "error" in said:
            raise UnavailableError(f"etcd ended a watch: {said['error'].get('message', said['error'])}")
        return news_of(said["result"])
    except (TypeError, KeyError, AttributeError) as error:
        raise UnavailableError(f"what a watch brought is none of etcd's: {error!r}") from None


def _said(answer: httpx.Response) -> tuple[int, str]:
    """Return gRPC's code and the message of an answer that is no success; 3.4 and 3.5 differ in their fields."""
    try:
        said = answer.json()
        return int(said.get("code", 0)), str(said.get("message") or said.get("error") or "")
    except (ValueError, AttributeError):
        return 0, answer.text[:200]


def _is_passing(answer: httpx.Response) -> bool:
    """Tell whether another try may be answered: a member without a leader, or with too much to do."""
    code, said = _said(answer)
    return answer.status_code >= 500 or (code == _EXHAUSTED and "space" not in said)


def _refuse(answer: httpx.Response, path: str) -> NoReturn:
    if _is_passing(answer):
        raise UnavailableError(f"etcd: {answer.status_code} {_said(answer)[1]}")
    code, said = _said(answer)
    if code == _EXHAUSTED:
        raise NoSpaceError(f"etcd has reached its quota: {said}")
    cls = RevisionCompactedError if code == _OUT_OF_RANGE and "compacted" in said else EtcdRefusedError
    raise cls(f"etcd refuses {path}: {answer.status_code} {said}", status=answer.status_code, grpc=code)
