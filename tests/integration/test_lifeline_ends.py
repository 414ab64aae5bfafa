"""The unusual ends of a lifeline and of its process: half-closed, passed on, inherited, exec, zombie, a pid that comes
again. Clients that speak by hand (raw_client), real processes, real sockets."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import Workers
from helpers import until
from madsci_registry.protocol import RESUME_S
from madsci_registry.types import Proof
from namespaces import need_proof
from onlooker import let_wait, token_of
from raw_client import RawProcess
from turned_clock import DAY_S, TurnedDaemon

Raw = Callable[[], RawProcess]


ENDS = [("SHUT_WR",), ("SHUT_RD", "SHUT_WR"), ()]


def _end(client: RawProcess, ways: tuple[str, ...]) -> float:
    """Shut down the client's lifeline in these ways, or close it without a word; return when."""
    at: float = client.ask("shut", *ways) if ways else client.ask("hang_up")
    return at


@pytest.mark.parametrize("ways", ENDS, ids=["half-closed", "shut-down", "closed"])
def test_lifeline_that_ends_without_bye_frees_after_the_resume_time(
    turned: TurnedDaemon, raw: Raw, workers: Workers, ways: tuple[str, ...]
) -> None:
    """A living client that half-closes, shuts down or closes its lifeline without bye, and does not resume, loses its
    locks RESUME_S later, not before."""
    holder = raw()
    holder.holds("arm")
    waiter = workers()
    let_wait(waiter, turned.registry)
    ended_at = _end(holder, ways)
    assert waiter.answer()["at"] - ended_at >= RESUME_S
    assert holder.ask("resolve", "arm")["error"]["code"] == "session_required"


@pytest.mark.parametrize(
    "ways", [*ENDS, ("SHUT_RD",), None], ids=["half-closed", "shut-down", "closed", "deaf", "still-up"]
)
def test_lifeline_resumed_in_time_loses_nothing(turned: TurnedDaemon, raw: Raw, ways: tuple[str, ...] | None) -> None:
    """A client that resumes in time, however its lifeline ended, or over one that is still up, keeps its lock and token
    for good, and its first lifeline has ended."""
    holder = raw()
    token = holder.holds("arm")
    if ways is not None:
        _end(holder, ways)
    secret = holder.ask("token")
    holder.ask("connect")
    welcome = holder.ask("resume", secret)
    assert welcome["held"] == [{"name": "arm", "instance": "raw", "fencing_token": token, "lab": None}]
    if ways != ():
        assert holder.ask("heard_before") is None
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token
    assert holder.ask("resolve", "arm")["ok"]["fencing_token"] == token


def test_client_that_only_stops_listening_keeps_its_lock(turned: TurnedDaemon, raw: Raw, workers: Workers) -> None:
    """A client that shuts down its receiving side alone has not ended its lifeline: it holds on, is still heard, and
    its death frees at once."""
    holder = raw()
    token = holder.holds("arm")
    holder.ask("resolve", "leg")
    holder.ask("shut", "SHUT_RD")
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token
    leg = token_of(turned.registry, "leg")
    holder.ask("say", {"op": "release", "instance": "raw", "name": "leg", "fencing_token": leg})
    until(lambda: token_of(turned.registry, "leg") is None, "for the release to be heard")
    waiter = workers()
    let_wait(waiter, turned.registry)
    killed_at = holder.kill()
    assert waiter.answer()["at"] - killed_at < RESUME_S / 2


def _pass_on(giver: RawProcess, taker: RawProcess, folder: Path) -> None:
    path = str(folder / "pass")
    taker.ask("listen", path)
    taker.tell("take")
    giver.ask("give", path)
    taker.answer()


def test_lifeline_passed_to_a_stranger_does_not_outlive_its_process(
    turned: TurnedDaemon, raw: Raw, workers: Workers
) -> None:
    """A process that was passed the holder's lifeline (SCM_RIGHTS) and keeps it open does not prolong the lock of the
    dead holder; its copy of the lifeline ends too."""
    holder, stranger = raw(), raw()
    holder.holds("arm")
    _pass_on(holder, stranger, turned.registry.parent)
    waiter = workers()
    let_wait(waiter, turned.registry)
    killed_at = holder.kill()
    assert waiter.answer()["at"] - killed_at < RESUME_S / 2
    assert stranger.ask("heard") is None


