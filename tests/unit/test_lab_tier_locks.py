"""Locks of hosts and lab under attack: tokens that must grow, renames under way, lost answers, I/O errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab_pairs import Hosts, LabPair, ask, joined, lines
from madsci_registry import protocol
from pair import Client

TERM = 1 << 20


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with joined(tmp_path) as hosts:
        yield hosts


def released(hosts: Hosts, name: str) -> int:
    """Count how often the lab saw a name given back."""
    return sum(event.kind == "released" for event in hosts.lab.registry.store.history(name, 0, 1000))


def rename(client: Client, old: str, new: str, id: str) -> Any:
    return client.send("rename", old=old, new=new, id=id, force=True, turn=False)


def spend(host: LabPair, name: str, token: int) -> None:
    """Let the highest token that a name ever had be this one."""
    host.core.db.execute("UPDATE names SET last_token = ? WHERE name = ?", (token, name))


# tokens


def test_numbers_of_a_term_used_up_while_free_take_a_higher_term(hosts: Hosts) -> None:
    """A name whose term has no number left is granted with a higher term of the lab."""
    a, on_a = hosts.start("a")
    first = ask(a, on_a, "arm").ok()["fencing_token"]
    assert on_a.release("arm", first)
    a.settle()
    other = a.session("other")
    ask(a, on_a, "arm").ok()
    spend(a, "arm", (on_a.get("arm")["fencing_token"] // TERM + 1) * TERM - 1)
    waiting = ask(a, other, "arm", wait_s=9.0)
    assert on_a.release("arm", on_a.get("arm")["fencing_token"])
    a.settle()
    granted = waiting.ok()
    assert granted["fencing_token"] // TERM > first // TERM + 1
    assert granted["lab"] == other.get("arm")["lab"] == "confirmed"


def test_numbers_of_a_term_used_up_while_the_lab_is_away(hosts: Hosts) -> None:
    """Without the lab a name whose term is used up is granted with a higher token, unconfirmed; the lab confirms it
    later, with a higher one again."""
    a, on_a = hosts.start("a")
    first = ask(a, on_a, "arm").ok()["fencing_token"]
    other = a.session("other")
    waiting = ask(a, other, "arm", wait_s=9.0)
    a.cut("down")
    a.wait(6)
    spend(a, "arm", (first // TERM + 1) * TERM - 1)
    assert on_a.release("arm", first)
    a.settle()
    granted = waiting.ok()
    assert granted["lab"] == "unconfirmed" and granted["fencing_token"] > (first // TERM + 1) * TERM - 1
    a.cut("up")
    a.wait(12)
    assert other.get("arm")["lab"] == "confirmed"
    assert other.get("arm")["fencing_token"] > granted["fencing_token"]
    assert lines(a, "lab")[-1]["fencing_token"] == other.get("arm")["fencing_token"]


@pytest.mark.parametrize("lab_had_it", [False, True])
def test_rename_to_a_name_with_higher_tokens_is_confirmed_with_a_higher_one(hosts: Hosts, lab_had_it: bool) -> None:
    """A held component that takes over a name which has had higher tokens than the lab knows of is confirmed under it
    soon, with a token above all of them."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    ask(a, on_a, "leg", acquire_lock=lab_had_it).ok()
    a.cut("down")
    a.wait(6)
    leg = on_a.get("leg")
    rename(on_a, "leg", "old_leg", leg["id"])
    a.settle()
    highest = held["fencing_token"] + 900 * TERM + 5
    spend(a, "leg", highest)
    rename(on_a, "arm", "leg", held["id"])
    a.settle()
    a.cut("up")
    a.wait(15)
    now = on_a.get("leg")
    assert now["lab"] == "confirmed" and now["fencing_token"] > highest
    before = hosts.lab.requests["/registry/release"]
    a.wait(20)
    assert hosts.lab.requests["/registry/release"] == before
    assert not lines(a, "lost")


def test_release_with_a_token_that_has_grown_since_ends_the_lock(hosts: Hosts) -> None:
    """A client that gives a lock back with the token that it was granted, before it has read of the higher one, has
    given it back; an older lock's token is none of it."""
    a, on_a = hosts.start("a")
    a.cut("down")
    earlier = ask(a, on_a, "arm").ok()["fencing_token"]
    assert on_a.release("arm", earlier)
    granted = ask(a, on_a, "arm").ok()["fencing_token"]
    a.cut("up")
    a.wait(6)
    assert on_a.get("arm")["fencing_token"] > granted
    assert not on_a.release("arm", earlier)
    assert on_a.release("arm", granted)


# renames


