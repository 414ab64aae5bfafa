"""Three members of etcd, three services of the lab, daemons and their clients: whatever dies, no promise breaks."""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest

import etcd
from etcd import Cluster, Member
from etcd_fleets import EtcdFleet, Trial
from etcd_networks import CabledCluster
from helpers import DaemonProcess
from labs import LabProcess
from networks import NetNamespace, need_networks
from rounds import fresh_seed

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT),
]

Mortal = DaemonProcess | LabProcess | Member
LEASE_S = 15.0
KILLS = 8
RUN_S = 50.0
GAP_S = 3.0
"""How long clients may be answered nothing while etcd elects a leader, at default settings (issue: a write gap)."""
CALM_S = 6.0
"""By then a daemon that found the lab away has asked again: it does so every 5 s at least."""


@contextmanager
def trial_on(cluster: Cluster, folder: Path) -> Iterator[Trial]:
    """Members at work on the hosts a, b and c of a lab on a cluster; prints the seed."""
    seed = fresh_seed()
    print(f"\nseed {seed}")
    with EtcdFleet(folder, cluster.url, MADSCI_REGISTRYD_EXPORT="false") as fleet, Trial(fleet, seed) as trial:
        yield trial


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three members."""
    with Cluster(tmp_path, 3) as running:
        yield running


@pytest.fixture
def trial(cluster: Cluster, registry_path: Path) -> Iterator[Trial]:
    """Members at work on the hosts a, b and c."""
    with trial_on(cluster, registry_path.parent) as running:
        yield running


def conclude(trial: Trial) -> None:
    """Fail where a promise was broken; print the figures."""
    time.sleep(CALM_S)
    verdict = trial.finish()
    print(verdict)
    told: list[dict[str, Any]] = trial.check(verdict)
    print("the lab:", dict(Counter(event["kind"] for event in told)))
    assert verdict.confirmed > 50 and verdict.moves > 10, "void: too little was done"


def judge_gaps(trial: Trial, spans: list[tuple[float, float]]) -> None:
    """Print how long clients waited in each of these spans of time; fail where it was too long."""
    answered, confirmed = trial.gaps_s(spans)
    for what, gaps_s in (("nobody was answered", answered), ("nothing was confirmed", confirmed)):
        print(f"{what} for {' '.join(f'{gap_s:.2f}' for gap_s in gaps_s)} s")
    assert statistics.median(answered) <= GAP_S


def test_leader_killed_again_and_again_breaks_no_promise(cluster: Cluster, trial: Trial) -> None:
    """While the leader is killed again and again, no change that a daemon answered is lost or told twice, no name has
    two ULIDs or two confirmed holders, no host loses its session, and clients see a short gap."""
    spans = []
    for _ in range(KILLS):
        leader = cluster.leader()
        time.sleep(trial.chance.uniform(0.2, 0.8))
        begin = time.monotonic()
        leader.kill()
        time.sleep(4.0)
        spans.append((begin, time.monotonic()))
        leader.start()
        cluster.wait_for(leader)
    conclude(trial)
    judge_gaps(trial, spans)


def test_all_members_killed_at_once_break_no_promise(cluster: Cluster, trial: Trial) -> None:
    """Where all members are killed at once, clients go on without the lab, and afterwards it has all that they did."""
    for _ in range(3):
        time.sleep(2.0)
        cluster.kill()
        time.sleep(trial.chance.uniform(0.5, 4.0))
        cluster.start()
    conclude(trial)


def test_leader_that_stands_still_breaks_no_promise(cluster: Cluster, trial: Trial) -> None:
    """A leader that is stopped for longer than the lease, and goes on, ends no session and loses nothing."""
    leader = cluster.leader()
    begin = time.monotonic()
    with etcd.paused(leader):
        time.sleep(LEASE_S + 5.0)
        assert cluster.leader() is not leader, "void: it leads still"
    spans = [(begin, time.monotonic())]
    conclude(trial)
    judge_gaps(trial, spans)


def test_member_that_is_cut_off_breaks_no_promise(tmp_path: Path, registry_path: Path) -> None:
    """Where the leader's cable is cut for longer than the lease, and then another member's, all goes on with the
    others: no session ends, and nothing that the leader answered last is lost."""
    need_networks()
    with ExitStack() as stack:
        stack.enter_context(stack.enter_context(NetNamespace()).entered())
        try:
            cluster = stack.enter_context(CabledCluster(tmp_path))
        except CalledProcessError as error:
            pytest.skip(f"network namespaces with a bridge do not work here: {error.stderr!r}")
        trial = stack.enter_context(trial_on(cluster, registry_path.parent))
        spans = []
        for length_s in (LEASE_S + 5.0, 4.0):
            time.sleep(2.0)
            leader, begin = cluster.leader(), time.monotonic()
            cluster.cut(leader)
            time.sleep(length_s)
            spans.append((begin, time.monotonic()))
            assert cluster.leader() is not leader, "void: it leads still"
            cluster.join_again(leader)
        conclude(trial)
        judge_gaps(trial, spans)


def test_services_that_die_or_stand_still_break_no_promise(trial: Trial) -> None:
    """While services of the lab are killed or stopped in turn, one of them for longer than the lease, their daemons go
    on by the others."""
    spans = []
    for n in range(12):
        service = trial.chance.choice(trial.fleet.services)
        time.sleep(trial.chance.uniform(0.2, 1.0))
        begin = time.monotonic()
        with failing(service, is_killed=n % 3 > 0):
            time.sleep(LEASE_S + 3.0 if n == 6 else trial.chance.uniform(0.5, 3.0))
        spans.append((begin, time.monotonic()))
    conclude(trial)
    judge_gaps(trial, spans)


def test_all_that_can_fail_breaks_no_promise(cluster: Cluster, trial: Trial) -> None:
    """While members of etcd, services and daemons are killed or stopped at random, up to three of them at once, and
    clients are killed, no promise breaks."""
    befell: Counter[str] = Counter()
    ends = time.monotonic() + RUN_S
    while time.monotonic() < ends:
        time.sleep(trial.chance.uniform(0.2, 1.0))
        befell.update(befall(cluster, trial))
    print(dict(befell))
    conclude(trial)


def befall(cluster: Cluster, trial: Trial) -> list[str]:
    """Let some things fail for a while; return what it was."""
    chance, fleet = trial.chance, trial.fleet
    things: list[Mortal] = [*(host.daemon for host in fleet.hosts.values()), *fleet.services, *cluster.members]
    befell = []
    with ExitStack() as stack:
        for thing in chance.sample(things, chance.choice((1, 1, 2, 3))):
            is_killed = chance.random() < 0.5
            stack.enter_context(failing(thing, is_killed=is_killed))
            befell.append(f"{type(thing).__name__} {'killed' if is_killed else 'stopped'}")
        if chance.random() < 0.5:
            trial.replace_one()
            befell.append("client killed")
        time.sleep(chance.uniform(0.0, 2.5))
    return befell


@contextmanager
def failing(thing: Mortal, *, is_killed: bool) -> Iterator[None]:
    """Have something killed, or stopped, for a while."""
    if is_killed:
        thing.kill()
    else:
        thing.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if is_killed:
            thing.start()
        else:
            thing.signal(signal.SIGCONT)
