"""Labs that say no, nonsense, or what they may not: nobody is hurt beyond the one request, nothing runs hot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab_pairs import Hosts, Twist, ask, joined, lines
from madsci_registryd.locks import Session

Said = tuple[int, Any]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with joined(tmp_path) as hosts:
        yield hosts


def always(route: str, status: int, **body: Any) -> Twist:
    """Let all answers to a route be this one."""
    return lambda to, real, said: (status, body) if to == route else (real, said)


def only(name: str, route: str, change: dict[str, Any]) -> Twist:
    """Let the answers about one name differ in this."""

    def twist(to: str, status: int, said: Any) -> Said:
        if to == route and status == 200 and said["entry"]["name"] == name:
            said = {**said, "entry": {**said["entry"], **change}}
        return status, said

    return twist


NO: list[tuple[int, dict[str, Any]]] = [
    (409, {"code": "session_required", "detail": "who are you?"}),
    (409, {"code": "lock_lost", "detail": "no"}),
    (409, {"code": "held", "detail": "no", "host": "a", "term": 5}),
    (400, {"code": "invalid", "detail": "no"}),
    (401, {"code": "permission_denied", "detail": "no"}),
    (403, {"code": "permission_denied", "detail": "no"}),
    (404, {"code": "not_found", "detail": "no"}),
    (413, {"code": "too_large", "detail": "no"}),
    (429, {"code": "busy", "detail": "no"}),
    (500, {"code": "internal", "detail": "no"}),
    (200, {"answer": 42}),
    (200, {"locks": [], "entry": None, "is_new": 7}),
]


@pytest.mark.parametrize(("status", "body"), NO, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("route", ["/registry/lock", "/registry/resolve", "/registry/release"])
def test_lab_that_refuses_one_kind_of_request_is_not_asked_in_haste(
    hosts: Hosts, route: str, status: int, body: dict[str, Any]
) -> None:
    """A lab that answers keepalives, and nothing sensible to anything else, is asked a few times in a minute, and costs
    no lock."""
    a, on_a = hosts.start("a")
    a.cut("down")
    held = ask(a, on_a, "arm").ok()
    a.cut("up")
    hosts.lab.twist = always(route, status, **body)
    a.wait(6)
    waiting = a.session("other").resolve("leg", turn=False)
    a.wait(3)
    assert waiting.code is not None
    if waiting.code == "ok":
        a.session("third").release("leg", 1)
    before, said = sum(hosts.lab.requests.values()), len(a.told)
    a.wait(60)
    assert sum(hosts.lab.requests.values()) - before <= 124  # two a second, and what people decided
    assert len(a.told) - said <= 60
    assert not lines(a, "lost")
    assert on_a.get("arm")["fencing_token"] >= held["fencing_token"]
    hosts.lab.twist = lambda route, status, said: (status, said)
    a.wait(12)
    assert on_a.get("arm")["lab"] == "confirmed"


def test_lab_that_gives_no_lock_of_before_nor_another_is_not_asked_in_haste(hosts: Hosts) -> None:
    """A lab that says of one lock that it was given away, again and again, is asked for it with each keepalive."""
    a, on_a = hosts.start("a")
    a.cut("down")
    ask(a, on_a, "arm").ok()
    a.cut("up")
    no = {"code": "lock_lost", "message": "no", "term": 5, "host": a.name}
    hosts.lab.twist = always("/registry/lock", 200, locks=[{"name": "arm", "error": no}])
    a.wait(60)
    assert hosts.lab.requests["/registry/lock"] <= 30
    assert not a.side.tenures.contested


@pytest.mark.parametrize(
    "change",
    [{"metadata": {"x": "y" * 70_000}}, {"created_at": "z" * 50}, {"component_type": "of tomorrow"}, {"name": "leg"}],
    ids=lambda change: next(iter(change)),
)
def test_answer_that_cannot_be_used_concerns_its_name_alone(hosts: Hosts, change: dict[str, Any]) -> None:
    """What the lab says of one name and cannot be used makes that name an unconfirmed one; the lab is not away."""
    a, on_a = hosts.start("a")
    hosts.lab.twist = only("arm", "/registry/resolve", change)
    assert ask(a, on_a, "arm").ok()["lab"] == "unconfirmed"
    assert a.side.link.state == "up"
    assert ask(a, on_a, "gripper").ok()["lab"] == "confirmed"


def test_lab_that_lets_us_in_no_more_is_gone_on_without(hosts: Hosts) -> None:
    """A client is not refused what it asks for because the lab does not take this host's token any more."""
    a, on_a = hosts.start("a")
    hosts.lab.twist = lambda route, status, said: (401, {"code": "permission_denied", "detail": "no token of this lab"})
    assert ask(a, on_a, "arm").ok()["lab"] == "unconfirmed"
    a.wait(1)
    assert a.side.link.state == "refused"
    found = on_a.send("lookup", name="absent", turn=False)
    a.settle()
    assert found.ok() == {"id": None}


