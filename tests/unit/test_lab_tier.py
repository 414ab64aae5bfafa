"""Hosts and their lab, joined without sockets: who gets which ULID, who holds what, and what holders are told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab_pairs import Hosts, LabPair, ask, joined, lines
from pair import Client


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with joined(tmp_path) as hosts:
        yield hosts


def test_new_name_is_made_once_for_the_whole_lab(hosts: Hosts) -> None:
    """A name that one host has made has the same ULID on every other, which says that it came from the lab."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    made = ask(a, on_a, "arm", acquire_lock=False, metadata={"x": 1}).ok()
    found = ask(b, on_b, "arm", acquire_lock=False).ok()
    assert (made["is_new"], made["source"]) == (True, "local")
    assert (found["id"], found["is_new"], found["source"]) == (made["id"], False, "lab")
    assert on_b.get("arm")["metadata"] == {"x": 1}


def test_held_on_another_host_is_held_with_that_host_and_process(hosts: Hosts) -> None:
    """A name that is held on a living host of the lab is refused on the others, with who holds it where."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    granted = ask(a, on_a, "arm").ok()
    assert granted["lab"] == "confirmed"
    refused = ask(b, on_b, "arm").error()
    assert refused.code == "held"
    assert (refused.holder.host, refused.holder.pid) == ("here", 4711)
    assert a.name in refused.message


def test_token_grows_when_a_name_moves_between_hosts(hosts: Hosts) -> None:
    """Released on one host, the name is granted on another with a higher fencing token, and back again higher."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    tokens = []
    for host, client in ((a, on_a), (b, on_b), (a, on_a), (b, on_b)):
        granted = ask(host, client, "arm").ok()
        tokens.append(granted["fencing_token"])
        assert client.release("arm", granted["fencing_token"])
        host.settle()
    assert tokens == sorted(set(tokens))


def test_hand_over_inside_a_host_asks_nobody(hosts: Hosts) -> None:
    """A waiter of the same host gets a freed name without the lab, with the next token of the same term."""
    a, on_a = hosts.start("a")
    first = ask(a, on_a, "arm").ok()
    other = a.session("other")
    waiting = ask(a, other, "arm", wait_s=5.0)
    a.cut("slow")
    assert on_a.release("arm", first["fencing_token"])
    assert waiting.ok()["fencing_token"] == first["fencing_token"] + 1
    assert waiting.ok()["lab"] == "confirmed"


def test_waiter_gets_a_name_that_another_host_gives_back(hosts: Hosts) -> None:
    """Who waits for a name that another host holds is granted it within a second or two of its release."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    held = ask(a, on_a, "arm").ok()
    waiting = ask(b, on_b, "arm", wait_s=10.0)
    hosts.wait(3)
    assert waiting.code is None
    assert on_a.release("arm", held["fencing_token"])
    a.settle()
    hosts.wait(2)
    assert waiting.ok()["id"] == held["id"]
    assert waiting.ok()["lab"] == "confirmed"


def test_lab_away_goes_on_locally_and_is_confirmed_later(hosts: Hosts) -> None:
    """Without the lab a name is granted unconfirmed; when the lab is back, the holder is told, and its token grows."""
    a, on_a = hosts.start("a")
    a.cut("down")
    granted = ask(a, on_a, "arm").ok()
    assert granted["lab"] == "unconfirmed"
    a.cut("up")
    a.wait(6)
    told = lines(a, "lab")[-1]
    assert (told["lab"], told["old_token"]) == ("confirmed", granted["fencing_token"])
    assert told["fencing_token"] > granted["fencing_token"]
    assert on_a.get("arm")["fencing_token"] == told["fencing_token"]
    assert on_a.release("arm", told["fencing_token"])


def test_slow_lab_is_waited_for_once(hosts: Hosts) -> None:
    """A lab that does not answer costs the first request its deadline, and the later ones nothing."""
    a, on_a = hosts.start("a")
    a.cut("slow")
    first = ask(a, on_a, "arm")
    assert first.code is None
    a.wait(2)
    assert first.ok()["lab"] == "unconfirmed"
    assert ask(a, on_a, "gripper").ok()["lab"] == "unconfirmed"


def test_require_refuses_while_the_lab_is_away(hosts: Hosts) -> None:
    """With lab.require nothing is made or granted without the lab; what was granted stays."""
    a, on_a = hosts.start("a", require=True)
    held = ask(a, on_a, "arm").ok()
    a.cut("down")
    assert ask(a, on_a, "gripper").code == "lab_unavailable"
    assert ask(a, on_a, "gripper", wait_s=1.0).code == "lab_unavailable"
    assert ask(a, on_a, "gripper", acquire_lock=False).code == "lab_unavailable"
    assert ask(a, on_a, "arm").ok()["fencing_token"] == held["fencing_token"]
    a.cut("up")
    a.wait(6)
    assert ask(a, on_a, "gripper").ok()["lab"] == "confirmed"


def test_host_that_is_silent_frees_its_names_and_learns_of_it(hosts: Hosts) -> None:
    """A host that was cut off for its lease loses what another host took meanwhile, and its holder is told: lost."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    taken, kept = ask(a, on_a, "taken").ok(), ask(a, on_a, "kept").ok()
    a.cut("down")
    hosts.wait(16)
    assert {line["lab"] for line in lines(a, "lab")} == {"unconfirmed"}
    moved = ask(b, on_b, "taken").ok()
    assert moved["fencing_token"] > taken["fencing_token"]
    a.cut("up")
    hosts.wait(6)
    lost = lines(a, "lost")
    assert [(line["name"], line["by"]) for line in lost] == [("taken", {"host": b.name})]
    assert on_a.get("taken")["state"] == "free"
    assert on_a.get("kept")["fencing_token"] == kept["fencing_token"]
    assert on_a.get("kept")["lab"] == "confirmed"