def test_lifeline_passed_on_and_closed_lasts_while_both_live(turned: TurnedDaemon, raw: Raw, workers: Workers) -> None:
    """A holder that closed its own copy of a lifeline that it passed on keeps its lock while somebody has the lifeline
    open; when that one dies, the lock ends RESUME_S later."""
    holder, keeper = raw(), raw()
    token = holder.holds("arm")
    _pass_on(holder, keeper, turned.registry.parent)
    holder.ask("hang_up")
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token
    waiter = workers()
    let_wait(waiter, turned.registry)
    killed_at = keeper.kill()
    assert waiter.answer()["at"] - killed_at >= RESUME_S


def test_stranger_cannot_resume_with_a_stolen_token(turned: TurnedDaemon, raw: Raw) -> None:
    """Another process that has the session's secret token may not resume it: not while the holder is connected, not
    while it is stopped after a restart of the daemon, not when it is dead. The holder loses nothing by the tries."""
    holder, thief = raw(), raw()
    token = holder.holds("arm")
    secret = holder.ask("token")

    def steal() -> str:
        thief.ask("connect")
        return str(thief.ask("resume", secret)["error"]["code"])

    assert steal() == "permission_denied"
    holder.signal(signal.SIGSTOP)
    turned.restart()
    assert steal() == "permission_denied"
    holder.signal(signal.SIGCONT)
    assert token_of(turned.registry) == token
    holder.ask("connect")
    assert [hold["fencing_token"] for hold in holder.ask("resume", secret)["held"]] == [token]
    holder.kill()
    until(lambda: token_of(turned.registry) is None, "for the name to be free")
    assert steal() == "session_required"


@pytest.mark.parametrize("tier", ["pidfd", "pid"])
def test_hello_on_the_connection_of_a_dead_process_begins_no_session(registry_path: Path, tier: Proof) -> None:
    """A process that says hello on a connection that another one made and passed on before it died gets no session:
    nobody would notice its end."""
    need_proof(tier)
    daemon = TurnedDaemon(registry_path, tier)
    with daemon, ExitStack() as stack:
        maker, heir = (stack.enter_context(RawProcess(daemon.socket)) for _ in range(2))
        _pass_on(maker, heir, registry_path.parent)
        maker.kill()
        assert heir.ask("hello") is None
        heir.ask("connect")
        assert heir.holds("arm")


@pytest.mark.parametrize("daemon_is", ["up", "down"])
def test_forked_child_that_keeps_the_lifeline_open_prolongs_nothing(
    turned: TurnedDaemon, raw: Raw, workers: Workers, daemon_is: str
) -> None:
    """A forked child that keeps its parent's lifeline open does not keep the lock of its dead parent, though the daemon
    sees no end of the connection; nor where the parent died while no daemon ran."""
    holder, waiter = raw(), workers()
    holder.holds("arm")
    child = holder.ask("fork")
    if daemon_is == "up":
        let_wait(waiter, turned.registry)
        killed_at = holder.kill()
        assert waiter.answer()["at"] - killed_at < RESUME_S / 2
    else:
        turned.kill()
        holder.kill()
        turned.start()
        assert waiter.ask("resolve", "arm", wait=RESUME_S)["held"]
    assert ") S " in Path(f"/proc/{child}/stat").read_text()  # it lives


def test_release_ends_ones_own_present_lock_only(raw: Raw, turned: TurnedDaemon) -> None:
    """A second release, a release with another token, and a release of a lock of another process, as a request or on
    the lifeline, release nothing."""
    first, second = raw(), raw()
    old = first.holds("arm")
    release = {"name": "arm", "instance": "raw"}
    assert first.ask("request_of", "release", fencing_token=old, **release) == {"ok": {"released": True}}
    assert first.ask("request_of", "release", fencing_token=old, **release) == {"ok": {"released": False}}
    new = second.holds("arm")
    for token in (old, new, 0):
        assert first.ask("request_of", "release", fencing_token=token, **release) == {"ok": {"released": False}}
        first.ask("say", {"op": "release", "fencing_token": token, **release})
    first.ask("say", {"op": "release", **release})
    first.ask("say", {"op": "release", "instance": "raw"})
    assert first.ask("request_of", "release_all", instance="raw") == {"ok": {"released": []}}
    assert second.ask("request_of", "release", fencing_token=old, **release) == {"ok": {"released": False}}
    assert token_of(turned.registry) == new
