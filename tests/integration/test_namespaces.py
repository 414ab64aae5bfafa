"""Promise 3 with clients and daemons in PID namespaces of their own, as containers have them.

A record that a daemon made in another PID namespace proves nothing: there the pid of a living holder is nobody's, or
somebody else's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from conftest import Workers
from ctl import Ctl
from helpers import DaemonProcess, Worker
from madsci_registry import RegistryClient, errors
from madsci_registry.protocol import GRACE_S, RESUME_S
from madsci_registry.types import Proof
from namespaces import (
    ContainedDaemon,
    PidNamespace,
    best_proof,
    inner_pid,
    known_again_by,
    need_namespaces,
    need_pid_choice,
    need_proof,
)
from onlooker import await_resume, holding_session, kinds_of, let_wait, token_of
from raw_client import Hammer, RawClient
from turned_clock import TurnedDaemon


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    need_namespaces()


@pytest.fixture(params=[False, True], ids=["host-proc", "own-proc"])
def contained(request: pytest.FixtureRequest, registry_path: Path) -> Iterator[ContainedDaemon]:
    """A daemon in a container of its own, with its own /proc and with the host's."""
    need_proof("pidfd")
    daemon = ContainedDaemon(registry_path, own_proc=request.param)
    with daemon:
        yield daemon


@pytest.fixture
def turned(registry_path: Path) -> Iterator[TurnedDaemon]:
    """A daemon whose clock can be turned, not started yet."""
    daemon = TurnedDaemon(registry_path)
    yield daemon
    daemon.kill()


def _known_as(registry: Path) -> tuple[int | None, Proof]:
    """Return under which pid the daemon shows the only holder, and how surely it knows it."""
    session = holding_session(registry)
    return session.pid, session.proof


@pytest.mark.parametrize("victim", ["holder", "container"])
def test_holder_in_a_container_hands_over_to_a_waiter_in_another(
    daemon: DaemonProcess, workers: Workers, victim: str
) -> None:
    """Holder and waiter in two containers, with one and the same pid there, the daemon on the host: the holder or its
    whole container is killed, and the waiter has the name at once, though a forked child of the holder may live on."""
    with PidNamespace() as one, PidNamespace() as other:
        with one.entered():
            holder = workers()
        with other.entered():
            waiter = workers()
        holder.ask("resolve", "arm")
        assert holder.ask("hello") == waiter.ask("hello") == inner_pid(holder.pid) != holder.pid
        assert _known_as(daemon.registry) == (holder.pid, best_proof())
        holder.ask("fork")
        let_wait(waiter, daemon.registry)
        killed_at = time.monotonic()
        if victim == "holder":
            holder.kill()
        else:
            one.kill()
        assert waiter.answer()["at"] - killed_at < RESUME_S / 2


def test_frozen_holder_in_a_container_keeps_its_lock_over_a_restart(turned: TurnedDaemon, workers: Workers) -> None:
    """A stopped holder in a container keeps its lock over SIGKILL and restart of the daemon on the host, past any
    grace; when it goes on, it holds what it held."""
    turned.start()
    with PidNamespace() as one, PidNamespace() as other:
        with one.entered():
            holder = workers()
        with other.entered():
            asker = workers()
        token = holder.ask("resolve", "arm")["fencing_token"]
        holder.signal(signal.SIGSTOP)
        turned.pass_time(2 * GRACE_S)
        turned.restart()
        turned.pass_time(2 * GRACE_S)
        assert token_of(turned.registry) == token
        with pytest.raises(errors.HeldError) as held:
            asker.ask("resolve", "arm")
        assert held.value.holder is not None
        assert (held.value.holder.pid, held.value.holder.proof) == (holder.pid, known_again_by("pidfd"))
        holder.signal(signal.SIGCONT)
        holder.ask("ensure", "arm")
        assert holder.ask("token", "arm") == token
        assert holder.ask("losses", 0) == []


@pytest.mark.parametrize("victim", ["holder", "container"])
def test_holder_in_a_container_that_died_while_the_daemon_was_down_is_freed_at_once(
    daemon: DaemonProcess, workers: Workers, victim: str
) -> None:
    """A holder in a container that was killed, alone or with its container, while no daemon ran, is proven dead by the
    next one on the host, without any grace."""
    with PidNamespace() as one, PidNamespace() as other:
        with one.entered():
            holder = workers()
        with other.entered():
            asker = workers()
        holder.ask("resolve", "arm")
        daemon.kill()
        if victim == "container":
            one.kill()
        holder.kill()
        daemon.start()
        assert asker.ask("resolve", "arm", wait=RESUME_S)["held"]


def test_welcome_and_sessions_of_a_daemon_in_a_container_say_what_it_knows(
    contained: ContainedDaemon, workers: Workers
) -> None:
    """Where the peer's pid reads 0, the holder is still known by its pidfd, its pid is None, and the welcome says that
    its locks last GRACE_S over a restart."""
    with closing(RawClient(contained.socket)) as raw:
        welcome = raw.hello()
    assert welcome is not None
    assert (welcome["proof"], welcome["grace_s"]) == ("pidfd", 10.0)
    holder = workers()
    holder.ask("resolve", "arm")
    found = holding_session(contained.registry)
    assert (found.pid, found.proof, found.attached) == (None, "pidfd", True)
    shown = next(s for s in Ctl(contained.registry).json("sessions") if s["held"] == 1)
    assert (shown["pid"], shown["proof"]) == (None, "pidfd")
    with RegistryClient(contained.registry, autostart=False) as client:
        assert client.status()["proof"] == "pidfd"
        by = client.get("arm").holder
    assert by is not None
    assert (by.pid, by.end_command) == (None, None)


