"""The lab's service under attack, over real HTTP to a real process: SIGKILL, pages of the Web, text that is none."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ulid import ULID

from helpers import PATIENCE_S, until
from labs import MARK, LabHost, LabProcess, client

AT = "2026-11-24T10:00:00Z"


def change(revision: int, name: str) -> dict[str, Any]:
    """Return a change as a host sends it."""
    made = {"id": str(ULID()), "component_type": "node", "created_at": AT, "changed_at": AT}
    return {"revision": revision, "component": {"name": name, **made}}


def test_kill_in_the_middle_of_batches_leaves_each_whole(tmp_path: Path) -> None:
    """SIGKILL under four hosts that send batches: each batch is in as a whole, with its mark, or not at all; what was
    answered is; the host goes on from the mark; the feed has each change once."""
    size = 50
    with LabProcess(tmp_path) as lab, client(lab.url) as http:
        cursor = http.get("/registry/changes").json()["cursor"]
        acknowledged = [0] * 4

        def send(n: int) -> None:
            with LabHost(lab.url, f"batch-{n}") as host:
                while True:
                    at = acknowledged[n]
                    changes = [change(at + k, f"{n}/{at + k}") for k in range(1, size + 1)]
                    try:
                        done = host.post("changes", epoch=1, after=at, upto=at + size, changes=changes)
                    except httpx.HTTPError:
                        return
                    assert done.status_code == 200, done.text
                    acknowledged[n] = done.json()["mark"]["revision"]

        def send_until_killed(enough: int) -> None:
            with ThreadPoolExecutor(4) as pool:
                senders = [pool.submit(send, n) for n in range(4)]
                until(lambda: sum(acknowledged) > enough, "for some batches")
                lab.kill()
                for sender in senders:
                    sender.result(PATIENCE_S)

        for _ in range(3):
            send_until_killed(sum(acknowledged) + 8 * size)
            lab.start()
            for n in range(4):
                with LabHost(lab.url, f"batch-{n}") as host:
                    mark = host.register().keep()["mark"]["revision"]
                    host.ok("hosts/bye", session=host.session)
                assert mark - acknowledged[n] in (0, size)
                acknowledged[n] = mark
        made = []
        while events := (page := http.get("/registry/changes", params={"cursor": cursor}).json())["events"]:
            made += [event["name"] for event in events if event["kind"] == "created"]
            cursor = page["cursor"]
        assert sorted(made) == sorted(f"{n}/{k}" for n in range(4) for k in range(1, acknowledged[n] + 1))


def test_text_that_is_none_stops_nothing_that_comes_after(http: httpx.Client) -> None:
    """A change with a lone surrogate where text should be is named, as far as that goes, and the next one is in."""
    for field in ("name", "id"):
        changes = [change(1, f"before {field}"), change(2, "bad"), change(3, f"after {field}")]
        changes[1]["component"][field] = "\ud800"
        batch = {"host": f"host of {field}", "epoch": 1, "after": 0, "upto": 3, "changes": changes}
        answer = http.post("/registry/changes", content=json.dumps(batch), headers={"Content-Type": "application/json"})
        assert answer.json()["changed"] == 2
        assert [(u["reason"], u[field]) for u in answer.json()["unapplied"]] == [("invalid", "\\ud800")]


PAGE_OF_THE_WEB = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_page_of_the_web_cannot_change_anything(http: httpx.Client, kind: str) -> None:
    """What a page in a browser may send to a loopback address without being asked beforehand changes nothing."""
    body = json.dumps({"id": str(ULID()), "component_type": "node"})
    headers = {**PAGE_OF_THE_WEB, **({"Content-Type": kind} if kind else {})}
    for route in ("entries/evil", "hosts/register"):
        answer = http.post(f"/registry/{route}", content=body, headers=headers)
        assert (answer.status_code, answer.json()["field"]) == (422, "Content-Type")
    assert http.get("/registry/resolve/evil").status_code == 404
    asked = http.options("/registry/entries/evil", headers={**PAGE_OF_THE_WEB, "Access-Control-Request-Method": "POST"})
    assert "Access-Control-Allow-Origin" not in asked.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[", "@"])
def test_page_whose_name_leads_here_reads_nothing(http: httpx.Client, host: str) -> None:
    """Without tokens a request for another host's name, which may come from a page of the Web, is refused on every
    route."""
    for path in ("/registry/hosts", "/registry/health", "/health", "/metrics", "/registry/resolve/arm"):
        answer = http.get(path, headers={"Host": host})
        assert (answer.status_code, answer.json()["code"], answer.headers[MARK]) == (403, "permission_denied", "1")
    for ours in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:99", "[::1]:8010"):
        assert http.get("/registry/hosts", headers={"Host": ours}).status_code == 200
