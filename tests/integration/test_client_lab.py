"""A client whose daemon belongs to a lab: real clients, real daemons (each a host), a real lab."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from classic import Classic, warned
from ctl import Ctl
from helpers import PATIENCE_S, DaemonProcess, until
from labs import LabProcess
from madsci_registry import Fence, HeldError, LockLostError, Registration, RegistryClient
from madsci_registryctl import exits


class Host:
    """A daemon that belongs to a lab, a client of it, and registryctl."""

    def __init__(self, registry: Path, lab: LabProcess) -> None:
        registry.parent.mkdir()
        self.lab = lab
        self.daemon = DaemonProcess(registry)
        self.daemon.extra_env = {"MADSCI_REGISTRYD_LAB_URL": lab.url}
        self.client = RegistryClient(registry, autostart=False, timeout=PATIENCE_S)
        self.ctl = Ctl(registry)

    def start(self) -> Host:
        """Start the daemon and wait until it has found the lab, or that it is away."""
        self.daemon.start()
        until(lambda: self.state() in ("up", "away"), "for the daemon to look for its lab")
        return self

    def state(self) -> str:
        """Say how the daemon stands with the lab."""
        return str(self.client.status()["lab"]["state"])

    def end(self) -> None:
        """Close and kill."""
        self.client.close()
        self.daemon.kill()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[LabProcess]:
    """A lab of the test's own, to be killed."""
    with LabProcess(tmp_path) as running:
        yield running


@pytest.fixture
def hosts(registry_path: Path, lab: LabProcess) -> Iterator[tuple[Host, Host]]:
    """Two hosts of the lab."""
    a, b = (Host(registry_path.parent / name / "registry.json", lab) for name in ("a", "b"))
    try:
        yield a.start(), b.start()
    finally:
        a.end()
        b.end()


def told_of(registration: Registration) -> SimpleQueue[tuple[str, str, Any]]:
    """Return what its callback sees when it is called."""
    told: SimpleQueue[tuple[str, str, Any]] = SimpleQueue()
    registration.on_state(lambda r, state: told.put((state, r.lab, r.fencing_token)))
    return told


def test_name_is_confirmed_and_moves_with_its_ulid(hosts: tuple[Host, Host]) -> None:
    """A name is held on one host of the lab only, which the refusal names; given back, the other host has it, with its
    ULID, learnt from the lab, and a higher token."""
    a, b = hosts
    mine = a.client.resolve("arm", "node")
    assert (mine.lab, mine.source, mine.is_new) == ("confirmed", "local", True)
    with pytest.raises(HeldError) as refused:
        b.client.resolve("arm", "node")
    holder = refused.value.holder
    assert holder is not None and not refused.value.is_me and f"on {holder.host}" in str(refused.value)
    mine.release()
    theirs = b.client.resolve("arm", "node", wait=PATIENCE_S)
    assert (theirs.id, theirs.lab, theirs.source, theirs.is_new) == (mine.id, "confirmed", "lab", False)
    assert (theirs.fencing_token or 0) > (mine.fencing_token or 0)
    assert a.client.lookup("arm") == b.client.lookup("arm") == mine.id


def test_lock_taken_without_the_lab_is_confirmed_later(hosts: tuple[Host, Host], lab: LabProcess) -> None:
    """A lock that is taken while the lab is away is unconfirmed; once it is back the holder is told that it is
    confirmed, with the token that it has from then on, by which it is found, fenced and released."""
    a, _ = hosts
    lab.kill()
    mine = a.client.resolve("arm", "node")
    fence, first, told = Fence(), mine.fencing_token or 0, told_of(mine)
    assert (mine.lab, mine.held) == ("unconfirmed", True)
    fence.check(first)
    lab.start()
    assert told.get(timeout=PATIENCE_S) == ("held", "confirmed", mine.fencing_token)
    grown = mine.fencing_token or 0
    assert grown > first and a.client.get("arm").fencing_token == grown
    fence.check(grown)
    with pytest.raises(LockLostError):
        fence.check(first)
    again = a.client.resolve("arm", "node")
    assert (again.fencing_token, again.lab, mine.held) == (grown, "confirmed", True)
    assert again.release() and a.client.get("arm").state == "free"


def test_lock_that_grew_while_its_daemon_was_away_is_followed(hosts: tuple[Host, Host], lab: LabProcess) -> None:
    """A lock that was unconfirmed when its daemon was killed is held on after the restart, and confirmed with a higher
    token by the lab that is back, whether the client resumed before or after that."""
    a, _ = hosts
    lab.kill()
    mine = [a.client.resolve(name, "node") for name in ("arm", "leg", "eye")]
    before = [r.fencing_token or 0 for r in mine]
    a.daemon.kill()
    lab.start()
    a.daemon.start()
    until(lambda: all(r.lab == "confirmed" for r in mine), "for the locks to be confirmed")
    assert all(r.held and (r.fencing_token or 0) > token for r, token in zip(mine, before, strict=True))
    assert [r.fencing_token for r in mine] == [a.client.get(r.name).fencing_token for r in mine]
    assert all(r.release() for r in mine)
    assert {a.client.get(r.name).state for r in mine} == {"free"}