def test_renames_one_after_the_other_keep_the_lab_lock(hosts: Hosts) -> None:
    """Two renames in one turn, and names that are swapped, keep every lock in the lab: none is given back."""
    a, on_a = hosts.start("a")
    arm, leg = ask(a, on_a, "arm").ok()["id"], ask(a, on_a, "leg").ok()["id"]
    rename(on_a, "arm", "b", arm)
    rename(on_a, "b", "c", arm)
    rename(on_a, "leg", "arm", leg)
    rename(on_a, "c", "leg", arm)
    a.settle()
    a.wait(11)
    for name, id in (("leg", arm), ("arm", leg)):
        assert (on_a.get(name)["id"], on_a.get(name)["lab"]) == (id, "confirmed")
        assert released(hosts, name) == 0
    assert {lock.name for lock in hosts.lab.registry.store.locks(a.side.link.session or "")} == {"arm", "leg"}


def test_name_of_a_renamed_component_taken_anew_in_the_same_turn(hosts: Hosts) -> None:
    """A component that takes the name which another one has just left is confirmed in the lab, as that one is."""
    a, on_a = hosts.start("a")
    arm = ask(a, on_a, "arm").ok()["id"]
    rename(on_a, "arm", "left_arm", arm)
    anew = on_a.resolve("arm", turn=False, instance="j")
    a.settle()
    a.wait(12)
    if anew.code != "ok":  # it was held at that time
        anew = ask(a, on_a, "arm", instance="j")
    assert anew.ok()["id"] != arm
    assert on_a.get("arm")["lab"] == on_a.get("left_arm")["lab"] == "confirmed"


def test_rename_while_the_lab_is_asked_about_the_lock(hosts: Hosts) -> None:
    """A rename that comes between a question to the lab and its answer loses no lock there."""
    a, on_a = hosts.start("a")
    arm = ask(a, on_a, "arm", acquire_lock=False).ok()["id"]
    a.cut("down")
    ask(a, on_a, "arm").ok()
    a.wait(1)
    a.cut("up")
    for _ in range(30):
        a.clock.advance(0.5)
        a.turn()
        a.side.pump()
        if a.side.tenures._confirming:
            break
        a.lanes.run()  # type: ignore[attr-defined]
    assert a.side.tenures._confirming
    a.side.forwarder.pump = lambda: None  # type: ignore[method-assign]  # the lab hears of it late
    rename(on_a, "arm", "left_arm", arm)
    a.turn()
    a.side.pump()
    a.wait(8)
    assert released(hosts, "arm") == 0
    del a.side.forwarder.pump
    a.wait(12)
    assert on_a.get("left_arm")["lab"] == "confirmed"
    assert released(hosts, "left_arm") == 0
    assert [lock.name for lock in hosts.lab.registry.store.locks(a.side.link.session or "")] == ["left_arm"]


def test_restart_with_a_rename_that_the_lab_has_not_heard_of_keeps_the_lock(hosts: Hosts) -> None:
    """A daemon that is restarted between a rename and its delivery gives no lock back that a living process has."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    held = ask(a, on_a, "arm").ok()
    a.cut("slow")
    rename(on_a, "arm", "left_arm", held["id"])
    a.turn()
    a.restart()
    a.side.forwarder.pump = lambda: None  # type: ignore[method-assign]  # nothing is delivered yet
    a.cut("up")
    hosts.wait(12)
    assert released(hosts, "arm") == 0
    refused = ask(b, on_b, "arm")
    assert refused.code == "held"
    del a.side.forwarder.pump
    hosts.wait(6)
    assert a.session("c").get("left_arm")["lab"] == "confirmed"
    assert ask(b, on_b, "left_arm").code == "held"


def test_holder_is_told_while_the_lab_has_its_lock_under_another_name(hosts: Hosts) -> None:
    """A holder whose component is renamed is told that the new name is unconfirmed, and when it is confirmed."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    rename(on_a, "arm", "left_arm", held["id"])
    a.settle()
    a.wait(6)
    told = [(line["name"], line["lab"]) for line in lines(a, "lab")]
    assert told[0] == ("left_arm", "unconfirmed") and told[-1] == ("left_arm", "confirmed")


def test_released_component_that_was_renamed_is_given_back_though_the_lab_has_not_heard(hosts: Hosts) -> None:
    """A lock that ends before the lab knows of the component's rename is given back under its old name."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    a.side.forwarder.pump = lambda: None  # type: ignore[method-assign]  # nothing is delivered
    rename(on_a, "arm", "left_arm", held["id"])
    a.settle()
    assert on_a.release("left_arm", held["fencing_token"])
    a.settle()
    a.wait(2)
    assert not hosts.lab.registry.store.locks(a.side.link.session or "")


def test_lock_of_a_component_renamed_twice_in_one_turn_is_given_back(hosts: Hosts) -> None:
    """Two renames in one turn, of which the lab has not heard, leave no lock there when the holder gives it back."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    a.wait(12)
    a.side.forwarder.pump = lambda: None  # type: ignore[method-assign]  # nothing is delivered
    rename(on_a, "arm", "b", held["id"])
    rename(on_a, "b", "c", held["id"])
    a.settle()
    assert on_a.release("c", held["fencing_token"])
    a.settle()
    a.wait(2)
    assert not hosts.lab.registry.store.locks(a.side.link.session or "")


