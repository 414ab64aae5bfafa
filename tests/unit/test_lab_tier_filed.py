"""Hosts with a lab and a registry.json: what old programs see is what the lab has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab_pairs import FiledLabPair, Hosts, ask, joined
from old_program import OldHeldError
from pair import Client


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with joined(tmp_path) as hosts:
        yield hosts


def start(hosts: Hosts, letter: str) -> tuple[FiledLabPair, Client]:
    """Start a host that keeps a registry.json."""
    host, client = hosts.start(letter, FiledLabPair)
    assert isinstance(host, FiledLabPair)
    return host, client


def shown(host: FiledLabPair, name: str) -> str:
    """Return the ULID that old programs see."""
    return str(host.old().read()["entries"][name]["id"])


def test_file_shows_the_ulid_of_the_lab(hosts: Hosts) -> None:
    """A name that another host has made has the same ULID in this host's registry.json, as soon as it is answered."""
    a, on_a = start(hosts, "a")
    b, on_b = start(hosts, "b")
    made = ask(a, on_a, "arm", acquire_lock=False).ok()["id"]
    assert shown(a, "arm") == made
    assert ask(b, on_b, "arm").ok()["id"] == made
    assert shown(b, "arm") == made
    with pytest.raises(OldHeldError):
        b.old().resolve("arm")


def test_name_held_on_another_host_leaves_nothing_in_the_file(hosts: Hosts) -> None:
    """A name that is refused because another host holds it is not made here, nor in registry.json."""
    a, on_a = start(hosts, "a")
    b, on_b = start(hosts, "b")
    ask(a, on_a, "arm").ok()
    assert ask(b, on_b, "arm").code == "held"
    b.wait(6)
    assert "arm" not in b.old().read()["entries"]


def test_waiter_for_an_unknown_name_gets_it_with_the_ulid_of_the_lab(hosts: Hosts) -> None:
    """Who waits for a name that is unknown here and held elsewhere gets it, with its ULID, and old programs see it."""
    a, on_a = start(hosts, "a")
    b, on_b = start(hosts, "b")
    held = ask(a, on_a, "arm").ok()
    waiting = ask(b, on_b, "arm", wait_s=9.0)
    hosts.wait(2)
    assert on_a.release("arm", held["fencing_token"])
    a.settle()
    hosts.wait(2)
    assert (waiting.ok()["id"], waiting.ok()["lab"]) == (held["id"], "confirmed")
    assert shown(b, "arm") == held["id"]


def test_waiter_gets_an_unknown_name_though_the_file_was_locked_at_first(hosts: Hosts) -> None:
    """Who waits for a name that the lab gives while an old program has the file locked gets it when it has not."""
    a, on_a = start(hosts, "a")
    b, on_b = start(hosts, "b")
    held = ask(a, on_a, "arm").ok()
    waiting = ask(b, on_b, "arm", wait_s=10.0)
    prepare = b.bridge.prepare
    b.bridge.prepare = lambda wants, then: b.core.timers.after(  # type: ignore[method-assign]
        2.0, lambda: then(b.bridge._refusal())
    )
    assert on_a.release("arm", held["fencing_token"])
    hosts.wait(4)
    assert waiting.code is None
    b.bridge.prepare = prepare  # type: ignore[method-assign]
    hosts.wait(3)
    assert waiting.ok()["lab"] == "confirmed"


def test_waiter_gets_an_unknown_name_when_the_lab_goes_away(hosts: Hosts) -> None:
    """Who waits for a name that is held elsewhere gets it, unconfirmed, when the lab goes away."""
    a, on_a = start(hosts, "a")
    b, on_b = start(hosts, "b")
    ask(a, on_a, "arm").ok()
    waiting = ask(b, on_b, "arm", wait_s=9.0)
    b.cut("down")
    hosts.wait(7)
    assert waiting.ok()["lab"] == "unconfirmed"
    assert shown(b, "arm") == waiting.ok()["id"]


def test_name_held_by_an_old_program_is_not_asked_for_in_the_lab(hosts: Hosts) -> None:
    """A name that an old program holds is refused here without the lab; given back, it is granted with it."""
    a, on_a = start(hosts, "a")
    old = a.old(pid=77)
    id = old.resolve("arm")
    a.look()
    assert ask(a, on_a, "arm").code == "held"
    assert not hosts.lab.registry.store.locks(a.side.link.session or "")
    old.release("arm")
    a.look()
    granted = ask(a, on_a, "arm").ok()
    assert (granted["id"], granted["lab"]) == (id, "confirmed")