def test_welcome_of_a_daemon_on_the_host_names_no_grace(daemon: DaemonProcess) -> None:
    """Where a later daemon can prove that the process lives, its locks last as long as it: `grace_s` is null."""
    with PidNamespace() as container, closing(RawClient(daemon.socket)) as raw:
        welcome = raw.hello()
        assert welcome is not None
        assert (welcome["proof"], welcome["grace_s"]) == (best_proof(), None)
        with container.entered():
            inside = Worker(daemon.registry)
        with inside:
            inside.ask("resolve", "arm")
            assert holding_session(daemon.registry).pid == inside.pid


def test_outsider_that_dies_hands_over_at_once(contained: ContainedDaemon, workers: Workers) -> None:
    """Daemon in a container, holder on the host, waiter in a third place: the holder is killed, and the waiter has the
    name at once, though the daemon never saw a pid and a forked child lives on."""
    holder = workers()
    holder.ask("resolve", "arm")
    holder.ask("fork")
    with PidNamespace() as container:
        with container.entered():
            waiter = workers()
        let_wait(waiter, contained.registry)
        killed_at = holder.kill()
        assert waiter.answer()["at"] - killed_at < RESUME_S / 2


def test_idle_outsider_keeps_its_lock_when_the_daemon_comes_back_in_another_container(
    contained: ContainedDaemon, workers: Workers
) -> None:
    """An idle holder that the daemon cannot see resumes by itself with its lock and token when the daemon comes back in
    a new container, whether it was killed or stopped; nobody is granted the name in between."""
    holder = workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    with Hammer(contained.socket, "arm") as hammer:
        for end in (contained.kill, contained.terminate):
            holder.signal(signal.SIGSTOP)
            end()
            contained.start()
            hammer.await_refusal()
            assert not holding_session(contained.registry).attached
            holder.signal(signal.SIGCONT)
            await_resume(contained.registry)
            hammer.await_refusal()
    assert hammer.granted == []
    holder.ask("ensure", "arm")
    assert holder.ask("token", "arm") == token
    assert holder.ask("losses", 0) == []
    assert kinds_of(contained.registry) == ["created", "granted"]


@pytest.mark.parametrize("pid_elsewhere", ["free", "of a stranger"])
def test_record_of_another_namespace_proves_nothing(turned: TurnedDaemon, workers: Workers, pid_elsewhere: str) -> None:
    """The daemon comes back in one PID namespace after the other, where the recorded pid of the living holder is
    nobody's or a stranger's: the lock stays, and shows no pid of elsewhere; the holder resumes with its token. A record
    of the same namespace proves that it lives, past any grace."""
    need_pid_choice()
    need_proof("pidfd")
    number = 300
    with PidNamespace() as x, PidNamespace() as y:
        x.choose_next_pid(number)
        with x.entered():
            holder = workers()
        if pid_elsewhere == "of a stranger":
            y.choose_next_pid(number)
            with y.entered():
                stranger = workers()
            assert inner_pid(stranger.pid) == number
        assert inner_pid(holder.pid) == number
        places: dict[str, AbstractContextManager[Any]]
        token, before = 0, ""
        for place in ("x", "x", "y", "host", "host", "y", "x", "host"):
            places = {"x": x.entered(), "y": y.entered(), "host": nullcontext()}
            pid = {"x": number, "y": None, "host": holder.pid}[place]
            with places[place]:
                turned.start()
            if not token:
                token = holder.ask("resolve", "arm")["fencing_token"]
            elif place == before:
                turned.pass_time(2 * GRACE_S)
                assert token_of(turned.registry) == token
                assert _known_as(turned.registry) == (pid, known_again_by("pidfd"))
            else:
                assert token_of(turned.registry) == token
                assert _known_as(turned.registry) == (None, "connection")
            holder.signal(signal.SIGCONT)
            await_resume(turned.registry)
            assert _known_as(turned.registry) == (pid, "pidfd")
            holder.ask("ensure", "arm")
            holder.signal(signal.SIGSTOP)
            turned.kill()
            before = place
        holder.signal(signal.SIGCONT)
        turned.start()
        assert holder.ask("token", "arm") == token
        assert holder.ask("losses", 0) == []
        assert kinds_of(turned.registry) == ["created", "granted"]


@pytest.mark.parametrize("holder_is", ["frozen", "dead"])
def test_outsider_that_does_not_resume_is_freed_after_the_grace(
    turned: TurnedDaemon, workers: Workers, holder_is: str
) -> None:
    """A daemon that sees no pid cannot tell a stopped holder from a dead one after its restart: the lock ends GRACE_S
    after it, not before; a stopped one is told when it goes on."""
    with PidNamespace() as container:
        with container.entered():
            turned.start()
        holder, waiter = workers(), workers()
        token = holder.ask("resolve", "arm")["fencing_token"]
        holder.signal(signal.SIGSTOP)
        turned.kill()
        if holder_is == "dead":
            holder.kill()
        started_at = time.monotonic()
        with container.entered():
            turned.start()
        let_wait(waiter, turned.registry)
        turned.pass_time(GRACE_S - 2)
        granted = waiter.answer()
        assert granted["at"] - started_at >= 2
        assert granted["fencing_token"] > token
        if holder_is == "frozen":
            holder.signal(signal.SIGCONT)
            assert holder.ask("losses", 1) == [["arm", token]]
            with pytest.raises(errors.LockLostError):
                holder.ask("ensure", "arm")
