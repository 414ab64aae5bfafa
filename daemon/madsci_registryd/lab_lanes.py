"""The threads that talk to the lab, so that the loop never waits for HTTP: calls in, results out.

Three lanes, so that nothing that is long or many holds up what keeps this host's locks: `keep` (the host's session),
`ask` (what clients wait for; several at once) and `tell` (changes).
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from madsci_registry.errors import InternalError, RegistryError
from madsci_registryd import messages
from madsci_registryd.lab_gateway import Gateway

log = logging.getLogger(__name__)

Lane = Literal["keep", "ask", "tell"]
THREADS: dict[Lane, int] = {"keep": 1, "ask": 4, "tell": 1}
"""A new name takes the lab some milliseconds, most of them for its disk: four at once fill it."""
STOP_S = 0.5
"""How long a stop waits for requests under way."""

T = TypeVar("T")


class Send(Protocol):
    """How a call gets into a lane: `call` runs in a thread of it, `then` on the loop with its result or its error."""

    def __call__(self, lane: Lane, call: Callable[[Gateway], T], then: Callable[[T | RegistryError], None]) -> None: ...


class _Job(NamedTuple):
    call: Callable[[Gateway], Any]
    then: Callable[[Any], None]


class Lanes:
    """The threads of one gateway. `fd` is readable when there are results."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._jobs: dict[Lane, SimpleQueue[_Job | None]] = {lane: SimpleQueue() for lane in THREADS}
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._guard = threading.Lock()
        self._is_over = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._serve, args=(self._jobs[lane],), name=f"lab-{lane}", daemon=True)
            for lane, count in THREADS.items()
            for _ in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, lane: Lane, call: Callable[[Gateway], T], then: Callable[[T | RegistryError], None]) -> None:
        """Have a call made, after those that were sent before it into the same lane."""
        self._jobs[lane].put(_Job(call, then))

    def take(self, events: int = 0) -> None:
        """Hand out the results that are there, oldest first. For the loop's thread, when `fd` is readable."""
        os.eventfd_read(self.fd)
        while self._results:
            then, result = self._results.popleft()
            then(result)

    def stop(self) -> None:
        """End the threads. A request under way is given up where it takes longer than STOP_S; whether it was done
        is found out by the next daemon."""
        for lane, count in THREADS.items():
            jobs = self._jobs[lane]
            while not jobs.empty():
                jobs.get()
            for _ in range(count):
                jobs.put(None)
        for thread in self._threads:
            thread.join(STOP_S / len(self._threads))
        with self._guard:
            self._is_over = True
            os.close(self.fd)
        self._gateway.close()

    def _serve(self, jobs: SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            result: Any
            try:
                result = job.call(self._gateway)
            except RegistryError as error:
                result = error
            except Exception:  # the outer loop of this thread
                log.exception("a request to the lab broke", extra=messages.FAULT())
                result = InternalError("a fault of the daemon; it was logged")
            self._report(job.then, result)

    def _report(self, then: Callable[[Any], None], result: Any) -> None:
        with self._guard:
            if not self._is_over:
                self._results.append((then, result))
                os.eventfd_write(self.fd, 1)
