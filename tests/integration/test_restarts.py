"""Promise 3 over restarts of the daemon, by SIGKILL and by SIGTERM: what was asked before is not done after, who waits
waits on, and nothing that is held is granted to another in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import zmq

from conftest import Workers
from helpers import DaemonProcess, Worker, until
from madsci_registry import RegistryClient
from onlooker import kinds_of
from raw_client import Hammer, RawClient

RESTARTS = 5


@pytest.fixture(params=["SIGKILL", "SIGTERM"])
def end(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Callable[[], object]:
    """Ends the daemon, in either way."""
    return daemon.kill if request.param == "SIGKILL" else daemon.terminate


class Queue:
    """A DEALER without ZMQ_IMMEDIATE: what it is given while no daemon runs goes to the next one."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.RCVTIMEO, 30_000)
        self._dealer.connect(f"ipc://{daemon.socket}")

    def send(self, message: dict[str, Any]) -> None:
        self._dealer.send_multipart([b"", json.dumps(message).encode()])

    def reply(self) -> Any:
        return json.loads(self._dealer.recv_multipart()[-1])

    def close(self) -> None:
        self._dealer.close()
        self._context.term()


@pytest.fixture
def queue(daemon: DaemonProcess) -> Iterator[Queue]:
    made = Queue(daemon)
    yield made
    made.close()


def _resolve(raw: RawClient, name: str) -> dict[str, Any]:
    return raw.message("resolve", name=name, component_type="node", instance="raw")


@pytest.mark.parametrize("holds", [False, True], ids=["unknown-session", "known-session"])
def test_request_of_an_earlier_epoch_is_not_run(
    daemon: DaemonProcess, queue: Queue, end: Callable[[], object], holds: bool
) -> None:
    """A resolve that was queued while no daemon ran, or that comes late, is refused by the next daemon, whether it
    knows the session or not, before and after that is resumed; nobody holds the name. Repeated with the new epoch it is
    run."""
    with closing(RawClient(daemon.socket)) as raw:
        raw.hello()
        if holds:
            assert "ok" in raw.resolve("leg")
        end()
        stale = _resolve(raw, "arm")
        queue.send(stale)
        daemon.start()
        assert queue.reply()["error"]["code"] == "session_required"
    with closing(RawClient(daemon.socket)) as again:
        welcome = again.resume(raw.token) if holds else again.hello()
        assert welcome is not None and welcome["op"] == "welcome"
        again.seq = raw.seq
        queue.send({**stale, "token": again.token})
        assert queue.reply()["error"]["code"] == "stale_epoch"
        assert again.request_of("get", name="arm")["error"]["code"] == "not_found"
        queue.send({**stale, "token": again.token, "epoch": again.epoch})
        assert queue.reply()["ok"]["is_new"]


def _stop(worker: Worker) -> None:
    worker.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)


def test_waiters_wait_on_in_the_order_of_their_return(
    daemon: DaemonProcess, end: Callable[[], object], workers: Workers
) -> None:
    """Clients that wait for a name go on waiting over a restart of the daemon, queued in the order in which they come
    back; each gets the name in that order, with a higher token."""
    holder = workers()
    tokens = [holder.ask("resolve", "arm")["fencing_token"]]
    waiters = [workers() for _ in range(3)]
    with RegistryClient(daemon.registry, autostart=False) as client:
        for place, waiter in enumerate(waiters, start=1):
            waiter.tell("resolve", "arm", wait=60)
            until(lambda place=place: client.get("arm").waiting == place, "for them to wait")  # type: ignore[misc]
        for waiter in waiters:
            _stop(waiter)
        end()
        daemon.start()
        assert client.get("arm").waiting == 0
        returned = [waiters[2], waiters[0], waiters[1]]
        for place, waiter in enumerate(returned, start=1):
            waiter.signal(signal.SIGCONT)
            until(lambda place=place: client.get("arm").waiting == place, "for them to return")  # type: ignore[misc]
    for before, waiter in zip([holder, *returned], returned, strict=False):
        assert not any(w.answered() for w in returned[returned.index(waiter) :])
        before.kill()
        tokens.append(waiter.answer()["fencing_token"])
    assert tokens == sorted(set(tokens))


def test_held_name_is_nobody_elses_over_many_restarts(
    daemon: DaemonProcess, end: Callable[[], object], workers: Workers
) -> None:
    """While the daemon restarts five times, ever new clients that ask without waiting are never granted the name of a
    holder that lives, be it idle or stopped; both keep their token."""
    idle, frozen = workers(), workers()
    kept = {"arm": idle.ask("resolve", "arm")["fencing_token"], "eye": frozen.ask("resolve", "eye")["fencing_token"]}
    frozen.signal(signal.SIGSTOP)
    with Hammer(daemon.socket, "arm") as on_idle, Hammer(daemon.socket, "eye") as on_frozen:
        for _ in range(RESTARTS):
            end()
            daemon.start()
            on_idle.await_refusal()
            on_frozen.await_refusal()
        with RegistryClient(daemon.registry, autostart=False) as client:
            until(lambda: any(s.attached and s.held for s in client.sessions()), "for the idle one to resume")
        on_idle.await_refusal()
    assert len(on_idle.refused) > RESTARTS - 1 and len(on_frozen.refused) > RESTARTS - 1
    assert on_idle.granted == on_frozen.granted == []
    frozen.signal(signal.SIGCONT)
    for worker, name in ((idle, "arm"), (frozen, "eye")):
        worker.ask("ensure", name)
        assert worker.ask("token", name) == kept[name]
        assert worker.ask("losses", 0) == []
    assert [kinds_of(daemon.registry, name) for name in kept] == [["created", "granted"]] * 2
