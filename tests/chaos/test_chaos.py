"""The promises under thousands of deaths, and how long a hand-over and a restart take. `make chaos` runs these."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from deaths import BESIDE, die_by_the_thousand
from helpers import DaemonProcess
from madsci_registry import RegistryClient
from madsci_registry.protocol import RESUME_S
from mortals import WAYS
from rounds import (
    TimedDaemon,
    check,
    check_nothing_left,
    descriptors_at_rest,
    fresh_seed,
    hammer_and_kill,
    hand_over_s,
    restarts_s,
    spread_ms,
)

# Judged on a quiet machine only, which this is not always: more than this is shown, not failed.
HAND_OVER_P99_S = 0.050
START_P99_S = 0.500


def over(taken: list[float], limit_s: float) -> str:
    """Say how many took longer than a limit."""
    return f"{sum(s > limit_s for s in taken)} of {len(taken)} over {limit_s * 1e3:.0f} ms"


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_five_thousand_client_deaths_break_no_promise_and_leave_nothing(daemon: DaemonProcess) -> None:
    """However 5,000 clients die, 1,000 of them at about once, at no time are there two holders, tokens grow, whoever
    waits is next without waiting for a timeout, and no descriptor, session or lock is left in the daemon."""
    at_rest = descriptors_at_rest(daemon)
    verdict = die_by_the_thousand(
        daemon, deaths=5000, lanes=24, crowd=1000, waiters=200, hand_overs=300, seed=fresh_seed()
    )
    check(daemon, verdict, least_grants=4500)
    check_nothing_left(daemon, at_rest)
    taken = verdict.hand_overs[BESIDE]
    print(f"hand-over after SIGKILL beside 1,000 sessions: {spread_ms(taken)}; {over(taken, HAND_OVER_P99_S)}")
    assert max(taken) < RESUME_S / 2
    slow = {way: spread_ms(s) for way, s in verdict.hand_overs.items() if way in WAYS and median(s) > RESUME_S / 2}
    assert slow == {}


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_three_hundred_daemon_restarts_break_no_promise_and_leave_nothing(registry_path: Path) -> None:
    """Over 300 SIGKILLs of the daemon under load, and 100 of clients, no living holder loses its lock, whether idle or
    frozen; nobody gets a held name; tokens grow, no identity goes; nothing is left when all clients are gone."""
    daemon = TimedDaemon(registry_path)
    with daemon:
        at_rest = descriptors_at_rest(daemon)
        verdict = hammer_and_kill(
            daemon, clients=12, client_kills=100, daemon_kills=300, seed=fresh_seed(), keepers=6, queuers=6, frozen=3
        )
        taken = restarts_s(daemon, verdict)
        print(f"from the execution of a daemon to its first grant: {spread_ms(taken)}; {over(taken, START_P99_S)}")
        check(daemon, verdict, least_grants=3000)
        check_nothing_left(daemon, at_rest)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_hand_over_after_death_is_quick(daemon: DaemonProcess) -> None:
    """After 200 deaths of a holder the next waiter had the name each time without waiting for a timeout."""
    taken = hand_over_s(daemon.registry, rounds=200)
    print(f"hand-over after SIGKILL: {spread_ms(taken)}; {over(taken, HAND_OVER_P99_S)}")
    assert max(taken) < RESUME_S / 2


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_hand_over_beside_many_locks_is_quick(daemon: DaemonProcess) -> None:
    """With 1,000 names held by others a hand-over does not wait for any timeout either."""
    with RegistryClient(daemon.registry) as crowd:
        crowd.resolve_many((f"other-{i}", "node") for i in range(1000))
        taken = hand_over_s(daemon.registry, rounds=50)
    print(f"hand-over beside 1,000 held names: {spread_ms(taken)}")
    assert max(taken) < RESUME_S / 2
