"""The lab's service: its own routes over real HTTP to a real process, killed and started again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from ulid import ULID

from helpers import PATIENCE_S, until
from lab_stores import ULIDS
from labs import MARK, LabHost, LabProcess, client

AT = "2026-11-24T10:00:00Z"


@pytest.fixture
def hosts(served: LabProcess) -> Iterator[list[LabHost]]:
    """Two hosts of it, registered."""
    with ExitStack() as stack:
        made = [stack.enter_context(LabHost(served.url, f"host-{ULID()}")) for _ in range(2)]
        yield [host.register() for host in made]


def component(name: str, id: str, **more: Any) -> dict[str, Any]:
    """Return a component as a host sends it."""
    return {"name": name, "id": id, "component_type": "node", "created_at": AT, "changed_at": AT, **more}


def one(revision: int, name: str, id: str, **more: Any) -> dict[str, Any]:
    """Return a change as a host sends it."""
    return {"revision": revision, "component": component(name, id, **more)}


def test_resolve_makes_locks_and_refuses_in_one_call(hosts: list[LabHost]) -> None:
    """One call makes a component and locks its name; another host is told who holds it."""
    a, b = hosts
    wish = {"proposal": 1 << 32, "holder": {"pid": 4}}
    first = a.resolve("one call", id := str(ULID()), metadata={"rack": 3}, lock=wish)
    assert first.json()["is_new"]
    assert first.json()["entry"]["id"] == id
    assert first.json()["entry"]["metadata"] == {"rack": 3}
    assert first.json()["lock"]["term"] == (1 << 32) + 1
    held = b.resolve("one call", str(ULID()), lock={})
    assert held.status_code == 409
    assert {k: held.json()[k] for k in ("code", "host", "term", "lab_holder")} == {
        "code": "held",
        "host": a.name,
        "term": (1 << 32) + 1,
        "lab_holder": {"pid": 4},
    }
    plain = b.resolve("one call", str(ULID())).json()
    assert (plain["entry"]["id"], plain["is_new"], plain["lock"]) == (id, False, None)


def test_locks_are_taken_and_given_back_in_one_request_each(hosts: list[LabHost]) -> None:
    """Several names are locked at once, each with an answer of its own, and given back by their terms."""
    a, b = hosts
    for name in ("l1", "l2"):
        a.resolve(name, str(ULID()))
    b.ok("lock", session=b.session, locks=[{"name": "l2"}])
    done = a.ok("lock", session=a.session, locks=[{"name": "l1"}, {"name": "l2"}, {"name": "none"}])["locks"]
    assert [lock.get("error", {}).get("code") for lock in done] == [None, "held", "not_found"]
    term = done[0]["term"]
    assert a.ok("release", session=a.session, locks={"l1": term + 1, "l2": 1}) == {"released": []}
    assert a.ok("release", session=a.session, locks={"l1": term}) == {"released": ["l1"]}


def test_keepalive_compares_what_is_held(hosts: list[LabHost]) -> None:
    """A keepalive that states what the lab has is answered with nothing; what was given away, what the lab does not
    have, and what the host did not state, are named."""
    a, b = hosts
    for name in ("k1", "k2", "k3"):
        a.resolve(name, str(ULID()))
    locks = a.ok("lock", session=a.session, locks=[{"name": n} for n in ("k1", "k2", "k3")])["locks"]
    terms = {lock["name"]: lock["term"] for lock in locks}
    same = a.keep(**terms)
    assert (same["lost"], same["missing"], same["unstated"], same["lease_s"]) == ([], [], {}, 15.0)
    a.ok("release", session=a.session, locks={"k1": terms["k1"], "k2": terms["k2"]})
    taken = b.ok("lock", session=b.session, locks=[{"name": "k1"}])["locks"][0]["term"]
    told = a.keep(k1=terms["k1"], k2=terms["k2"])
    assert told["lost"] == [{"name": "k1", "term": taken, "host": b.name}]
    assert told["missing"] == ["k2"]
    assert told["unstated"] == {"k3": terms["k3"]}
    b.ok("hosts/bye", session=b.session)
    old = a.keep(k3=terms["k3"] - 1)  # its own lock, by a term from before
    assert (old["lost"], old["missing"], old["unstated"]) == ([], [], {"k3": terms["k3"]})


def test_host_that_registers_is_listed_and_says_goodbye(hosts: list[LabHost], http: httpx.Client) -> None:
    """Living hosts are listed without their sessions; one that says goodbye is not any more, and must register."""
    a, _ = hosts
    listed = http.get("/registry/hosts")
    assert a.name in {host["host"] for host in listed.json()["hosts"]}
    assert a.session not in listed.text
    assert a.ok("hosts/bye", session=a.session) == {"ended": True}
    refused = a.post("hosts/keepalive", session=a.session, boot=a.boot)
    assert (refused.status_code, refused.json()["code"]) == (409, "session_required")


def test_changes_are_applied_once_and_the_unfit_are_named(hosts: list[LabHost]) -> None:
    """A batch counts once; a change that breaks a rule is named and stops none after it."""
    a, _ = hosts
    changes = [
        one(3, "c1", id := str(ULID())),
        one(4, "c\u0007", str(ULID())),
        one(6, "c2", str(ULID()), metadata={"x": "y" * 20_000}),
        one(9, "c3", id),
    ]
    batch = {"epoch": 5, "after": 0, "upto": 12, "changes": changes}
    done = a.ok("changes", **batch)
    assert (done["changed"], done["mark"]) == (2, {"epoch": 5, "revision": 12})
    assert [(u["reason"], u["name"]) for u in done["unapplied"]] == [("invalid", "c\u0007"), ("invalid", "c2")]
    again = a.ok("changes", **batch)
    assert (again["changed"], again["repeated"]) == (0, 2)
    gap = a.post("changes", epoch=5, after=13, upto=14, changes=[])
    assert (gap.status_code, gap.json()["code"], gap.json()["revision"]) == (409, "conflict", 12)
    for after, revisions, upto in (
        (20, [], 19),
        (12, [14, 14], 20),
        (12, [15, 14], 20),
        (12, [12], 20),
        (12, [21], 20),
    ):
        sent = [one(revision, "c3", id) for revision in revisions]
        back = a.post("changes", epoch=5, after=after, upto=upto, changes=sent)
        assert (back.status_code, back.json()["field"]) == (422, "changes")
    assert a.register().keep()["mark"] == {"epoch": 5, "revision": 12}


def test_sync_in_pieces_sets_the_mark_with_the_last_one(hosts: list[LabHost]) -> None:
    """All that a host has goes in by pieces; only after the last one its changes follow on."""
    a, _ = hosts
    first = a.ok("sync", epoch=1, components=[component(f"s{n}", str(ULID())) for n in range(500)])
    assert (first["changed"], first["mark"]) == (500, None)
    last = a.ok("sync", epoch=1, upto=77, components=[component("s-last", str(ULID()), retired=True)])
    assert last["mark"] == {"epoch": 1, "revision": 77}
    assert a.ok("changes", epoch=1, after=77, upto=80, changes=[])["mark"]["revision"] == 80


def test_conflict_is_shown_with_both_sides_and_merged(hosts: list[LabHost], http: httpx.Client) -> None:
    """Two ULIDs of one name, made apart: both are found, both sides are shown, a person decides."""
    a, b = hosts
    ids = [str(ULID()), str(ULID())]
    for host, id in zip(hosts, ids, strict=True):
        sent = component("clash", id, metadata={"of": host.name}, last_seen=AT)
        told = host.ok("sync", epoch=1, upto=1, components=[sent])
    assert told["unapplied"] == [{"name": "clash", "id": ids[1], "reason": "two_ids", "preferred": ids[0]}]
    found = [http.post("/registry/lookup", json={"id": id}).json() for id in ids]
    assert found[0] == found[1]
    assert (found[0]["id"], found[0]["other_ids"]) == (ids[0], [ids[1]])
    (shown,) = (c for c in http.post("/registry/conflicts", json={}).json()["conflicts"] if c["name"] == "clash")
    assert (shown["entry"]["metadata"], shown["said"]["metadata"]) == ({"of": a.name}, {"of": b.name})
    assert shown["said"]["last_seen"] == "2026-11-24T10:00:00.000000Z"
    assert b.ok("merge", name="clash", prefer=ids[1])["id"] == ids[1]
    assert "clash" not in http.post("/registry/conflicts", json={}).text
    assert "clash" in http.post("/registry/conflicts", json={"decided": True}).text
    refused = b.post("merge", name="clash", prefer=str(ULID()))
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")


def test_list_and_history_are_paged(hosts: list[LabHost], http: httpx.Client) -> None:
    """Entries come by pages in the order of their names, history by pages in the order of its changes."""
    a, _ = hosts
    for n in range(5):
        a.resolve(f"page/{n}", str(ULID()), component_type="workcell")
    names: list[str] = []
    after: str | None = ""
    while after is not None:
        page = http.post("/registry/list", json={"limit": 2, "after": after, "component_type": "workcell"}).json()
        names += [entry["name"] for entry in page["entries"]]
        after = page["after"]
    assert names == [f"page/{n}" for n in range(5)]
    term = a.ok("lock", session=a.session, locks=[{"name": "page/0"}])["locks"][0]["term"]
    a.ok("release", session=a.session, locks={"page/0": term})
    first = http.post("/registry/history", json={"name": "page/0", "limit": 2}).json()
    rest = http.post("/registry/history", json={"name": "page/0", "limit": 2, "after": first["after"]}).json()
    assert [e["kind"] for e in first["events"] + rest["events"]] == ["created", "granted", "released"]
    assert rest["after"] is None


def test_large_entries_come_in_pages_that_a_client_reads(hosts: list[LabHost], http: httpx.Client) -> None:
    """A page of entries or conflicts is cut before it has 1 MiB, and the next one begins there."""
    sent = [component(f"large/{n:03}", str(ULID()), metadata={"x": "y" * 16_000}) for n in range(100)]
    other = [{**c, "id": str(ULID())} for c in sent]
    for host, components in zip(hosts, (sent, other), strict=True):
        for n in range(0, 100, 50):
            host.ok("sync", epoch=1, components=components[n : n + 50])
    for route, key, first in (("list", "entries", "large/"), ("conflicts", "conflicts", ["large/", ""])):
        names: list[str] = []
        after: Any = first
        while after is not None and len(names) < 100:  # what other tests made comes behind
            answer = http.post(f"/registry/{route}", json={"limit": 1000, "after": after})
            assert len(answer.content) < 1 << 20
            names += [value["name"] for value in answer.json()[key]]
            after = answer.json()["after"]
        assert names[:100] == [c["name"] for c in sent]


# the feed


def test_feed_and_history_come_in_pages_that_a_client_reads(hosts: list[LabHost], http: httpx.Client) -> None:
    """A page of the feed is cut before it has 1 MiB, and the next one begins there; no event names the
    session of a host, which is that host's alone."""
    a, _ = hosts
    names = [f"talk/{n:03}" for n in range(1000)]
    a.ok("sync", epoch=1, components=[component(name, str(ULID())) for name in names])
    cursor = http.get("/registry/changes").json()["cursor"]
    a.register()
    holder = {"said": "y" * 1000}
    for n in range(0, 1000, 500):
        a.ok("lock", session=a.session, locks=[{"name": name, "holder": holder} for name in names[n : n + 500]])
    seen: list[str] = []
    while events := (page := http.get("/registry/changes", params={"cursor": cursor, "limit": 1000})).json()["events"]:
        assert len(page.content) < 1 << 20
        assert a.session not in page.text
        seen += [event["name"] for event in events if event["kind"] == "granted"]
        cursor = page.json()["cursor"]
    assert seen == names


