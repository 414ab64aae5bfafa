"""`doctor --crash-test`: whether this host keeps the promises about locks, tried on a scratch daemon and measured.

Each trial starts its own client processes on a name of its own, kills or freezes them and the daemon, and compares
fencing tokens. A promise of safety that is broken (held twice, a lock lost) is an error; a time above the promise is a
warning, as a loaded machine may be the reason, unless it is so long that something waited for a timeout.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from madsci_registryctl.doctor.case import unreadable
from madsci_registryctl.doctor.findings import Finding, Trial
from madsci_registryctl.doctor.scratch import LOOK_S, PATIENCE_S, Client, NotKept, Scratch

HAND_OVER_PROMISE_MS = 50.0
"""From the death of a holder to the grant, the 99th percentile (promise 3 of docs/architecture.md)."""
HAND_OVER_LIMIT_MS = 1000.0
"""More is no load: a session whose end was not noticed is given up after 2 s (RESUME_S)."""
START_PROMISE_MS = 500.0
"""From the exec of a daemon to its first answer, the 99th percentile."""
HANDED_OVER = "the waiter had the name"
REPORT = "try again; if it stays so, report it with what registryctl status and uname -a say"
KILLED_ROUNDS = 10
FORKED_ROUNDS = 5


def crash_test() -> Iterator[Finding]:
    """Yield a Trial for each thing that was tried. Everything that was started is ended when this is left or closed."""
    if find_spec("madsci_registryd") is None or not sys.executable:
        fix = "run it where madsci-registryd is installed"
        yield Finding("error", "crash test", "the daemon's package (madsci_registryd) is not installed here", fix)
        return
    try:
        with Scratch() as scratch:
            for name, trial in TRIALS.items():
                yield from _tried(scratch, name, trial)
    except OSError as error:
        yield unreadable("crash test", error)


def _tried(scratch: Scratch, name: str, trial: Callable[[Scratch], list[Trial]]) -> list[Trial]:
    try:
        scratch.serve()
        return trial(scratch)
    except NotKept as failure:
        return [judged(name, "", [], 0.0, [str(failure)])]
    finally:
        scratch.end_clients()


# trials


def killed_holder(scratch: Scratch) -> list[Trial]:
    """A holder gets SIGKILL while another process waits for its name."""
    times_ms, broken = _hand_overs(scratch, "killed", KILLED_ROUNDS, fork=False)
    return [judged("killed holder", HANDED_OVER, times_ms, HAND_OVER_PROMISE_MS, broken)]


def forked_holder(scratch: Scratch) -> list[Trial]:
    """The same, and a child that the holder forked lives on with all that it inherited."""
    times_ms, broken = _hand_overs(scratch, "forked", FORKED_ROUNDS, fork=True)
    return [judged("forked holder", HANDED_OVER, times_ms, HAND_OVER_PROMISE_MS, broken)]


def stopped_holder(scratch: Scratch) -> list[Trial]:
    """A holder is frozen by SIGSTOP, and the daemon killed and started again."""
    observer, rival, holder = (scratch.client() for _ in range(3))
    token = _granted(holder.ask("resolve", name="stopped"))["token"]
    holder.freeze()
    start_ms = _restart_ms(scratch, observer)
    broken = _lost(observer, "stopped", token, holder)
    if rival.ask("resolve", name="stopped").get("error", {}).get("code") != "held":
        broken.append("another process was not refused the name of a stopped one")
    holder.thaw()
    if holder.ask("held", name="stopped") != {"held": True, "token": token}:
        broken.append("the holder had lost its lock when it went on")
    return [
        judged("stopped holder", "kept its lock over a restart; first answer", [start_ms], START_PROMISE_MS, broken)
    ]


def restarted_daemon(scratch: Scratch) -> list[Trial]:
    """The daemon gets SIGKILL and is started again while one process holds and one waits; then the holder dies."""
    observer, holder, waiter = (scratch.client() for _ in range(3))
    token = _granted(holder.ask("resolve", name="restart"))["token"]
    waiter.tell("resolve", name="restart", wait_s=PATIENCE_S)
    _await_waiter(scratch, observer, "restart")
    start_ms = _restart_ms(scratch, observer)
    broken = _lost(observer, "restart", token, holder)
    restart = judged("restart", "holder and waiter stayed; first answer", [start_ms], START_PROMISE_MS, broken)
    if broken:
        return [restart]
    _await_waiter(scratch, observer, "restart")
    killed_at = holder.kill()
    hand_over_ms, broken = judged_grant(waiter.answer("resolve"), token, killed_at)
    return [restart, judged("waiter over it", HANDED_OVER, [hand_over_ms], HAND_OVER_PROMISE_MS, broken)]


def died_meanwhile(scratch: Scratch) -> list[Trial]:
    """A holder dies while no daemon is up."""
    observer, holder = scratch.client(), scratch.client()
    token = _granted(holder.ask("resolve", name="meanwhile"))["token"]
    observer.ask("answered")
    scratch.kill_daemon()
    died_at = holder.kill()
    exec_at, _ = _restart(scratch, observer)
    grant = observer.ask("resolve", name="meanwhile")
    if "error" in grant:
        return [judged("died meanwhile", "", [], START_PROMISE_MS, [f"its name is not free: {_said(grant)}"])]
    _, broken = judged_grant(grant, token, died_at)
    times_ms = [(grant["at"] - exec_at) * 1e3]
    return [judged("died meanwhile", "its name was free again, first grant", times_ms, START_PROMISE_MS, broken)]


TRIALS: dict[str, Callable[[Scratch], list[Trial]]] = {
    "killed holder": killed_holder,
    "forked holder": forked_holder,
    "stopped holder": stopped_holder,
    "restart": restarted_daemon,
    "died meanwhile": died_meanwhile,
}


# their steps


def _hand_overs(scratch: Scratch, name: str, rounds: int, *, fork: bool) -> tuple[list[float], list[str]]:
    """Kill the holder of a name again and again; return how long each waiter waited on, and what was broken."""
    times_ms: list[float] = []
    broken: list[str] = []
    observer, holder = scratch.client(), scratch.client()
    token = _granted(holder.ask("resolve", name=name))["token"]
    for _ in range(rounds):
        waiter = scratch.client()
        if fork:
            holder.ask("fork")
        waiter.tell("resolve", name=name, wait_s=PATIENCE_S)
        _await_waiter(scratch, observer, name)
        killed_at = holder.kill()
        grant = waiter.answer("resolve")
        if fork and not holder.left_somebody:
            raise NotKept("the forked child did not outlive its parent: nothing was tried")
        time_ms, faults = judged_grant(grant, token, killed_at)
        times_ms.append(time_ms)
        broken += faults + _lost(observer, name, grant["token"], waiter)
        holder, token = waiter, grant["token"]
    return times_ms, broken


def _restart_ms(scratch: Scratch, observer: Client) -> float:
    """Kill the daemon, start it, and return the milliseconds from its exec to its first answer."""
    observer.ask("answered")  # its own start is over
    scratch.kill_daemon()
    exec_at, answered_at = _restart(scratch, observer)
    return (answered_at - exec_at) * 1e3


def _restart(scratch: Scratch, observer: Client) -> tuple[float, float]:
    observer.tell("answered")
    exec_at = scratch.start_daemon()
    return exec_at, observer.answer("answered")["at"]


def _await_waiter(scratch: Scratch, observer: Client, name: str) -> None:
    """Wait until somebody waits for the name. Raises NotKept."""
    until = time.monotonic() + scratch.patience_s()
    while not observer.ask("look", name=name).get("waiting"):
        if time.monotonic() >= until:
            raise NotKept("the waiting process is not in the queue")
        time.sleep(LOOK_S)


def _granted(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a grant as it is. Raises NotKept where it is a refusal."""
    if "error" in answer:
        raise NotKept(f"the name was not granted: {_said(answer)}")
    return answer