def test_one_name_that_the_lab_cannot_read_leaves_the_others_confirmed(hosts: Hosts) -> None:
    """Of many names that are to be confirmed, one that the lab refuses to read is the only one that is not."""
    a, on_a = hosts.start("a")
    a.cut("down")
    names = [f"arm_{n}" for n in range(20)]
    for name in names:
        ask(a, on_a, name).ok()
    a.cut("up")
    wish = a.side.tenures._wish

    def spoilt(name: str, who: Session | None, term: int | None = None) -> dict[str, Any]:
        return wish(name, who, term) | ({"of_tomorrow": 1} if name == "arm_7" else {})

    a.side.tenures._wish = spoilt  # type: ignore[method-assign]
    a.wait(12)
    assert [name for name in names if on_a.get(name)["lab"] != "confirmed"] == ["arm_7"]


def test_facts_of_a_holder_fit_the_lab_in_any_script(hosts: Hosts) -> None:
    """A process whose names are long, in any script, can hold a name in the lab."""
    a, on_a = hosts.start("a")
    on_a.record.client = "\N{ROBOT FACE}" * 200
    on_a.record.process = on_a.record.process.__class__(
        **{**vars(on_a.record.process), "comm": "\udcff\udcfe", "unit": "\N{ROBOT FACE}" * 99, "container": "ü" * 99}
    )
    assert ask(a, on_a, "arm").ok()["lab"] == "confirmed"


def test_lab_cannot_take_or_give_what_was_not_asked_for(hosts: Hosts) -> None:
    """A keepalive's answer ends no lock but by a higher term of another host, and makes no component."""
    a, on_a = hosts.start("a")
    held = ask(a, on_a, "arm").ok()
    term = held["fencing_token"] >> 20
    lies: list[dict[str, Any]] = [
        {"lost": [{"name": "arm", "term": term, "host": "b"}]},
        {"lost": [{"name": "arm", "term": term + 1, "host": None}]},
        {"lost": [{"name": "arm", "term": term + 1, "host": a.name}]},
        {"lost": [{"name": "leg", "term": term + 9, "host": "b"}]},
        {"unstated": {f"made up {n}": n for n in range(5000)}},
        {"unstated": {"": 5, "\n": 6, "x" * 5000: 7}},
        {"missing": ["arm", "leg", "", "x" * 5000]},
        {"unstated": {"arm": (1 << 33)}},
        {"lease_s": float("nan")},
        {"lease_s": 1e300},
    ]
    for lie in lies:

        def twist(route: str, status: int, said: Any, lie: dict[str, Any] = lie) -> Said:
            return status, said | lie if route.endswith("keepalive") else said

        hosts.lab.twist = twist
        a.wait(6)
    hosts.lab.twist = lambda route, status, said: (status, said)
    a.wait(30)
    assert not lines(a, "lost")
    assert on_a.get("arm")["lab"] == "confirmed"
    assert a.core.store.name_row("made up 1") is None
    assert set(a.side.tenures._tenures) == {"arm"}


def test_many_who_want_one_new_name_ask_the_lab_once(hosts: Hosts) -> None:
    """Of many clients on three hosts that want one new name at once one has it; a host asks the lab twice at most."""
    asked = []
    for letter in "abc":
        host, client = hosts.start(letter)
        for n in range(25):
            asked.append(host.session(f"{letter}{n}").resolve("arm", turn=False))
            asked.append(client.resolve("arm", turn=False, acquire_lock=False))
    before = hosts.lab.requests["/registry/resolve"]
    for letter in "abc":
        hosts[letter].settle()
    assert hosts.lab.requests["/registry/resolve"] - before <= 6
    got = [each.ok() for each in asked if each.code == "ok"]
    assert len({each["id"] for each in got}) == 1
    assert sum(each["fencing_token"] is not None for each in got) == 1
    assert {each.code for each in asked} == {"ok", "held"}


