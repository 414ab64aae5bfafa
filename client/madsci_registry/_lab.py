"""The lab registry that a client was given by URL. The client's only httpx.

An IdentityResolver asks by the routes that MADSci's own documents:

    GET  {lab}/registry/resolve/{name}           200 {"id": ULID, "component_type": ...}; 404: no such name
    POST {lab}/registry/entries/{name}           {"id", "component_type", "metadata", "acquire_lock", "lock_holder_..."}
    POST {lab}/registry/entries/{name}/unlock    {"holder_instance": ...}

registryctl asks by the lab's own routes (docs/lab.md): `ask`.

A lab registry says what it is by the header `X-MADSci-Lab-Registry: 1` in every answer of these routes. Without it a
404 means nothing: a Lab Manager that has no registry answers 404 to everything.

Theory of operation
Requests are made by one thread of the Lab's own, started at the first one. So a request ends for the caller in time,
whatever the lab, or the lookup of its host's name, does; and an unlock from atexit or a finalizer only puts a word into
a queue, without a new thread and without a lock. A thread whose request was given up is left to itself and replaced.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import weakref
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from madsci_registry._threads import start_thread
from madsci_registry.errors import BY_CODE, LabUnavailableError, from_wire
from madsci_registry.names import is_ulid

if TYPE_CHECKING:
    import ssl

CONNECT_S = 2.0
READ_S = 5.0
EXCHANGE_S = CONNECT_S + READ_S
"""For all of one request: a lab that sends a byte now and then must not hold up a start for longer."""
_FACTS = ("name", "id", "component_type", "given", "field", "reason", "renamed_to")
"""What is taken over from a refusal of the lab, where it is text."""
BODY_MAX_BYTES = 1 << 20
MARK = "x-madsci-lab-registry"
"""The header by which a lab registry says what it is."""
MARK_VALUE = "1"


class Reply(NamedTuple):
    """What a lab answered."""

    status: int
    marked: bool
    """Whether it said that it is a lab registry."""
    body: Any
    """JSON; None where there was none."""


class Known(NamedTuple):
    """A name that the lab knows."""

    id: str
    component_type: str | None


class _Job(NamedTuple):
    method: str
    url: str
    body: dict[str, Any] | None
    token: str
    tls: ssl.SSLContext | None
    within_s: float
    answer: SimpleQueue[Reply | Exception]


class Lab:
    """A lab registry. Threads may share it; a forked child asks by a thread of its own."""

    def __init__(
        self, url: object, *, token: str = "", tls: ssl.SSLContext | None = None, within_s: float | None = None
    ) -> None:
        """Ask nobody yet.

        Args:
            url: http or https, with the path under which the lab's routes are, if any.
            token: this host's in the lab; "": the password of the URL, if it holds one.
            tls: whose certificates count; None: those of httpx.
            within_s: how long one request may take, all in all; None: `EXCHANGE_S`.
        """
        self.url = str(url).rstrip("/")
        self._token = token
        self._tls = tls
        self._within_s = EXCHANGE_S if within_s is None else within_s
        self._shown = re.sub("//[^/@]*@", "//", self.url)
        """Without the password that a URL may hold: for logs."""
        self._jobs: dict[int, SimpleQueue[_Job | None]] = {}
        """What the thread of each process, by pid, shall do: after a fork the parent's is not there."""
        weakref.finalize(self, _end_thread, self._jobs).atexit = False

    def __repr__(self) -> str:
        return f"<Lab {self._shown}>"

    def is_at(self, url: str) -> bool:
        """Tell whether it is the lab at this URL, whatever password either holds."""
        return _place(self.url) == _place(url)

    def find(self, name: str) -> Known | None:
        """Return what the lab knows of a name; None: it does not know it.

        Raises:
            LabUnavailableError: no answer in time, or none of a lab registry.
        """
        reply = self._ask("GET", f"/registry/resolve/{_segment(name)}")
        if reply.status == 404 and reply.marked:
            return None
        body = reply.body if reply.status == 200 and isinstance(reply.body, dict) else {}
        id, component_type = body.get("id"), body.get("component_type")
        if not isinstance(id, str) or not is_ulid(id):
            raise self._strange(reply, "no ULID in it")
        return Known(id, component_type if isinstance(component_type, str) else None)

    def tell(self, name: str, entry: dict[str, Any]) -> None:
        """Tell the lab of a name and who holds it.

        Raises:
            LabUnavailableError: no answer in time, or not taken in, with what the lab said.
        """
        reply = self._ask("POST", f"/registry/entries/{_segment(name)}", entry)
        if not 200 <= reply.status < 300:
            raise self._strange(reply, f"{name!r} was not taken in")

    def ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask by a route of the lab's own and return its answer.

        Raises:
            LabUnavailableError: no answer in time, or none of a lab registry. RegistryError: the lab's refusal.
        """
        reply = self._ask(method, route, body)
        if not reply.marked or not isinstance(reply.body, dict):
            raise self._strange(reply, "it does not say that it is a lab registry" if not reply.marked else "no object")
        if 200 <= reply.status < 300:
            return reply.body
        code, detail = reply.body.get("code"), reply.body.get("detail")
        if reply.status >= 500 or code not in BY_CODE:
            raise self._strange(reply, "it cannot answer")
        facts = {fact: reply.body[fact] for fact in _FACTS if isinstance(reply.body.get(fact), str)}
        raise from_wire({**facts, "code": code, "message": f"the lab says: {detail}"})

    def unlock(self, name: str, instance: str, within_s: float) -> None:
        """Tell the lab that this instance no longer holds a name; waits at most `within_s` and raises nothing."""
        jobs = self._jobs.get(os.getpid())
        if jobs is None:
            return
        job = self._job("POST", f"/registry/entries/{_segment(name)}/unlock", {"holder_instance": instance})
        jobs.put(job)
        if sys.is_finalizing():
            return  # that thread runs no more
        try:
            job.answer.get(timeout=max(0.0, within_s))
        except Empty:
            pass

    def _strange(self, reply: Reply, why: str) -> LabUnavailableError:
        if reply.status == 404 and not reply.marked:
            why = "it does not say that it is a lab registry"
        said = f": {str(reply.body)[:200]}" if reply.body is not None else ""
        return LabUnavailableError(f"{self._shown} answered {reply.status}, {why}{said}")

    def _job(self, method: str, route: str, body: dict[str, Any] | None) -> _Job:
        return _Job(method, self.url + route, body, self._token, self._tls, self._within_s, SimpleQueue())

    def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> Reply:
        job = self._job(method, route, body)
        jobs = self._thread()
        jobs.put(job)
        try:
            answer = job.answer.get(timeout=self._within_s)
        except Empty:
            if self._jobs.get(os.getpid()) is jobs:
                self._jobs.pop(os.getpid(), None)
            jobs.put(None)
            raise LabUnavailableError(f"{self._shown} did not answer within {self._within_s:g} s") from None
        if isinstance(answer, Exception):
            raise LabUnavailableError(f"{self._shown}: {type(answer).__name__}: {answer}") from answer
        return answer

    def _thread(self) -> SimpleQueue[_Job | None]:
        new: SimpleQueue[_Job | None] = SimpleQueue()
        jobs = self._jobs.setdefault(os.getpid(), new)
        if jobs is new and not start_thread(_serve, jobs):
            self._jobs.pop(os.getpid(), None)
            raise LabUnavailableError(f"{self._shown} could not be asked: no thread could be started")
        return jobs


def _place(url: str) -> tuple[object, ...]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return (url,)
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


def _segment(name: str) -> str:
    """Return a name as one segment of a path: names may hold slashes, and may be dots."""
    return name.replace(".", "%2E") if name in (".", "..") else quote(name, safe="")


def _end_thread(jobs: dict[int, SimpleQueue[_Job | None]]) -> None:
    queue = jobs.get(os.getpid())
    if queue is not None:
        queue.put(None)


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job.answer.put(_exchange(job))
        except Exception as error:  # noqa: BLE001 - the outer loop of this thread: who asked hears of it, at once
            job.answer.put(error)


def _exchange(job: _Job) -> Reply:
    """Send one request and read its whole answer.

    Raises:
        httpx.HTTPError, httpx.InvalidURL, OSError, ValueError: no connection, no answer, or one that is too large.
    """
    import httpx

    until = time.monotonic() + job.within_s
    limits = httpx.Timeout(min(READ_S, job.within_s), connect=min(CONNECT_S, job.within_s))
    url = httpx.URL(job.url)
    password = (url.username, url.password) if url.userinfo and not job.token else None
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {job.token}"} if job.token else {})
    # What is said to a lab goes there and nowhere else: no proxy from the environment, no redirect, and no password in
    # the URL, which httpx logs.
    with (
        httpx.Client(
            timeout=limits, trust_env=False, follow_redirects=False, auth=password, verify=job.tls or True
        ) as client,
        client.stream(job.method, url.copy_with(userinfo=b""), json=job.body, headers=headers) as response,
    ):
        text = b""
        for piece in response.iter_raw():
            text += piece
            if len(text) > BODY_MAX_BYTES:
                raise ValueError(f"the answer is longer than {BODY_MAX_BYTES} bytes")
            if time.monotonic() > until:
                raise ValueError(f"the answer took longer than {job.within_s:g} s")
        return Reply(response.status_code, response.headers.get(MARK, "") == MARK_VALUE, _json(text))


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