def judged_grant(answer: dict[str, Any], last_token: int, died_at: float) -> tuple[float, list[str]]:
    """Return the milliseconds from a holder's death to the next grant, and what is wrong with that grant."""
    grant = _granted(answer)
    broken = []
    if grant["at"] < died_at:
        broken.append("the name was granted while its holder lived")
    if grant["token"] <= last_token:
        broken.append(f"the fencing token did not grow: {grant['token']} after {last_token}")
    return (grant["at"] - died_at) * 1e3, broken


def _lost(observer: Client, name: str, token: int, holder: Client) -> list[str]:
    """Say what is wrong where the daemon does not know a lock as it was granted."""
    found = observer.ask("look", name=name)
    if "error" in found:
        return [f"the daemon does not say who holds the name: {_said(found)}"]
    # A daemon need not see its holders' pids; the token is one holder's alone.
    if found["token"] == token and found["pid"] in (holder.pid, None):
        return []
    return [f"pid {holder.pid} held the name with token {token}; now it is pid {found['pid']} with {found['token']}"]


def _said(answer: dict[str, Any]) -> str:
    return str(answer["error"].get("message"))


def judged(check: str, what: str, times_ms: list[float], promise_ms: float, broken: list[str]) -> Trial:
    """Make the finding of a trial from what was measured and what was broken."""
    times = tuple(round(time_ms, 1) for time_ms in times_ms)
    longest_ms = max(times, default=0.0)
    settings: dict[str, Any] = {"times_ms": times, "promise_ms": promise_ms, "broken": tuple(broken)}
    if broken:
        return Trial("error", check, "; ".join(dict.fromkeys(broken)), REPORT, **settings)
    found = f"{what} {_spread(times)}; promised: {promise_ms:.0f} ms"
    if promise_ms == HAND_OVER_PROMISE_MS and longest_ms > HAND_OVER_LIMIT_MS:
        return Trial("error", check, f"{found}: a death was not noticed, but timed out", REPORT, **settings)
    if longest_ms > promise_ms:
        return Trial(
            "warning", check, found, "a loaded machine may be the reason: try again when it is quiet", **settings
        )
    return Trial("ok", check, found, **settings)


def _spread(times_ms: tuple[float, ...]) -> str:
    if len(times_ms) == 1:
        return f"after {times_ms[0]:.1f} ms"
    return f"after {statistics.median(times_ms):.1f} ms (p50), {max(times_ms):.1f} ms at worst of {len(times_ms)}"
