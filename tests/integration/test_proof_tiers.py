"""The tiers of proof, each forced by the setting `proof`: what holds in pidfd, pid and connection, and what is said."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Workers
from helpers import DaemonProcess, FakeClock
from madsci_registry import RegistryClient, errors
from madsci_registry.protocol import GRACE_S, RESUME_S
from madsci_registry.types import Proof
from madsci_registryd.locks import Session
from madsci_registryd.transaction import Tx
from namespaces import known_again_by, need_proof
from onlooker import await_resume, holding_session, kinds_of, let_wait, token_of
from pair import Pair
from raw_client import Hammer, RawClient
from turned_clock import DAY_S, TurnedDaemon

TIERS: list[Proof] = ["pidfd", "pid", "connection"]
PROVEN: list[Proof] = ["pidfd", "pid"]


@pytest.fixture
def daemon_of(registry_path: Path) -> Iterator[Callable[[Proof], TurnedDaemon]]:
    """Starts a daemon whose configuration file names a tier; its clock can be turned."""
    started: list[TurnedDaemon] = []

    def start(tier: Proof) -> TurnedDaemon:
        need_proof(tier)
        started.append(TurnedDaemon(registry_path, tier))
        started[0].start()
        return started[0]

    yield start
    for daemon in started:
        daemon.kill()


DaemonOf = Callable[[Proof], TurnedDaemon]


class SettingDaemon(DaemonProcess):
    """A daemon that gets its tier from the environment, with another one in its configuration file."""

    def command(self, *arguments: str) -> list[str]:
        python, _, module, *rest = super().command(*arguments)
        program = (
            f"import os, runpy; os.environ['MADSCI_REGISTRYD_PROOF'] = 'pid'; "
            f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
        )
        return [python, "-c", program, *rest]


@pytest.mark.parametrize("tier", TIERS)
def test_tier_is_said_everywhere(daemon_of: DaemonOf, workers: Workers, tier: Proof) -> None:
    """The tier that is used stands in status, in each session, in the error about a held name and in the welcome, with
    the grace that follows from it; status says why where it is not the best."""
    daemon = daemon_of(tier)
    holder = workers()
    holder.ask("resolve", "arm")
    session = holding_session(daemon.registry)
    assert (session.proof, session.pid) == (tier, holder.pid)
    with closing(RawClient(daemon.socket)) as raw:
        welcome = raw.hello()
        held = raw.resolve("arm")["error"]
    assert welcome is not None
    assert (welcome["proof"], welcome["grace_s"]) == (tier, GRACE_S if tier == "connection" else None)
    assert held["holder"]["proof"] == tier
    with RegistryClient(daemon.registry, autostart=False) as client:
        status = client.status()
    assert status["proof"] == tier
    reasons = [] if tier == "pidfd" else [f"holders are proven alive by {tier} only: the setting proof says so"]
    assert status["degraded"] == reasons


def test_tier_of_the_environment_goes_before_the_file(registry_path: Path) -> None:
    """MADSCI_REGISTRYD_PROOF chooses the tier, whatever the configuration file says."""
    need_proof("pid")
    config = registry_path.parent / "registryd.toml"
    config.write_text('proof = "connection"\n')
    with (
        SettingDaemon(registry_path, "--config", str(config)),
        RegistryClient(registry_path, autostart=False) as client,
    ):
        assert client.status()["proof"] == "pid"


@pytest.mark.parametrize("tier", TIERS)
def test_killed_holder_hands_over_in_every_tier(daemon_of: DaemonOf, workers: Workers, tier: Proof) -> None:
    """The next waiter has the name of a killed holder: at once where the process is watched, when it has not resumed
    for RESUME_S where the connection alone counts."""
    daemon = daemon_of(tier)
    holder, waiter = workers(), workers()
    holder.ask("resolve", "arm")
    let_wait(waiter, daemon.registry)
    killed_at = holder.kill()
    taken_s = waiter.answer()["at"] - killed_at
    if tier == "connection":
        assert taken_s >= RESUME_S
    else:
        assert taken_s < RESUME_S / 2


@pytest.mark.parametrize("tier", PROVEN)
def test_frozen_holder_keeps_its_lock_past_the_grace(daemon_of: DaemonOf, workers: Workers, tier: Proof) -> None:
    """A stopped holder whose process is proven keeps its lock and token over restarts of the daemon, for a day too."""
    daemon = daemon_of(tier)
    holder = workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    holder.signal(signal.SIGSTOP)
    for _ in range(2):
        daemon.restart()
        daemon.pass_time(DAY_S)
        assert token_of(daemon.registry) == token
        session = holding_session(daemon.registry)
        assert (session.proof, session.attached) == (known_again_by(tier), False)
    holder.signal(signal.SIGCONT)
    await_resume(daemon.registry)
    holder.ask("ensure", "arm")
    assert holder.ask("token", "arm") == token
    assert holder.ask("losses", 0) == []


def test_frozen_holder_that_nothing_proves_loses_its_lock_after_the_grace(
    daemon_of: DaemonOf, workers: Workers
) -> None:
    """Where the connection alone counts, a stopped holder keeps its lock for GRACE_S after a restart of the daemon, not
    less, and then loses it to the next waiter; it is told when it goes on."""
    daemon = daemon_of("connection")
    holder, waiter = workers(), workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    holder.signal(signal.SIGSTOP)
    daemon.kill()
    started_at = time.monotonic()
    daemon.start()
    let_wait(waiter, daemon.registry)
    daemon.pass_time(GRACE_S - 2)
    granted = waiter.answer()
    assert granted["at"] - started_at >= 2
    assert granted["fencing_token"] > token
    holder.signal(signal.SIGCONT)
    assert holder.ask("losses", 1) == [["arm", token]]
    with pytest.raises(errors.LockLostError):
        holder.ask("ensure", "arm")


@pytest.mark.parametrize("tier", TIERS)
def test_idle_holder_resumes_by_itself_in_every_tier(daemon_of: DaemonOf, workers: Workers, tier: Proof) -> None:
    """A living holder that does nothing keeps its lock and token over SIGKILL and SIGTERM of the daemon, and nobody is
    granted the name in between."""
    daemon = daemon_of(tier)
    holder = workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    with Hammer(daemon.socket, "arm") as hammer:
        for end in (daemon.kill, daemon.terminate):
            end()
            daemon.start()
            await_resume(daemon.registry)
            hammer.await_refusal()
        daemon.pass_time(2 * GRACE_S)
        hammer.await_refusal()
    assert hammer.granted == []
    assert token_of(daemon.registry) == token
    assert holder.ask("losses", 0) == []
    assert kinds_of(daemon.registry) == ["created", "granted"]


@pytest.mark.parametrize("tier", TIERS)
def test_holder_that_died_while_the_daemon_was_down_is_freed_at_once_in_every_tier(
    daemon_of: DaemonOf, workers: Workers, tier: Proof
) -> None:
    """A pid that is nobody's any more proves the death in every tier: the next daemon frees the name without grace."""
    daemon = daemon_of(tier)
    holder, other = workers(), workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    daemon.kill()
    holder.kill()
    daemon.start()
    assert other.ask("resolve", "arm", wait=RESUME_S)["fencing_token"] > token


class TierPair(Pair):
    """A Pair whose daemon, after a restart, knows its clients by one tier."""

    tier: Proof = "connection"

    def _judge(self, tx: Tx, session: Session) -> None:
        session.process = replace(session.process, proof=self.tier)
        session.since = tx.monotonic
        self.core.registrar.add_session(session)


@pytest.mark.parametrize("tier", TIERS)
def test_detached_session_ends_by_its_tier_to_the_second(tmp_path: Path, tier: Proof) -> None:
    """A holder that does not resume keeps its lock until just before GRACE_S after the restart, and only where the
    connection alone counts does it end then; one that resumed in time is not touched."""
    pair = TierPair(tmp_path / "registry.db", FakeClock())
    pair.tier = tier
    silent, resuming = pair.session("silent"), pair.session("resuming")
    silent.resolve("arm").ok()
    resuming.resolve("leg").ok()
    pair.restart()
    other = pair.session("other")
    pair.wait(GRACE_S - 0.001)
    assert other.resolve("arm").code == "held"
    resuming.resume()
    pair.wait(0.002)
    assert other.resolve("arm").code == ("ok" if tier == "connection" else "held")
    pair.wait(DAY_S)
    assert other.resolve("leg").code == "held"
    pair.close()