def test_machine_that_slept_knows_that_its_locks_may_be_gone(hosts: Hosts) -> None:
    """After a suspend longer than the lease a lock counts as unconfirmed at once, before the lab has answered."""
    a, on_a = hosts.start("a")
    ask(a, on_a, "arm")
    hosts.lab.clock.sleep(20)
    assert on_a.get("arm")["lab"] == "unconfirmed"
    hosts.wait(6)
    assert on_a.get("arm")["lab"] == "confirmed"


def test_restart_of_the_daemon_keeps_lock_and_term(hosts: Hosts) -> None:
    """A daemon that was restarted goes on with its session: nobody else got the name, and the token stays."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    held = ask(a, on_a, "arm").ok()
    a.restart()
    a.settle()
    assert on_a_again(a).get("arm")["fencing_token"] == held["fencing_token"]
    assert on_a_again(a).get("arm")["lab"] == "confirmed"
    assert ask(b, on_b, "arm").code == "held"


def on_a_again(host: LabPair) -> Client:
    """Return a client of a host whose daemon was restarted."""
    return host.session(f"again-{len(host.core.registrar.sessions)}")


def test_lost_answer_leaves_no_lock_behind(hosts: Hosts) -> None:
    """A lock whose answer never came is given back once the lab tells of it, if nobody holds the name by then."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    a.cut("deaf")
    granted = ask(a, on_a, "arm").ok()
    assert granted["lab"] == "unconfirmed"
    assert on_a.release("arm", granted["fencing_token"])
    a.cut("up")
    hosts.wait(12)
    assert ask(b, on_b, "arm").ok()["lab"] == "confirmed"


def test_twins_made_apart_become_one_component(hosts: Hosts) -> None:
    """Two hosts made one name while apart: the lab's ULID is taken over, the other one stays known, here and there."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    b.cut("down")
    theirs = ask(a, on_a, "arm", acquire_lock=False).ok()["id"]
    ours = ask(b, on_b, "arm", acquire_lock=False).ok()["id"]
    assert ours != theirs
    b.cut("up")
    hosts.wait(7)
    now = on_b.get("arm")
    assert (now["id"], now["other_ids"]) == (theirs, [ours])
    assert on_b.send("whois", id=ours).ok()["component"]["id"] == theirs
    assert hosts.lab.registry.store.find(id=ours).id == theirs


def test_holder_of_a_twin_is_told_and_keeps_its_ulid_until_it_resolves_anew(hosts: Hosts) -> None:
    """A conflict changes nothing under a running holder: it is told, and has the lab's ULID at its next resolve."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    b.cut("down")
    theirs = ask(a, on_a, "arm", acquire_lock=False).ok()["id"]
    held = ask(b, on_b, "arm").ok()
    b.cut("up")
    hosts.wait(7)
    told = lines(b, "conflict")
    assert [(line["id"], line["preferred"]) for line in told] == [(held["id"], theirs)]
    assert (on_b.get("arm")["id"], on_b.get("arm")["preferred_id"]) == (held["id"], theirs)
    again = ask(b, on_b, "arm").ok()
    assert again["id"] == theirs
    assert again["fencing_token"] == on_b.get("arm")["fencing_token"]


