"""Only monotonic time decides: steps of the wall clock by a day free nothing and keep nothing alive. A real daemon and
real clients whose wall clock is turned (turned_clock)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import Workers
from helpers import until
from madsci_registry import RegistryClient, errors
from madsci_registry.protocol import GRACE_S, RESUME_S
from onlooker import let_wait, token_of
from raw_client import RawProcess
from turned_clock import DAY_S, TurnedDaemon, TurnedWorker

STEPS = [pytest.param(DAY_S, id="ahead"), pytest.param(-DAY_S, id="back")]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends with the test what is entered."""
    with ExitStack() as entered:
        yield entered


@pytest.mark.parametrize("step", STEPS)
def test_step_of_the_wall_clock_frees_nothing(
    turned: TurnedDaemon, workers: Workers, stack: ExitStack, step: float
) -> None:
    """A step of the wall clock by a day, there and back, takes no lock from an idle, a stopped or a just disconnected
    holder, and no place from a waiter, who also comes back after a restart on such a clock."""
    idle, dropped = stack.enter_context(TurnedWorker(turned)), stack.enter_context(RawProcess(turned.socket))
    frozen = workers()
    tokens = {"arm": idle.ask("resolve", "arm")["fencing_token"], "leg": dropped.holds("leg")}
    tokens["eye"] = frozen.ask("resolve", "eye")["fencing_token"]
    waiter = stack.enter_context(TurnedWorker(turned))
    let_wait(waiter, turned.registry)
    frozen.signal(signal.SIGSTOP)
    for seconds in (step, 0.0):
        secret = dropped.ask("token")
        dropped.ask("hang_up")
        turned.set_wall(seconds)
        assert {name: token_of(turned.registry, name) for name in tokens} == tokens
        dropped.ask("connect")
        assert [hold["fencing_token"] for hold in dropped.ask("resume", secret)["held"]] == [tokens["leg"]]
    with RegistryClient(turned.registry, autostart=False) as client:
        for seconds in (step, 0.0):
            turned.set_wall(seconds)
            turned.restart()
            until(lambda: client.get("arm").waiting == 1, "for the waiter to come back")
    idle.ask("ensure", "arm")
    frozen.signal(signal.SIGCONT)
    frozen.ask("ensure", "eye")
    assert not waiter.answered()
    killed_at = idle.kill()
    granted = waiter.answer()
    assert granted["at"] - killed_at < RESUME_S / 2
    assert granted["fencing_token"] > tokens["arm"]


@pytest.mark.parametrize("step", STEPS)
def test_step_of_the_wall_clock_keeps_nothing_alive(
    turned: TurnedDaemon, workers: Workers, stack: ExitStack, step: float
) -> None:
    """A client that hung up and does not resume loses its locks RESUME_S later, whatever step the wall clock takes
    meanwhile; not before, and not a day after."""
    dropped = stack.enter_context(RawProcess(turned.socket))
    dropped.holds("arm")
    waiter = workers()
    let_wait(waiter, turned.registry)
    ended_at = dropped.ask("hang_up")
    turned.set_wall(step)
    assert waiter.answer()["at"] - ended_at >= RESUME_S


def test_wait_is_not_measured_by_the_wall_clock(turned: TurnedDaemon, workers: Workers, stack: ExitStack) -> None:
    """A request that waits gets its answer when its seconds have passed, though the wall clock was set back by a day;
    and a step ahead does not end its wait."""
    holder = workers()
    holder.ask("resolve", "arm")
    waiter = stack.enter_context(TurnedWorker(turned))
    waiter.tell("resolve", "arm", wait=1.0)
    with RegistryClient(turned.registry, autostart=False) as client:
        until(lambda: client.get("arm").waiting == 1, "for the waiter to wait")
        turned.set_wall(DAY_S)
        client.lookup("arm")
        assert client.get("arm").waiting == 1
    turned.set_wall(-DAY_S)
    with pytest.raises(errors.HeldError):
        waiter.answer()


def test_restarts_on_a_turned_clock_keep_the_living_and_free_the_dead(turned: TurnedDaemon, workers: Workers) -> None:
    """The daemon comes back with its clock a day behind, a day ahead, and behind again: an idle and a stopped holder
    keep lock and token, who died meanwhile is free at once, and epochs and tokens only grow."""
    idle, frozen = workers(), workers()
    kept = {"arm": idle.ask("resolve", "arm")["fencing_token"], "eye": frozen.ask("resolve", "eye")["fencing_token"]}
    dying = workers()
    tokens, epochs = [dying.ask("resolve", "leg")["fencing_token"]], []
    with RegistryClient(turned.registry, autostart=False) as client:
        epochs.append(client.status()["epoch"])
        for offset_s in (-DAY_S, DAY_S, -DAY_S, 0.0):
            frozen.signal(signal.SIGSTOP)
            turned.kill()
            dying.kill()
            turned.set_wall(offset_s)
            turned.start()
            assert {name: token_of(turned.registry, name) for name in kept} == kept
            dying = workers()
            tokens.append(dying.ask("resolve", "leg", wait=RESUME_S)["fencing_token"])
            epochs.append(client.status()["epoch"])
            until(lambda: sum(s.attached for s in client.sessions() if s.held) == 2, "for the idle one to resume")
            frozen.signal(signal.SIGCONT)
            until(lambda: sum(s.attached for s in client.sessions() if s.held) == 3, "for the stopped one to resume")
            idle.ask("ensure", "arm")
            frozen.ask("ensure", "eye")
    assert tokens == sorted(set(tokens))
    assert epochs == sorted(set(epochs))
    assert idle.ask("losses", 0) == frozen.ask("losses", 0) == []


@pytest.mark.parametrize("step", STEPS)
def test_grace_is_not_measured_by_the_wall_clock(registry_path: Path, workers: Workers, step: float) -> None:
    """A holder that nothing proves keeps its lock for GRACE_S after a restart, whatever the wall clock was then and is
    now; not less, and not a day more."""
    daemon = TurnedDaemon(registry_path, "connection")
    with daemon:
        holder, waiter = workers(), workers()
        token = holder.ask("resolve", "arm")["fencing_token"]
        holder.signal(signal.SIGSTOP)
        daemon.kill()
        daemon.set_wall(step)
        daemon.start()
        assert token_of(registry_path) == token
        daemon.set_wall(-step)
        assert token_of(registry_path) == token
        waiter.tell("resolve", "arm", wait=60)
        daemon.pass_time(GRACE_S)
        assert waiter.answer()["fencing_token"] > token


def test_session_that_holds_nothing_is_not_kept_over_a_restart(turned: TurnedDaemon, stack: ExitStack) -> None:
    """After a restart, and after the grace, the session of a living process that does not come back is kept if it holds
    something and gone if it does not."""
    holder, idler = (stack.enter_context(RawProcess(turned.socket)) for _ in range(2))
    token = holder.holds("arm")
    assert "ok" in idler.ask("resolve", "leg", acquire_lock=False)
    turned.restart()
    with RegistryClient(turned.registry, autostart=False) as client:
        assert sorted(s.held for s in client.sessions() if not s.attached) == [0, 1]
        turned.pass_time(GRACE_S)
        until(lambda: [s.held for s in client.sessions() if not s.attached] == [1], "for the idler's to end")
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token
