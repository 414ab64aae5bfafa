"""A host's session in the lab: copies of it, reboots, labs that come and go, and how often they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab_pairs import Hosts, LabPair, ask, joined, lines

Said = tuple[int, Any]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with joined(tmp_path) as hosts:
        yield hosts


def state(host: LabPair) -> str:
    """Return how the lab is reached."""
    return str(host.side.link.state)


def reboot(host: LabPair, boot: str) -> None:
    """Start the host's daemon in another boot; nobody of before lives."""
    host.dead |= set(host.core.registrar.sessions)
    host.restart()
    host.side.link._boot = boot
    host.side.link.end_session()


def test_reboot_within_the_lease_waits_for_the_old_session_to_end(hosts: Hosts) -> None:
    """A host that reboots within its lease goes on without the lab until its old session has ended, by the same name,
    and gets what it had with a higher term."""
    a, on_a = hosts.start("a")
    before, name = ask(a, on_a, "arm").ok()["fencing_token"], a.name
    reboot(a, "another-boot")
    a.settle()
    on_a = a.session("anew")
    granted = ask(a, on_a, "arm").ok()
    assert (granted["lab"], granted["fencing_token"] > before) == ("unconfirmed", True)
    a.wait(25)
    assert a.name == name
    assert on_a.get("arm")["lab"] == "confirmed"
    assert lines(a, "lab")[-1]["fencing_token"] == on_a.get("arm")["fencing_token"] > granted["fencing_token"]


def test_reboot_while_the_lab_comes_and_goes_makes_no_new_host(hosts: Hosts) -> None:
    """A lab that was away between two refusals, and starts every lease anew, does not make a rebooted host a copy."""
    a, on_a = hosts.start("a")
    ask(a, on_a, "arm").ok()
    name = a.name
    reboot(a, "another-boot")
    a.wait(3)
    assert state(a) == "refused"
    a.cut("down")
    a.wait(60)
    assert state(a) == "away"
    a.cut("up")
    hosts.lab.twist = lambda route, status, said: (
        (409, {"code": "conflict", "detail": "it lives"}) if route.endswith("register") else (status, said)
    )
    a.wait(12)
    assert a.name == name
    hosts.lab.twist = lambda route, status, said: (status, said)
    a.wait(12)
    assert (a.name, state(a)) == (name, "up")


def test_copy_that_lives_on_makes_a_new_host_and_says_which(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    """A host whose name another one goes by, and does not stop, takes a new name, tells all anew, and logs it once."""
    a, on_a = hosts.start("a")
    held, name = ask(a, on_a, "arm").ok(), a.name
    store = hosts.lab.registry.store
    a.cut("down")
    hosts.wait(20)
    copy = store.register(name, "copied-boot", 15.0, "copy")
    a.cut("up")
    for _ in range(60):
        store.keep(name, copy.id, "copied-boot")
        a.wait(1)
    assert a.name != name
    assert on_a.get("arm")["lab"] == "confirmed"
    assert on_a.get("arm")["fencing_token"] >= held["fencing_token"]
    told = [record.getMessage() for record in caplog.records if "another host of the lab" in record.getMessage()]
    assert len(told) == 1 and a.name in told[0]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"code": "permission_denied", "detail": "no"}),
        (403, {"code": "permission_denied", "detail": "no"}),
        (409, {"code": "conflict", "detail": "no"}),
        (409, {"code": "session_required", "detail": "no"}),
        (400, {"code": "invalid", "detail": "no"}),
        (429, {"code": "busy", "detail": "no"}),
        (500, {"code": "internal", "detail": "no"}),
        (200, {"session": ""}),
        (200, {}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lab_that_refuses_all_is_asked_seldom(hosts: Hosts, status: int, body: dict[str, Any]) -> None:
    """A lab that says no to everything is asked a few times in a minute; names are given without it, at once."""
    a, on_a = hosts.start("a")
    hosts.lab.twist = lambda route, real, said: (status, body)
    ask(a, on_a, "arm")
    a.wait(10)
    before = sum(hosts.lab.requests.values())
    a.wait(60)
    assert sum(hosts.lab.requests.values()) - before <= 40
    assert ask(a, on_a, "leg").ok()["lab"] == "unconfirmed"
    assert state(a) in ("away", "refused") and a.side.link.error
    hosts.lab.twist = lambda route, status, said: (status, said)
    a.wait(45)
    assert state(a) == "up"
    assert on_a.get("leg")["lab"] == "confirmed"


def test_machine_that_wakes_asks_the_lab_at_once(hosts: Hosts) -> None:
    """After a suspend longer than the lease the lab is asked within a second, not with the next keepalive."""
    a, on_a = hosts.start("a")
    ask(a, on_a, "arm").ok()
    a.wait(5.5)
    hosts.lab.clock.sleep(60)
    assert on_a.get("arm")["lab"] == "unconfirmed"
    a.wait(1)
    assert on_a.get("arm")["lab"] == "confirmed"
    assert [line["lab"] for line in lines(a, "lab")] == ["unconfirmed", "confirmed"]


def test_restart_after_the_lease_takes_its_locks_again(hosts: Hosts) -> None:
    """A daemon that was down for longer than the lease has its holders' locks confirmed again, or tells them."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    kept, lost = ask(a, on_a, "kept").ok(), ask(a, on_a, "lost").ok()
    a.cut("slow")
    hosts.lab.clock.advance(3)
    for _ in range(20):  # its daemon is down
        hosts.lab.clock.advance(1)
        hosts.lab.registry.store.expire()
        b.settle()
    assert ask(b, on_b, "lost").ok()["fencing_token"] > lost["fencing_token"]
    a.mode = "up"
    a.restart()
    hosts.wait(6)
    assert [line["name"] for line in lines(a, "lost")] == ["lost"]
    assert a.session("c").get("kept")["fencing_token"] == kept["fencing_token"]
    assert a.session("d").get("kept")["lab"] == "confirmed"


def test_lab_restored_from_an_older_backup_takes_back_what_hosts_hold(hosts: Hosts) -> None:
    """After the lab was set back, hosts have their locks again, with the tokens that they had."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    early = ask(a, on_a, "early").ok()
    hosts.wait(6)
    backup = hosts.lab.path.with_suffix(".backup")

    def back_up() -> None:
        backup.write_bytes(hosts.lab.path.read_bytes())

    def restore() -> None:
        hosts.lab.path.write_bytes(backup.read_bytes())

    hosts.lab.restart(earlier=back_up)
    late = ask(b, on_b, "late").ok()
    assert on_a.release("early", early["fencing_token"])
    a.settle()
    moved = ask(b, on_b, "early").ok()
    hosts.wait(6)
    hosts.lab.restart(earlier=restore)
    hosts.wait(25)
    for name, before in (("late", late), ("early", moved)):
        assert (on_b.get(name)["lab"], on_b.get(name)["fencing_token"]) == ("confirmed", before["fencing_token"])
    assert not lines(b, "lost")
    assert ask(a, on_a, "early").code == "held"