def test_long_history_comes_in_pages_that_a_client_reads(hosts: list[LabHost], http: httpx.Client) -> None:
    """A page of a history is cut before it has 1 MiB, and the next one begins there."""
    a, _ = hosts
    a.resolve("talkative", str(ULID()))
    for _ in range(500):
        (lock,) = a.ok("lock", session=a.session, locks=[{"name": "talkative", "holder": {"said": "y" * 1000}}])[
            "locks"
        ]
        a.ok("release", session=a.session, locks={"talkative": lock["term"]})
    kinds: list[str] = []
    after: int | None = 0
    while after is not None:
        page = http.post("/registry/history", json={"name": "talkative", "limit": 1000, "after": after})
        assert len(page.content) < 600 * 1024
        kinds += [event["kind"] for event in page.json()["events"]]
        after = page.json()["after"]
    assert kinds == ["created", *["granted", "released"] * 500]


def test_feed_wakes_who_waits(hosts: list[LabHost], http: httpx.Client) -> None:
    """A request that waits for changes is answered as soon as there is one, long before its time is over."""
    cursor = http.get("/registry/changes").json()["cursor"]
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(http.get, "/registry/changes", params={"cursor": cursor, "wait_s": 60})
        until(lambda: "madsci_registry_lab_feed_waiting 1.0" in http.get("/metrics").text, "for the feed to wait")
        hosts[0].resolve("waited for", str(ULID()))
        page = waits.result(PATIENCE_S).json()
    assert [e["name"] for e in page["events"]] == ["waited for"]
    empty = http.get("/registry/changes", params={"cursor": page["cursor"], "wait_s": 0.05}).json()
    assert empty == {"events": [], "cursor": page["cursor"]}