def test_hundred_new_names_in_one_request(hosts: Hosts) -> None:
    """A request for many new names is answered with all of them, confirmed; a second of another host with none."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    items = [{"name": f"n{n}", "component_type": "node"} for n in range(98)]
    items += [{"name": "bad\n", "component_type": "node"}, items[0]]
    made = on_a.send("resolve_many", items=items, instance="i", acquire_lock=True, turn=False)
    a.settle()
    results = made.ok()["results"]
    assert [("error" in each) for each in results] == [*[False] * 98, True, False]
    assert {each["ok"]["lab"] for each in results if "ok" in each} == {"confirmed"}
    refused = on_b.send("resolve_many", items=items[:98], instance="i", acquire_lock=True, turn=False)
    b.settle()
    assert {each["error"]["code"] for each in refused.ok()["results"]} == {"held"}


def test_waiter_who_waits_in_vain_is_told_who_holds_the_name_elsewhere(hosts: Hosts) -> None:
    """Who waited for a name that another host holds is told that host and process, as is who asks behind a waiter."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b")
    ask(a, on_a, "arm").ok()
    waiting = ask(b, on_b, "arm", wait_s=3.0)
    behind = ask(b, b.session("behind"), "arm").error()
    hosts.wait(4)
    for error in (waiting.error(), behind):
        assert error.code == "held" and error.holder.pid == 4711
        assert a.name in error.message


def test_require_tells_who_waited_that_the_lab_is_away(hosts: Hosts) -> None:
    """With lab.require, who waited while the lab went away is told that it is away."""
    a, on_a = hosts.start("a")
    b, on_b = hosts.start("b", require=True)
    ask(a, on_a, "arm").ok()
    waiting = ask(b, on_b, "arm", wait_s=6.0)
    b.cut("down")
    hosts.wait(7)
    assert waiting.code == "lab_unavailable"


def test_name_of_an_old_registry_stays_on_its_host(hosts: Hosts) -> None:
    """A component whose name breaks today's rules is granted here; the lab is not asked for it."""
    a, on_a = hosts.start("a")
    with_blank = "arm\n"
    a.core.store.add_component("01M86NDR2BZN87TH2B3SP1N001", with_blank, "node", "2026-01-01T00:00:00.000000Z", "{}")
    before = hosts.lab.requests["/registry/resolve"]
    assert ask(a, on_a, with_blank).code == "ok"
    a.wait(6)
    assert hosts.lab.requests["/registry/resolve"] == before
    assert on_a.get(with_blank)["lab"] == "unconfirmed"


def test_lab_is_asked_for_a_request_that_may_be_run_alone(hosts: Hosts) -> None:
    """What is wrong by itself is refused before the lab hears of it."""
    a, on_a = hosts.start("a")
    before = hosts.lab.requests["/registry/resolve"]
    assert ask(a, on_a, "bad\n").code == "invalid"
    assert ask(a, on_a, "big", metadata={"x": "y" * 70_000}).code == "too_large"
    assert hosts.lab.requests["/registry/resolve"] == before


def test_host_with_many_locks_does_not_look_at_each(hosts: Hosts) -> None:
    """Seconds and keepalives that bring nothing new read no lock of the many that a host has; nor does each turn."""
    a, on_a = hosts.start("a")
    a.cut("down")
    a.wait(6)
    for start in range(0, 1000, 100):
        items = [{"name": f"name {n}", "component_type": "node"} for n in range(start, start + 100)]
        on_a.send("resolve_many", items=items, instance="i", acquire_lock=True).ok()
    a.cut("up")
    before = hosts.lab.requests["/registry/lock"]
    a.wait(12)
    assert a.side.tenures.counts() == (1000, 0)
    assert hosts.lab.requests["/registry/lock"] - before <= 60
    statements: list[str] = []

    def trace(cursor: object, statement: str, bindings: object) -> bool:
        statements.append(statement)
        return True

    a.core.db.exec_trace = trace
    a.wait(11)
    a.core.db.exec_trace = None
    assert len(statements) <= 60
    assert len(a.core.timers._heap) <= 10
