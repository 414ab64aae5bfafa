"""Promises 3 and 5: a lock lives as long as its holder, and who loses one is told; real processes throughout."""

from __future__ import annotations

import math
import signal
import time
from itertools import pairwise

import pytest

from conftest import Workers
from helpers import DaemonProcess, Worker, until
from madsci_registry import RegistryClient, errors
from madsci_registry.protocol import RESUME_S
from rounds import hand_over_s, spread_ms


def _await_queue(asker: Worker, waiting: int) -> None:
    """Wait until so many wait for the arm."""
    until(lambda: asker.ask("get", "arm")["waiting"] == waiting, f"for {waiting} to wait")


def test_dead_holder_hands_over_to_the_waiter(daemon: DaemonProcess) -> None:
    """The holder dies by SIGKILL: the next waiter has the name at once, long before any timeout could tell."""
    taken = hand_over_s(daemon.registry, rounds=5)
    print(spread_ms(taken))
    assert max(taken) < RESUME_S / 2


def test_waiters_are_served_in_the_order_of_their_coming(daemon: DaemonProcess, workers: Workers) -> None:
    """First come, first served, and each hears its place."""
    queue = [workers() for _ in range(4)]
    queue[0].ask("resolve", "arm")
    for place, worker in enumerate(queue[1:], start=1):
        worker.tell("resolve", "arm", wait=60)
        _await_queue(queue[0], place)
    with RegistryClient(daemon.registry) as late, pytest.raises(errors.HeldError) as held:
        late.resolve("arm", "node", wait=0.2)
    assert held.value.place == 4
    tokens = []
    for worker, following in pairwise(queue):
        worker.kill()
        tokens.append(following.answer()["fencing_token"])
    assert tokens == sorted(tokens)


def test_waiter_that_dies_is_granted_nothing(daemon: DaemonProcess, workers: Workers) -> None:
    """No grant goes to the dead: the name passes a killed waiter by."""
    holder, dying, next_one = workers(), workers(), workers()
    holder.ask("resolve", "arm")
    for waiting, worker in enumerate((dying, next_one), start=1):
        worker.tell("resolve", "arm", wait=60)
        _await_queue(holder, waiting)
    dying.kill()
    holder.kill()
    assert next_one.answer()["held"]


def test_frozen_holder_keeps_its_lock_over_a_restart(daemon: DaemonProcess, workers: Workers) -> None:
    """A stopped holder keeps its lock, past the time in which a connection would have to come back, and over a
    restart of the daemon; when it goes on, it holds what it held."""
    holder, other = workers(), workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    holder.signal(signal.SIGSTOP)
    _refused(other, holder.pid)
    daemon.restart()
    began = time.monotonic()
    _refused(other, holder.pid, wait=2 * RESUME_S)
    assert time.monotonic() - began >= 2 * RESUME_S
    holder.signal(signal.SIGCONT)
    holder.ask("ensure", "arm")
    assert holder.ask("get", "arm")["fencing_token"] == token
    assert holder.ask("losses", 0) == []


def _refused(worker: Worker, holder_pid: int, **kwargs: float) -> None:
    with pytest.raises(errors.HeldError) as held:
        worker.ask("resolve", "arm", **kwargs)
    assert held.value.holder is not None
    assert held.value.holder.pid == holder_pid
    assert held.value.holder.proof in ("pidfd", "pid")
    assert not held.value.is_me


def test_forked_child_does_not_prolong_its_parents_lock(daemon: DaemonProcess, workers: Workers) -> None:
    """A forked child that lives on does not keep the lock of its dead parent."""
    holder, waiter = workers(), workers()
    holder.ask("resolve", "arm")
    holder.ask("fork")
    waiter.tell("resolve", "arm", wait=60)
    with RegistryClient(daemon.registry) as observer:
        until(lambda: observer.get("arm").waiting == 1)
    killed_at = holder.kill()
    assert waiter.answer()["at"] - killed_at < RESUME_S / 2


def test_holder_that_died_while_the_daemon_was_down_is_freed_at_once(daemon: DaemonProcess, workers: Workers) -> None:
    """A holder that died while no daemon ran is proven dead by the next one, without any grace."""
    holder, other = workers(), workers()
    holder.ask("resolve", "arm")
    daemon.kill()
    holder.kill()
    daemon.start()
    assert other.ask("resolve", "arm", wait=RESUME_S)["held"]


def test_broken_lock_is_told_to_its_holder(daemon: DaemonProcess, workers: Workers) -> None:
    """A holder whose lock an operator breaks is told by its callback and by ensure(), and does not get it back."""
    holder, next_one = workers(), workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    with RegistryClient(daemon.registry) as operator:
        assert operator.break_lock("arm", reason="test")
    assert holder.ask("losses", 1) == [["arm", token]]
    with pytest.raises(errors.LockLostError):
        holder.ask("ensure", "arm")
    assert next_one.ask("resolve", "arm")["fencing_token"] > token
    next_one.end()
    assert not holder.ask("held", "arm")
    with pytest.raises(errors.LockLostError):
        holder.ask("ensure", "arm")


def test_lock_broken_while_its_holder_is_frozen_is_told_when_it_goes_on(
    daemon: DaemonProcess, workers: Workers
) -> None:
    """A holder that was stopped while its lock was broken learns of it when it goes on, over a restart too."""
    holder = workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    holder.signal(signal.SIGSTOP)
    with RegistryClient(daemon.registry) as operator:
        assert operator.break_lock("arm", reason="test")
        daemon.restart()
        operator.resolve("arm", "node")
        holder.signal(signal.SIGCONT)
        assert holder.ask("losses", 1) == [["arm", token]]
        with pytest.raises(errors.LockLostError):
            holder.ask("ensure", "arm")


def test_holder_follows_a_rename_that_it_could_not_hear(daemon: DaemonProcess, workers: Workers) -> None:
    """A held name that is renamed by force while its holder is cut off is held on, under the new name."""
    holder = workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    holder.signal(signal.SIGSTOP)
    daemon.restart()
    with RegistryClient(daemon.registry, autostart=False) as operator:
        operator.rename("arm", "hand", force=True)
        holder.signal(signal.SIGCONT)
        until(lambda: all(s.attached for s in operator.sessions()), "for the holder to resume")
        assert holder.ask("held", "arm") and holder.ask("token", "arm") == token
        assert operator.get("hand").fencing_token == token
        assert not operator.resolve("arm", "node", acquire_lock=False).held


def test_waiting_without_end_ends_with_the_grant(daemon: DaemonProcess, workers: Workers) -> None:
    """A waiter with an endless wait stays in the queue over a restart of the daemon, until it is its turn."""
    holder, waiter = workers(), workers()
    holder.ask("resolve", "arm")
    waiter.tell("resolve", "arm", wait=math.inf)
    _await_queue(holder, 1)
    daemon.restart()
    _await_queue(holder, 1)  # again
    assert holder.ask("release", "arm")
    assert waiter.answer()["held"]