def test_hundred_waiting_readers_cost_no_thread(hosts: list[LabHost], served: LabProcess, http: httpx.Client) -> None:
    """A hundred requests that wait for changes keep nobody else from being served; one change answers them all."""
    cursor = http.get("/registry/changes").json()["cursor"]
    with ThreadPoolExecutor(100) as pool, ExitStack() as stack:
        readers = [stack.enter_context(client(served.url)) for _ in range(100)]
        query = {"cursor": cursor, "wait_s": 60}
        waits = [pool.submit(reader.get, "/registry/changes", params=query) for reader in readers]
        until(lambda: "madsci_registry_lab_feed_waiting 100.0" in http.get("/metrics").text, "for all to wait")
        began = time.monotonic()
        hosts[0].resolve("for a hundred", str(ULID()))
        assert time.monotonic() - began < PATIENCE_S / 3
        assert {wait.result(PATIENCE_S).json()["events"][0]["name"] for wait in waits} == {"for a hundred"}


def test_feed_has_no_gap_under_concurrent_writers(hosts: list[LabHost], served: LabProcess) -> None:
    """Four readers that go on from cursor to cursor, while four hosts write, each see every change once, in order."""
    with client(served.url) as reader:
        start = reader.get("/registry/changes").json()["cursor"]
    over = threading.Event()

    def read(limit: int) -> list[tuple[int, str]]:
        seen, cursor = [], start
        with client(served.url) as http:
            while True:
                last = over.is_set()
                page = http.get("/registry/changes", params={"cursor": cursor, "limit": limit, "wait_s": 0.2}).json()
                seen += [(e["revision"], e["name"]) for e in page["events"] if e["kind"] == "created"]
                cursor = page["cursor"]
                if last and not page["events"]:
                    return seen

    def write(n: int) -> list[str]:
        with LabHost(served.url, f"writer-{n}") as host:
            names = [f"feed-{n}-{k}" for k in range(25)]
            for name in names:
                assert host.resolve(name, str(ULID())).status_code == 200
        return names

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, limit) for limit in (1, 3, 50, 1000)]
        written = {name for names in pool.map(write, range(4)) for name in names}
        over.set()
        seen = [reader.result(PATIENCE_S) for reader in readers]
    assert all(part == seen[0] for part in seen)
    assert seen[0] == sorted(seen[0])
    assert {name for _, name in seen[0]} == written
    assert len(seen[0]) == len(written) == 100


