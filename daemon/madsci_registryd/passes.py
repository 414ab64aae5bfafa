"""The thread that works on registry.json, and nothing else: jobs in, results out. The loop never waits for the file."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from queue import Empty, SimpleQueue
from typing import NamedTuple

from madsci_registryd import messages
from madsci_registryd.export import Export, Job, Result

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often the file is looked at, without its lock, for what others wrote: one stat."""


class Done(NamedTuple):
    """A result, and whether somebody had sent a job for it."""

    result: Result
    was_asked: bool


class Passes:
    """Runs one pass after the other. `fd` is readable when there are results."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._results: deque[Done] = deque()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="registry.json", daemon=True)

    def start(self) -> None:
        self._export.watch.start()
        self._thread.start()

    def send(self, job: Job) -> None:
        """Have a pass made for this job."""
        self._jobs.put(job)

    def take(self) -> list[Done]:
        """Return the results that are there, oldest first. For the loop's thread."""
        os.eventfd_read(self.fd)
        taken = []
        while self._results:
            taken.append(self._results.popleft())
        return taken

    def stop(self) -> None:
        """End the thread after the pass that is under way; jobs that were sent are done first."""
        self._jobs.put(None)
        self._thread.join()
        self._export.watch.stop()
        os.close(self.fd)

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=LOOK_S)
            except Empty:
                self._look()
                continue
            if job is None:
                return
            self._report(Done(self._export.run(job), was_asked=True))

    def _look(self) -> None:
        try:
            self._export.watch.start()  # where its folder was gone
            if self._export.has_changed():
                self._report(Done(self._export.run(Job()), was_asked=False))
        except Exception:  # the outer loop of a look: the next one comes in a moment
            log.exception("a look at registry.json broke", extra=messages.FAULT())

    def _report(self, done: Done) -> None:
        self._results.append(done)
        os.eventfd_write(self.fd, 1)