def test_decision_for_the_other_ulid_reaches_every_host(hosts: Hosts) -> None:
    """Where a person decides for the ULID that the lab did not prefer, all hosts have it soon, though nobody takes the
    name: at once where it was decided, elsewhere within two minutes or so, or when the lab comes back."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    b.cut("down")
    theirs = ask(a, on_a, "arm", acquire_lock=False).ok()["id"]
    ours = ask(b, on_b, "arm", acquire_lock=False).ok()["id"]
    b.cut("up")
    hosts.wait(7)
    assert on_b.get("arm")["id"] == theirs
    merged = on_b.send("lab_merge", name="arm", prefer=ours, turn=False)
    b.settle()
    assert merged.ok()["entry"]["id"] == ours
    assert on_b.get("arm")["id"] == ours
    hosts.wait(120)
    now = on_a.get("arm")
    assert (now["id"], now["other_ids"]) == (ours, [theirs])


def test_rename_takes_the_lab_lock_along(hosts: Hosts) -> None:
    """A held component that is renamed is held under its new name in the whole lab, and its old name is free there."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    held = ask(a, on_a, "arm").ok()
    on_a.send("rename", old="arm", new="left_arm", id=held["id"], force=True).ok()
    a.settle()
    assert ask(b, on_b, "left_arm").code == "held"
    new = ask(b, on_b, "arm").ok()
    assert new["id"] != held["id"]
    hosts.wait(6)
    assert on_a.get("left_arm")["lab"] == "confirmed"
    assert not lines(a, "lost")


def test_lookup_of_an_unknown_name_asks_the_lab(hosts: Hosts) -> None:
    """A name that only other hosts know is found by a lookup, which makes nothing here."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    made = ask(a, on_a, "arm", acquire_lock=False).ok()
    found = on_b.send("lookup", name="arm", turn=False)
    b.settle()
    absent = on_b.send("lookup", name="leg", turn=False)
    b.settle()
    assert (found.ok()["id"], absent.ok()["id"]) == (made["id"], None)
    assert on_b.send("get", name="arm").code == "not_found"


def test_copied_registry_is_a_new_host(hosts: Hosts, tmp_path: Path) -> None:
    """A copy of a registry's folder goes by another name in the lab, and takes no lock of the first one."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    a.settle()
    a.core.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (tmp_path / "copy").mkdir()
    shutil.copy(a.path, tmp_path / "copy" / "registry.db")
    b, on_b = hosts.start("copy")
    assert b.name != a.name
    assert on_b.get("arm")["id"] == held["id"]
    hosts.wait(12)
    assert on_a.get("arm")["lab"] == "confirmed"
    assert not lines(a, "lost")


def test_copy_does_not_ask_for_locks_of_processes_that_are_not_its_clients(hosts: Hosts, tmp_path: Path) -> None:
    """Where the first host is away beyond its lease, a copy of its registry does not take what its holders have: they
    are not the copy's clients, though their processes live."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    a.core.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (tmp_path / "copy").mkdir()
    shutil.copy(a.path, tmp_path / "copy" / "registry.db")
    a.cut("down")
    hosts.wait(16)
    _, on_b = hosts.start("copy")
    hosts.wait(6)
    a.cut("up")
    hosts.wait(6)
    assert on_b.get("arm")["lab"] == "unconfirmed"
    assert (on_a.get("arm")["lab"], on_a.get("arm")["fencing_token"]) == ("confirmed", held["fencing_token"])
    assert not lines(a, "lost")


def test_wrong_type_in_the_lab_is_refused(hosts: Hosts) -> None:
    """A name that is another type of component in the lab is not made here."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    ask(a, on_a, "arm", acquire_lock=False).ok()
    refused = on_b.resolve("arm", "module", turn=False)
    b.settle()
    assert refused.code == "wrong_type"
    assert on_b.send("get", name="arm").code == "not_found"


def test_unnamed_managers_are_told_to_have_a_name(hosts: Hosts) -> None:
    """A manager called after its class, held on another host, is refused with the hint to name it."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    on_a.resolve("LabManager", "manager", turn=False)
    a.settle()
    refused = on_b.resolve("LabManager", "manager", turn=False)
    b.settle()
    assert "called after its class" in refused.error().message or "called after their class" in refused.error().message