# ends and restarts


def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SIGKILL under eight writers, three times: every ULID that was answered is there, no name has two, locks and marks
    stay, and a reader of the feed has seen all."""
    answered: dict[str, str] = {}
    with LabProcess(tmp_path) as lab, LabHost(lab.url, "keeper") as keeper:
        keeper.register()
        term = keeper.resolve("kept", ULIDS[1], lock={}).json()["lock"]["term"]
        keeper.ok("sync", epoch=3, upto=33, components=[])
        cursor = keeper.http.get("/registry/changes").json()["cursor"]
        for round_ in range(3):
            busy = threading.Barrier(9)

            def write(n: int, round_: int = round_, busy: threading.Barrier = busy) -> None:
                with LabHost(lab.url, f"writer-{n}") as host:
                    for k in range(10_000):
                        name = f"{round_}-{n % 4}-{k}"  # two writers for each name
                        try:
                            got = host.resolve(name, str(ULID()))
                        except httpx.HTTPError:
                            return
                        assert answered.setdefault(name, id := got.json()["entry"]["id"]) == id
                        if k == 15:
                            busy.wait(PATIENCE_S)

            with ThreadPoolExecutor(8) as pool:
                writers = [pool.submit(write, n) for n in range(8)]
                busy.wait(PATIENCE_S)
                lab.kill()
                for writer in writers:
                    writer.result(PATIENCE_S)
            lab.start()
        seen: dict[str, str] = {}
        while events := (page := keeper.http.get("/registry/changes", params={"cursor": cursor}).json())["events"]:
            for event in events:
                if event["kind"] == "created":
                    assert event["name"] not in seen
                    seen[event["name"]] = event["id"]
            cursor = page["cursor"]
        assert len(answered) > 150
        assert answered.items() <= seen.items()
        kept = keeper.keep(kept=term)
        assert (kept["lost"], kept["missing"], kept["unstated"]) == ([], [], {})
        assert kept["mark"] == {"epoch": 3, "revision": 33}


def test_terminate_answers_who_waits_and_ends_with_zero(tmp_path: Path) -> None:
    """SIGTERM answers the requests that wait for changes, at once, and the status is 0."""
    with LabProcess(tmp_path) as lab, client(lab.url) as http, client(lab.url) as reader, ThreadPoolExecutor(1) as pool:
        cursor = http.get("/registry/changes").json()["cursor"]
        waits = pool.submit(reader.get, "/registry/changes", params={"cursor": cursor, "wait_s": 60})
        until(lambda: "feed_waiting 1.0" in http.get("/metrics").text, "for the feed to wait")
        assert lab.terminate() == 0
        assert waits.result(PATIENCE_S).json() == {"events": [], "cursor": cursor}


def test_second_lab_on_one_store_does_not_start(served: LabProcess) -> None:
    """A store is served by one process: the second one ends with 69, the first goes on."""
    second = LabProcess(served.folder)
    second.log_path = served.folder / "second.log"
    with pytest.raises(AssertionError, match=r"ended with 69(.|\n)*open in another program"):
        second.start()
    with client(served.url) as http:
        assert http.get("/health").json()["healthy"]


# what it says of itself, and bad input


def test_health_is_that_of_madscis_managers(http: httpx.Client) -> None:
    """`/health` has MADSci's fields; `/registry/health` says besides that this is a lab registry."""
    health = http.get("/health").json()
    assert set(health) == {"healthy", "description", "version"}
    assert health["healthy"] is True
    identified = http.get("/registry/health").json()
    assert (identified["service"], identified["api_version"], identified["lease_s"]) == ("madsci-registry-lab", 1, 15.0)


