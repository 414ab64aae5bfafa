"""The promises while clients die in all ways and the daemon is killed again and again: small; `make chaos` is large."""

from __future__ import annotations

from pathlib import Path

from deaths import die_by_the_thousand
from helpers import DaemonProcess
from mortals import WAYS
from rounds import (
    TimedDaemon,
    check,
    check_nothing_left,
    descriptors_at_rest,
    fresh_seed,
    hammer_and_kill,
    restarts_s,
    spread_ms,
)


def test_clients_that_die_in_any_way_break_no_promise_and_leave_nothing(daemon: DaemonProcess) -> None:
    """However a holder or a waiter dies, at no time are there two holders, tokens grow, who waits is next, and neither
    a descriptor nor a session is left in the daemon."""
    at_rest = descriptors_at_rest(daemon)
    few = 32 + 4 + 2 * len(WAYS)
    verdict = die_by_the_thousand(daemon, deaths=few, lanes=4, crowd=24, waiters=8, hand_overs=3, seed=fresh_seed())
    check(daemon, verdict, least_grants=32 + 4 + 2 * (len(WAYS) - 2))
    check_nothing_left(daemon, at_rest)


def test_daemon_killed_under_load_breaks_no_promise_and_leaves_nothing(registry_path: Path) -> None:
    """Over SIGKILLs of the daemon under load, with holders, waiters and frozen clients, no living holder loses its
    lock, nobody gets a held one, tokens grow, and nothing is left when all clients are gone."""
    daemon = TimedDaemon(registry_path)
    with daemon:
        at_rest = descriptors_at_rest(daemon)
        verdict = hammer_and_kill(
            daemon, clients=4, client_kills=2, daemon_kills=5, seed=fresh_seed(), keepers=2, queuers=3, frozen=1
        )
        print(f"from the execution of a daemon to its first grant: {spread_ms(restarts_s(daemon, verdict))}")
        check(daemon, verdict, least_grants=50)
        check_nothing_left(daemon, at_rest)