def test_conflict_is_told_shown_and_decided(hosts: tuple[Host, Host], lab: LabProcess) -> None:
    """Two hosts that made a name while they were apart: who is second is told of the lab's ULID, keeps its own until it
    resolves anew, and both are known as the same component; a person sees both sides, and may decide for the other."""
    a, b = hosts
    lab.kill()
    first, second = a.client.resolve("arm", "node"), b.client.resolve("arm", "node")
    assert first.id != second.id
    first.release()
    b.daemon.signal(signal.SIGSTOP)
    lab.start()
    until(lambda: a.client.lab_sync(1)["behind"] == 0, "for the first host's word to be in")
    b.daemon.signal(signal.SIGCONT)
    until(lambda: second.preferred_id == first.id, "for the second host's holder to be told")
    assert second.held and b.client.get("arm").preferred_id == first.id
    assert f"preferred id: {first.id}" in " ".join(b.ctl("show", "arm").split())
    (conflict,) = b.ctl.json("lab", "conflicts")
    assert (conflict["name"], conflict["id"], conflict["entry"]["id"]) == ("arm", second.id, first.id)
    shown = b.ctl("lab", "conflicts", "arm")
    assert "known by its pidfd" in shown and first.id in shown and second.id in shown
    anew = b.client.resolve("arm", "node")
    assert (anew.id, anew.preferred_id, anew.held) == (first.id, None, True)
    component = b.client.whois(second.id)
    assert (component.id, component.other_ids, component.preferred_id) == (first.id, [second.id], None)
    anew.release()
    entry = b.ctl.json("lab", "merge", "arm", "--prefer", second.id, "-y")
    assert (entry["id"], entry["other_ids"]) == (second.id, [first.id])
    assert a.ctl.json("lab", "conflicts", "arm") == []


def test_registryctl_says_how_the_daemon_stands_with_its_lab(hosts: tuple[Host, Host], lab: LabProcess) -> None:
    """Lab status follows the lab; lab sync waits until it knows all, or says what it does not; list shows how locks
    stand; what is asked of the lab through the daemon is lab_unavailable while it is away."""
    a, _ = hosts
    a.client.resolve("arm", "node")
    assert "The lab knows all changes." in a.ctl.run("lab", "sync").stderr
    assert (a.ctl.json("lab", "status")["state"], a.ctl.json("status")["lab"]["confirmed"]) == ("up", 1)
    assert a.ctl("list").splitlines()[1].endswith("confirmed")
    lab.kill()
    a.client.resolve("leg", "node")
    status = a.ctl.json("lab", "status")
    assert (status["state"], status["behind"], status["unconfirmed"]) == ("away", 1, 1)
    error = a.ctl.error("lab", "sync", "--timeout", "0.3", status=exits.TIMEOUT)
    assert "does not know 1 changes after 0.3 s" in error["message"]
    assert a.ctl.error("lab", "conflicts", status=exits.OTHER)["code"] == "lab_unavailable"
    lab.start()
    assert a.ctl.json("lab", "sync")["behind"] == 0


def test_registryctl_where_the_daemon_has_no_lab(daemon: DaemonProcess) -> None:
    """Without a lab, lab status says off, and what needs one is unsupported."""
    ctl = Ctl(daemon.registry)
    assert ctl("lab", "status").split() == ["lab:", "off"]
    for words in (["sync"], ["conflicts"], ["merge", "arm", "--prefer", "x", "-y"]):
        assert ctl.error("lab", *words, status=exits.OTHER)["code"] == "unsupported"


def test_lab_url_of_another_lab_is_not_asked(
    hosts: tuple[Host, Host], served: LabProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """An IdentityResolver with the lab_url of another lab than its daemon's leaves all to that one, with one warning;
    with the daemon's own there is none."""
    a, b = hosts
    with Classic(a.daemon.registry) as classic, Classic(b.daemon.registry) as other:
        resolver = classic.resolver(served.url)
        result = resolver.resolve_with_info("elsewhere/arm", "node")
        assert (result.source, resolver.lookup("elsewhere/nobody")) == ("new", None)
        assert warned(caplog).count("is not asked: the daemon belongs to the lab at") == 1
        resolver.release("elsewhere/arm")
        caplog.clear()
        there = other.resolver(a.lab.url).resolve_with_info("elsewhere/arm", "node", retry_timeout=PATIENCE_S)
        assert (there.id, there.source, warned(caplog)) == (result.id, "lab", "")
    with RegistryClient(b.daemon.registry) as client:
        assert client.get("elsewhere/arm").id == result.id
    assert Ctl(a.daemon.registry).json("list", "elsewhere/*", "--lab", served.url) == []