def test_every_answer_of_a_route_is_marked(http: httpx.Client) -> None:
    """Good answers and errors say that they are a lab registry's; a path that is no route does not."""
    answers = [
        http.get("/registry/health"),
        http.get("/registry/resolve/nobody"),
        http.post("/registry/lookup", json={"name": "nobody"}),
        http.post("/registry/lookup", json={"wrong": 1}),
        http.post("/registry/lookup", content=b"[" * 200_000, headers={"Content-Type": "application/json"}),
    ]
    assert [a.status_code for a in answers] == [200, 404, 404, 422, 400]
    assert {a.headers.get(MARK) for a in answers} == {"1"}
    unmarked = http.get("/registry/no/such/route")
    assert unmarked.status_code == 404
    assert MARK not in unmarked.headers


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lookup", {}, "name"),
    ("lookup", {"name": "a", "id": "b"}, "name"),
    ("lookup", {"name": "\ud800"}, "name"),
    ("lookup", {"name": "x" * 300}, "name"),
    ("resolve", {"name": " "}, "name"),
    ("resolve", {"name": "e\u0301"}, "name"),
    ("resolve", {"id": "no-ulid"}, "id"),
    ("resolve", {"component_type": "robot"}, "component_type"),
    ("resolve", {"metadata": {"a": "\0"}}, "metadata.a"),
    ("resolve", {"metadata": []}, "metadata"),
    ("resolve", {"op": ""}, "op"),
    ("resolve", {"lock": {}}, "session"),
    ("resolve", {"lock": {"proposal": -1}, "session": "s"}, "lock.proposal"),
    ("resolve", {"lock": {"proposal": 1 << 33}, "session": "s"}, "lock.proposal"),
    ("resolve", {"lock": {"proposal": 1.5}, "session": "s"}, "lock.proposal"),
    ("resolve", {"lock": {"holder": {"x": "y" * 2000}}, "session": "s"}, "lock.holder"),
    ("resolve", {"surplus": 1}, "surplus"),
    ("changes", {"epoch": 1 << 60}, "epoch"),
    ("changes", {"changes": [{"revision": 1}]}, "changes.0.component"),
    ("changes", {"changes": [one(1, "a", "b", changed_at="yesterday")]}, "changes.0.component.changed_at"),
    (
        "changes",
        {"changes": [one(1, "a", "b", changed_at="0001-01-01T00:00:00+23:00")]},
        "changes.0.component.changed_at",
    ),
    ("list", {"limit": 0}, "limit"),
    ("history", {"name": "a", "after": -1}, "after"),
    ("hosts/register", {"host": "h", "boot": "with blank"}, "boot"),
]
FULL: dict[str, dict[str, Any]] = {
    "resolve": {"host": "h", "op": "1", "name": "bad", "component_type": "node", "id": ULIDS[0]},
    "changes": {"host": "h", "epoch": 1, "after": 0, "upto": 9, "changes": []},
}