def test_old_name_of_a_free_component_waits_for_the_lab_to_hear_of_the_rename(hosts: Hosts) -> None:
    """A name that a component has just left is a new component as soon as the lab knows of that: no conflict."""
    a, on_a = hosts.start("a")
    arm = ask(a, on_a, "arm", acquire_lock=False).ok()["id"]
    a.wait(6)
    rename(on_a, "arm", "left_arm", arm)
    anew = on_a.resolve("arm", turn=False)
    a.settle()
    assert anew.ok()["id"] != arm
    assert anew.ok()["lab"] == "confirmed"


# what is not known any more


def test_lock_that_the_lab_misses_is_told_and_taken_again(hosts: Hosts) -> None:
    """A lock that the lab does not know any more is unconfirmed, and its holder told, until the lab has it again."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    hosts.lab.registry.store.release(a.name, a.side.link.session or "", {"arm": None})
    a.wait(6)
    assert [line["lab"] for line in lines(a, "lab")] == ["unconfirmed", "confirmed"]
    assert on_a.get("arm")["fencing_token"] == held["fencing_token"]


def test_lock_taken_back_after_an_io_error_is_confirmed_with_a_new_term(hosts: Hosts) -> None:
    """After an I/O error no term of before is gone on with, and what a holder takes back then is confirmed too."""
    a, on_a = hosts.start("a")
    kept, lost = ask(a, on_a, "kept").ok()["fencing_token"], ask(a, on_a, "lost").ok()["fencing_token"]
    a.core.db.execute("DELETE FROM locks WHERE id = (SELECT id FROM components WHERE name = 'lost')")
    a.core.db.execute("UPDATE names SET last_token = 0 WHERE name = 'lost'")
    a.graced_s = 10.0
    a.restart()
    a.settle()
    again = a.core.registrar.sessions["client-a"]
    hold = protocol.Hold(name="lost", instance="i", fencing_token=lost)
    a.core.registrar.insist(lambda tx: a.core.service.reassert(tx, again, [hold]))
    a.settle()
    a.wait(12)
    on_a = a.session("again")
    for name, before in (("kept", kept), ("lost", lost)):
        assert on_a.get(name)["lab"] == "confirmed"
        assert on_a.get(name)["fencing_token"] // TERM > before // TERM


def test_lock_ends_by_a_lower_term_of_another_host_in_no_case(hosts: Hosts) -> None:
    """A lock whose token is above what the lab gave another host is not ended, but known to be held twice."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    ask(a, on_a, "arm").ok()
    a.cut("down")
    hosts.wait(16)
    theirs = ask(b, on_b, "arm").ok()["fencing_token"]
    row = a.core.store.by_name("arm")
    assert row is not None
    a.core.store.move_lock_token(row.id, "arm", theirs + 50 * TERM)
    a.cut("up")
    hosts.wait(12)
    assert not lines(a, "lost")
    assert on_a.get("arm")["lab"] == "unconfirmed"
    assert a.side.tenures.contested == {"arm": b.name}
    assert on_b.release("arm", theirs)
    hosts.wait(12)
    assert on_a.get("arm")["lab"] == "confirmed" and not a.side.tenures.contested


def test_dead_client_leaves_nothing_in_the_lab(hosts: Hosts) -> None:
    """A client that dies, or gives up, while the lab is asked for it, leaves no lock there and no request counted."""
    a, on_a = hosts.start("a")
    gone, dying = a.session("gone"), a.session("dying")
    asked = [gone.resolve("arm", turn=False), dying.resolve("leg", turn=False), on_a.resolve("eye", turn=False, seq=77)]
    gone.drop()
    dying.ended()
    a.core.registrar.cancel(on_a.record, 77)
    a.settle()
    a.wait(25)
    assert [each.code for each in asked] == [None, None, "timeout"]
    assert not hosts.lab.registry.store.locks(a.side.link.session or "")
    assert not +a.core.handlers._asking and not +a.core.handlers._preparing
    assert not a.side.tenures._tenures


def test_resumed_holder_is_told_of_the_higher_token(hosts: Hosts) -> None:
    """A holder whose lock was confirmed while its connection was down finds the higher token in the welcome."""
    a, on_a = hosts.start("a")
    a.cut("down")
    granted = ask(a, on_a, "arm").ok()["fencing_token"]
    on_a.drop()
    a.cut("up")
    a.wait(1.5)
    on_a.resume()
    hold = protocol.Hold(name="arm", instance="i", fencing_token=granted)
    now = on_a.get("arm")["fencing_token"]
    assert now > granted
    renamed = a.core.service.renamed_away(on_a.id, [hold])
    assert [(line["name"], line["to"], line["old_token"], line["fencing_token"]) for line in renamed] == [
        ("arm", "arm", granted, now)
    ]