@pytest.mark.parametrize(("route", "wrong", "field"), BAD, ids=lambda value: ascii(value)[:60])
def test_bad_field_is_named(http: httpx.Client, route: str, wrong: dict[str, Any], field: str) -> None:
    """A request with a bad field is refused with 422 and the field's name; nothing is made."""
    text = json.dumps({**FULL.get(route, {}), **wrong})
    answer = http.post(f"/registry/{route}", content=text, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "invalid", field)
    assert http.post("/registry/lookup", json={"name": "bad"}).status_code == 404


def test_too_large_request_is_refused(http: httpx.Client, served: LabProcess) -> None:
    """A body above 1 MiB, told beforehand or not, is answered 413, whether its sender reads on the way or only after it
    has sent all; the lab goes on."""

    def unmeasured() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    answer = http.post("/registry/lookup", content=unmeasured(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    with closing(HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE_S)) as plain:
        plain.request("POST", "/registry/lookup", b" " * (6 << 20), {"Content-Type": "application/json"})
        refused = plain.getresponse()
        assert (refused.status, json.loads(refused.read())["code"]) == (413, "too_large")
    assert http.get("/health").json()["healthy"]


def test_openapi_has_all_that_a_client_sends(http: httpx.Client) -> None:
    """The OpenAPI document has each route once, with the fields of what it is sent and what they mean, and the shape of
    errors, which is not FastAPI's own."""
    document = http.get("/openapi.json").json()
    routes = [route for methods in document["paths"].values() for route in methods.values()]
    assert len({route["operationId"] for route in routes}) == len(routes)
    assert all({"4XX", "5XX"} < route["responses"].keys() and "422" not in route["responses"] for route in routes)
    for path in (path for path, methods in document["paths"].items() if "post" in methods):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "$ref" in schema or "properties" in schema, path
    lockwish = document["components"]["schemas"]["Lockwish"]["properties"]
    assert all(field.get("description") for field in lockwish.values())


def test_metrics_name_nobody(hosts: list[LabHost], http: httpx.Client) -> None:
    """The metrics count names, hosts, locks and answers, and hold no name and no host."""
    hosts[0].resolve("secret-name", str(ULID()))
    text = http.get("/metrics").text
    assert "\nmadsci_registry_lab_names " in text
    assert 'madsci_registry_lab_answers_total{method="POST",route="/registry/resolve",status="200"}' in text
    assert "secret-name" not in text
    assert hosts[0].name not in text
