"""registryctl --lab against a real lab service, and `registryctl lab` against a daemon that says what the test says."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ulid import ULID

from ctl import Ctl
from helpers import PATIENCE_S
from lab_stub import LabStub
from labs import LabHost, LabProcess
from madsci_registryctl import exits
from scripted import ScriptedDaemon

CREATED, CHANGED, SEEN = (f"2026-11-{day}T10:00:00.000000Z" for day in (20, 21, 22))
TOKENS = {"a": "token-of-host-a-0123456789", "b": "token-of-host-b-0123456789"}


@pytest.fixture
def ctl(registry_path: Path) -> Ctl:
    """Registryctl on a registry without a daemon: --lab needs none, and starts none."""
    return Ctl(registry_path)


@pytest.fixture
def hosts(served: LabProcess) -> Iterator[tuple[LabHost, LabHost]]:
    """Two hosts of the lab, with names of their own."""
    with ExitStack() as stack:
        a, b = (stack.enter_context(LabHost(served.url, f"host-{ULID()}")).register() for _ in range(2))
        yield a, b


def component(name: str, id: str, **more: Any) -> dict[str, Any]:
    """Return a component as a host sends it."""
    times = {"created_at": CREATED, "changed_at": CHANGED, "last_seen": SEEN}
    return {"name": name, "id": id, "component_type": "node", **times, **more}


def clash(hosts: tuple[LabHost, LabHost], name: str) -> list[str]:
    """Have both hosts make a name, each with a ULID of its own; return those, the lab's first."""
    ids = [str(ULID()) for _ in hosts]
    for host, id in zip(hosts, ids, strict=True):
        host.ok("sync", epoch=1, components=[component(name, id)])
    return ids


# asking the lab itself


def test_lab_list_and_show_tell_what_the_lab_has(ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]) -> None:
    """With --lab, list and show tell of the lab's components, held or not, by glob, type and state; no daemon is
    asked, and none started."""
    a, _ = hosts
    held, free = str(ULID()), str(ULID())
    holder = {"pid": 4711, "comm": "python", "user": "lab"}
    a.resolve("list/held", held, metadata={"rack": 3}, lock={"holder": holder})
    a.resolve("list/free", free, component_type="module")
    a.ok("sync", epoch=1, components=[component("list/retired", str(ULID()), retired=True)])

    def names(*words: str) -> list[str]:
        return [entry["name"] for entry in ctl.json("list", "list/*", *words, "--lab", served.url)]

    assert names() == ["list/free", "list/held"]
    assert names("--all") == ["list/free", "list/held", "list/retired"]
    assert (names("--state", "held"), names("--state", "retired")) == (["list/held"], ["list/retired"])
    assert names("--type", "module") == ["list/free"]
    assert ctl.json("list", "[^a-z]*", "--lab", served.url) == []
    row = ctl("list", "list/held", "--lab", served.url).splitlines()[1].split()
    assert row[:5] == ["list/held", "node", "held", held, f"python[4711]@{a.name}"]
    shown = ctl("show", "list/held", "--lab", served.url)
    assert f"pid 4711 (python, lab) on {a.name} since " in shown and "metadata: rack=3" in " ".join(shown.split())
    assert ctl.json("show", held, "--lab", served.url)["name"] == "list/held"
    assert ctl.error("show", "list/nobody", "--lab", served.url, status=exits.NOT_FOUND)["code"] == "not_found"
    assert not ctl.registry.exists() and not (ctl.registry.parent / "run").exists()


def test_lab_show_says_where_a_renamed_name_went(ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]) -> None:
    """A name that was renamed in the lab is not found, and the present one is named."""
    a, _ = hosts
    id = str(ULID())
    changes = [{"revision": n, "component": component(name, id)} for n, name in ((1, "show/old"), (2, "show/new"))]
    a.ok("changes", epoch=1, after=0, upto=2, changes=changes)
    error = ctl.error("show", "show/old", "--lab", served.url, status=exits.NOT_FOUND)
    assert (error["renamed_to"], error["hint"]) == ("show/new", "it is called 'show/new' now")
    kinds = [event["kind"] for event in ctl.json("history", "show/new", "--lab", served.url)]
    assert kinds == ["created", "renamed"]
    lines = ctl("history", "show/new", "--lab", served.url).splitlines()
    assert len(lines) == 3 and lines[2].split()[2:6] == ["renamed", "show/new", id, a.name]
    ctl("history", "--lab", served.url, status=exits.USAGE)


def test_lab_list_has_all_pages(ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]) -> None:
    """More components and changes than a page of the lab holds are all told, each once."""
    components = [component(f"page/{n:03}", str(ULID())) for n in range(450)]
    hosts[0].ok("sync", epoch=1, components=components)
    told = ctl.json("list", "page/*", "--lab", served.url)
    assert [entry["name"] for entry in told] == [c["name"] for c in components]


def test_lab_status_tells_of_its_hosts(ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]) -> None:
    """Status --lab says that the lab is well, and which hosts it hears."""
    status = ctl.json("status", "--lab", served.url)
    assert (status["service"], status["healthy"]) == ("madsci-registry-lab", True)
    assert {host.name for host in hosts} <= {host["host"] for host in status["hosts"]}
    assert f"{hosts[0].name} (a test) since " in ctl("status", "--lab", served.url)


def test_conflicts_show_both_sides_and_merge_decides(
    ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]
) -> None:
    """Lab conflicts shows what the lab has beside what the host says; merge, with -y, has the lab prefer one ULID, and
    both stay known; what is decided is shown with --decided alone."""
    ours, theirs = clash(hosts, "clash")
    hosts[0].resolve("clash", ours, lock={"holder": {"pid": 12, "comm": "node"}})
    text = ctl("lab", "conflicts", "--lab", served.url)
    lines = [line.split() for line in text[text.index("clash: ") :].splitlines()]
    assert "clash: it was made on two hosts while they were apart; seen " in text and ", not decided" in text
    assert lines[1] == ["THE", "LAB", "HAS", "HOST", hosts[1].name, "SAYS"]
    assert ["id", ours, theirs] in lines and ["type", "node", "node"] in lines
    assert ["created", "2026-11-20T10:00:00Z", "2026-11-20T10:00:00Z"] in lines
    assert ["last", "seen", "-", "2026-11-22T10:00:00Z"] in lines
    assert any(line[:7] == ["held", "by", "pid", "12", "(node)", "on", hosts[0].name] for line in lines)
    ctl("lab", "merge", "clash", "--prefer", theirs, "--lab", served.url, status=exits.USAGE)  # nobody can be asked
    (conflict,) = ctl.json("lab", "conflicts", "clash", "--lab", served.url)
    assert (conflict["id"], conflict["entry"]["id"], conflict["said"]["last_seen"]) == (theirs, ours, SEEN)
    entry = ctl.json("lab", "merge", "clash", "--prefer", theirs, "--lab", served.url, "-y")
    assert (entry["id"], entry["other_ids"]) == (theirs, [ours])
    assert {ctl.json("show", word, "--lab", served.url)["id"] for word in ("clash", ours, theirs)} == {theirs}
    assert f"other ids: {ours}" in " ".join(ctl("show", "clash", "--lab", served.url).split())
    assert ctl.json("lab", "conflicts", "clash", "--lab", served.url) == []
    decided = ctl.json("lab", "conflicts", "clash", "--decided", "--lab", served.url)
    assert {conflict["id"] for conflict in decided} == {ours, theirs} and all(c["decided_at"] for c in decided)


def test_merge_may_be_changed_and_needs_a_conflict(
    ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]
) -> None:
    """A decision is changed by another one; of a name that nobody contradicts there is nothing to decide."""
    ours, theirs = clash(hosts, "changed")
    for prefer in (theirs, ours):
        words = ("lab", "merge", "changed", "--prefer", prefer, "--lab", served.url, "-y")
        assert ctl.json(*words)["id"] == prefer
    hosts[0].resolve("peaceful", ours_too := str(ULID()))
    words = ("lab", "merge", "peaceful", "--prefer", ours_too, "--lab", served.url, "-y")
    assert "nothing to decide" in ctl.error(*words, status=exits.NOT_FOUND)["message"]


def test_merge_of_a_ulid_that_has_no_part_is_refused(
    ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]
) -> None:
    """A ULID that neither side has is refused by the lab, and nothing is decided."""
    ids = clash(hosts, "no part")
    words = ("lab", "merge", "no part", "--lab", served.url, "-y")
    assert ctl.error(*words, "--prefer", str(ULID()), status=exits.NOT_FOUND)["code"] == "not_found"
    (conflict,) = ctl.json("lab", "conflicts", "no part", "--lab", served.url)
    assert [conflict["entry"]["id"], conflict["id"]] == ids


def test_merge_asks_first(ctl: Ctl, served: LabProcess, hosts: tuple[LabHost, LabHost]) -> None:
    """On a terminal merge shows both sides and asks; only a yes decides."""
    ours, theirs = clash(hosts, "asked")
    for answer, status, left in ((b"n\n", exits.OTHER, 1), (b"y\n", exits.OK, 0)):
        words = ctl.words("lab", "merge", "asked", "--prefer", theirs, "--lab", served.url)
        keyboard, theirs_end = pty.openpty()
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=theirs_end, stdout=pipe, stderr=pipe, text=True)
        os.close(theirs_end)
        os.write(keyboard, answer)
        shown, talk = process.communicate(timeout=PATIENCE_S)
        os.close(keyboard)
        assert process.returncode == status
        assert ours in shown and theirs in shown and f"Shall asked be {theirs} from now on?" in talk
        assert len(ctl.json("lab", "conflicts", "asked", "--lab", served.url)) == left


# rights


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[LabProcess]:
    """A lab that wants tokens."""
    (tmp_path / "tokens").write_text("".join(f"{host} {token}\n" for host, token in TOKENS.items()))
    with LabProcess(tmp_path, "--token-file", str(tmp_path / "tokens")) as lab:
        yield lab


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file for a token, which others may not read."""
    path = tmp_path / "token"
    path.touch(mode=0o600)
    return path


def test_token_of_the_file_is_this_hosts(ctl: Ctl, guarded: LabProcess, token_file: Path) -> None:
    """A lab that wants tokens is asked with the one of --lab-token-file, in the name that stands before it; it is in no
    output."""
    with LabHost(guarded.url, "a", token=TOKENS["a"]) as a, LabHost(guarded.url, "b", token=TOKENS["b"]) as b:
        _, theirs = clash((a.register(), b.register()), "arm")
    ask = ("--lab", guarded.url, "--lab-token-file", token_file)
    token_file.write_text(f"# this host\nb {TOKENS['b']}\n")
    assert [entry["name"] for entry in ctl.json("list", *ask)] == ["arm"]
    assert ctl.json("lab", "merge", "arm", "--prefer", theirs, *ask, "-y")["id"] == theirs
    assert ctl.json("history", "arm", *ask)[-1]["host"] == "b"
    token_file.write_text(TOKENS["a"])
    assert [entry["name"] for entry in ctl.json("list", *ask)] == ["arm"]
    token_file.write_text("b not-a-token-of-this-lab")
    done = ctl.run("list", *ask, status=exits.PERMISSION)
    assert "a token of this lab is needed" in done.stderr and "not-a-token" not in done.stdout + done.stderr
    assert ctl.error("list", "--lab", guarded.url, status=exits.PERMISSION)["code"] == "permission_denied"
    assert all(token not in guarded.log for token in (*TOKENS.values(), "not-a-token-of-this-lab"))


@pytest.mark.parametrize("content", ["", "# nothing\n", "a b c", "a b\nc d", "a t\u00f6ken", b"\xff\xfe", "a b\x1b[2J"])
def test_token_file_that_holds_no_token_is_refused(ctl: Ctl, token_file: Path, content: str | bytes) -> None:
    """A file that is not one line `HOST TOKEN` or `TOKEN` is invalid input, and what it holds is not shown."""
    token_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ("list", "--lab", "http://127.0.0.1:9", "--lab-token-file", token_file)
    error = ctl.error(*words, status=exits.INVALID)
    assert (error["field"], error["reason"]) == (
        "lab_token_file",
        f"{token_file} is not one line: HOST TOKEN, or TOKEN",
    )


def test_token_file_that_everybody_can_read_is_refused(ctl: Ctl, token_file: Path) -> None:
    """A token that others could read is not used, and the message says what to do; a missing file is an error too."""
    token_file.write_text(TOKENS["a"])
    words = ("list", "--lab", "http://127.0.0.1:9", "--lab-token-file", token_file)
    token_file.chmod(0o604)
    assert f"chmod o= {token_file}" in ctl.error(*words, status=exits.INVALID)["message"]
    token_file.unlink()
    assert "No such file" in ctl.run(*words, status=exits.OTHER).stderr


def test_password_in_the_url_is_refused_and_not_shown(ctl: Ctl) -> None:
    """A URL that holds a password is refused, as other users see command lines; it is not repeated."""
    done = ctl.run("list", "--lab", f"http://a:{TOKENS['a']}@127.0.0.1:9", status=exits.USAGE)
    assert "--lab-token-file" in done.stderr and TOKENS["a"] not in done.stdout + done.stderr
    for url in ("127.0.0.1:8010", "ftp://lab", "http://", "http://lab:port", "http://[::1"):
        assert "is no URL such as" in ctl.run("list", "--lab", url, status=exits.USAGE).stderr
    assert "are for --lab" in ctl.run("list", "--lab-ca-file", "x", status=exits.USAGE).stderr


def test_certificate_of_the_lab_counts_if_the_file_has_it(ctl: Ctl, tmp_path: Path) -> None:
    """A lab that serves HTTPS is asked where --lab-ca-file has its certificate, else nothing is sent to it."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    with LabProcess(tmp_path, "--tls-cert", str(cert), "--tls-key", str(key)) as lab:
        assert ctl.json("list", "--lab", lab.url, "--lab-ca-file", cert) == []
        error = ctl.error("list", "--lab", lab.url, status=exits.OTHER)
        assert error["code"] == "lab_unavailable" and "certificate" in error["message"]
        bad = ctl.error("list", "--lab", lab.url, "--lab-ca-file", key, status=exits.INVALID)
        assert bad["field"] == "lab_ca_file"
        assert "No such file" in ctl.run("list", "--lab", lab.url, "--lab-ca-file", "x", status=exits.OTHER).stderr


# what is no lab, or is away


def test_what_does_not_say_that_it_is_a_lab_is_not_believed(ctl: Ctl) -> None:
    """A server without a lab registry, which answers 404 to everything, is not one in which nothing is known."""
    with LabStub(marked=False) as stub:
        for behaviour, words in (("nothing", ["list"]), ("nothing", ["lab", "conflicts"]), ("fault", ["list"])):
            stub.behaviour = behaviour
            error = ctl.error(*words, "--lab", stub.url, status=exits.OTHER)
            assert error["code"] == "lab_unavailable" and "does not say that it is a lab" in error["message"]
        stub.behaviour = ""
        for words in (["list"], ["show", "arm"], ["history", "arm"], ["status"], ["lab", "conflicts"]):
            error = ctl.error(*words, "--lab", stub.url, status=exits.OTHER)
            assert error["code"] == "lab_unavailable" and "does not say that it is a lab" in error["message"]


@pytest.mark.parametrize(
    "behaviour", ["silent", "drip_head", "drip_body", "huge", "html", "error", "fault", "cut", "garbage"]
)
def test_lab_that_fails_is_told_in_time(ctl: Ctl, lab: LabStub, behaviour: str) -> None:
    """Whatever a server does instead of answering is lab_unavailable within --timeout, in words that name it."""
    lab.behaviour, began = behaviour, time.monotonic()
    error = ctl.error("show", "arm", "--lab", lab.url, "--timeout", "0.5", status=exits.OTHER)
    assert error["code"] == "lab_unavailable" and error["message"].startswith(lab.url)
    assert time.monotonic() - began < 5


def test_lab_that_redirects_is_not_followed(ctl: Ctl, lab: LabStub) -> None:
    """A redirect is an answer that is none: what would be sent to the lab goes nowhere else."""
    lab.behaviour = "redirect"
    assert "answered 307" in ctl.error("show", "arm", "--lab", lab.url, status=exits.OTHER)["message"]
    assert [path for _, path in lab.requests] == ["/registry/lookup"]


def test_lab_that_is_away_is_told(ctl: Ctl) -> None:
    """Where nobody listens the error says so, and that nothing else was asked."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert ctl.error("list", "--lab", url, status=exits.OTHER)["code"] == "lab_unavailable"


# through the daemon, which is a script here

LAB = {
    "state": "up", "url": "http://lab:8010", "host": "a", "since": CREATED, "error": "", "require": False, "behind": 0,
    "revision": 7, "confirmed": 2, "unconfirmed": 1, "contested": ["leg"], "conflicts": 1,
}  # fmt: skip


class Told:
    """registryctl while its daemon is a script."""

    def __init__(self, ctl: Ctl, daemon: ScriptedDaemon) -> None:
        self._ctl = ctl
        self._daemon = daemon
        self.asked: list[dict[str, Any]] = []

    def __call__(self, *words: str, answers: list[dict[str, Any]], status: int = 0) -> str:
        """Run a command whose requests are answered so, in turn; return what it printed."""
        process = self._ctl.start(*words)
        self._daemon.welcome()
        for answer in answers:
            request = self._daemon.request()
            self.asked.append({k: v for k, v in request.body.items() if k not in ("v", "token", "epoch", "seq")})
            if "code" in answer:
                request.refuse(**answer)
            else:
                request.ok(**answer)
        printed, talk = process.communicate(timeout=PATIENCE_S)
        self._daemon.hang_up()
        assert process.returncode == status, talk
        return printed + talk


@pytest.fixture
def told(ctl: Ctl) -> Iterator[Told]:
    """A daemon that is a script."""
    with ScriptedDaemon(ctl.registry) as daemon:
        yield Told(ctl, daemon)


def test_lab_status_shows_how_the_daemon_stands_with_it(told: Told) -> None:
    """Lab status says state, URL, host and locks; only what there is to say; off where the daemon has no lab, or is of
    a version that knows of none."""
    shown = " ".join(told("lab", "status", answers=[{"lab": LAB}]).split())
    assert "lab: up since 2026-11-20T10:00:00Z lab url: http://lab:8010 lab host: a" in shown
    assert "lab locks: 2 confirmed, 1 unconfirmed lab contested: leg lab conflicts: 1" in shown
    assert "error" not in shown and "behind" not in shown and "required" not in shown
    away = {**LAB, "state": "away", "error": "no route", "behind": 12, "require": True}
    shown = " ".join(told("lab", "status", answers=[{"lab": away}]).split())
    assert "lab: away since" in shown and "lab error: no route" in shown and "lab behind: 12 changes" in shown
    assert "lab required: yes" in shown
    for answer in ({"lab": {"state": "off"}}, {}):
        assert told("lab", "status", answers=[answer]).split() == ["lab:", "off"]


def test_lab_sync_waits_until_the_lab_knows_all(told: Told) -> None:
    """Lab sync asks until the lab knows all changes; exit status 5 where it does not when --timeout is over, with how
    many are left and why."""
    drained = {"behind": 0, "lab": {**LAB, "behind": 0}}
    left = {"behind": 12, "lab": {**LAB, "state": "away", "error": "no route", "behind": 12}}
    assert "The lab knows all changes." in told("lab", "sync", answers=[left, drained])
    assert len(told.asked) == 2 and all(9 < asked["wait_s"] <= 10 for asked in told.asked)
    text = told("lab", "sync", "--timeout", "3", answers=[left], status=exits.TIMEOUT)
    assert "does not know 12 changes after 3 s; it is away: no route" in text
    assert 2 < told.asked[-1]["wait_s"] <= 3
    refused = {"code": "unsupported", "message": "the daemon has no lab"}
    assert "has no lab" in told("lab", "sync", answers=[refused], status=exits.OTHER)


def conflict(name: str, host: str, mine: str, theirs: str) -> dict[str, Any]:
    """Return a conflict as a lab tells it: `theirs` is what the lab has."""
    entry = component(name, theirs) | {"host": "b", "retired": False, "term": 3, "other_ids": [mine], "lock": None}
    said = component(name, mine) | {"retired": False}
    facts = {"reason": "two_ids", "host": host, "at": SEEN, "decided_at": None, "said": said, "entry": entry}
    return {"name": name, "id": mine, **facts}


def test_lab_conflicts_come_page_by_page_with_who_holds_here(told: Told) -> None:
    """Lab conflicts asks the daemon for all pages; of a component of this host it says who holds it here."""
    mine, theirs, other = (str(ULID()) for _ in range(3))
    here = {"name": "arm", "id": mine, "component_type": "node", "state": "held", "locked": True, "fencing_token": 5}
    here |= {"created_at": CREATED, "last_seen": SEEN}
    holder = {"pid": 12, "uid": 7, "gid": 7, "proof": "pidfd", "host": "a", "session": "s", "since": SEEN}
    answers: list[dict[str, Any]] = [
        {"conflicts": [conflict("arm", "a", mine, theirs)], "after": ["arm", mine]},
        {"conflicts": [conflict("leg", "c", other, theirs)], "after": None},
        {"lab": LAB},
        {"component": {**here, "holder": {**holder, "instance": "i"}}},
    ]
    text = told("lab", "conflicts", answers=answers)
    assert [asked.get("after") for asked in told.asked[:2]] == [None, ["arm", mine]]
    assert "nobody" in text and "pid 12 (uid 7) on a since 2026-11-22T10:00:00Z, known by its pidfd" in text
    assert "arm: it was made on two hosts" in text and "leg: it was made on two hosts" in text
    assert "registryctl lab merge NAME --prefer ULID" in text
    assert "There is no conflict." in told("lab", "conflicts", answers=[{"conflicts": [], "after": None}, {"lab": LAB}])


def test_lab_merge_asks_the_daemon(told: Told) -> None:
    """Lab merge looks at the conflicts of that name alone, and has the daemon decide."""
    mine, theirs = str(ULID()), str(ULID())
    page = {"conflicts": [conflict("arm", "a", mine, theirs), conflict("b", "a", theirs, mine)], "after": ["b", theirs]}
    merged = component("arm", mine, other_ids=[theirs])
    text = told("lab", "merge", "arm", "--prefer", mine, "-y", answers=[page, {"entry": merged}])
    assert f"arm is {mine} in the lab; {theirs} is known as the same component." in text
    assert told.asked == [
        {"op": "lab_conflicts", "decided": True, "after": ["arm", ""]},
        {"op": "lab_merge", "name": "arm", "prefer": mine},
    ]
    page = {"conflicts": [conflict("b", "a", theirs, mine)], "after": None}
    text = told("lab", "merge", "arm", "--prefer", mine, "-y", answers=[page], status=exits.NOT_FOUND)
    assert "nobody contradicts the lab about 'arm'" in text


def test_list_show_and_status_tell_of_the_lab_where_there_is_any(told: Told) -> None:
    """A component's standing in the lab, its other ULIDs and the one that is preferred are shown where there are any;
    else there is no word of a lab."""
    one, two, three = (str(ULID()) for _ in range(3))
    plain = {"name": "arm", "id": one, "component_type": "node", "state": "free", "locked": False}
    plain |= {"fencing_token": None, "created_at": CREATED, "last_seen": SEEN}
    full = {**plain, "lab": "unconfirmed", "other_ids": [two], "preferred_id": three}
    shown = told("show", "arm", answers=[{"component": full}])
    assert f"other ids:    {two}\n" in shown and "lab:          unconfirmed\n" in shown
    assert f"preferred id: {three}, by the lab: its next resolve gives that one\n" in shown
    lines = told("list", answers=[{"components": [plain, full], "cursor": None}]).splitlines()
    assert lines[0].endswith("LAB") and lines[1].endswith("-") and lines[2].endswith("unconfirmed conflict")
    assert "lab" not in told("show", "arm", answers=[{"component": plain}]).lower()
    assert "LAB" not in told("list", answers=[{"components": [plain], "cursor": None}])
    status = {"version": "1", "degraded": [], "lab": LAB}
    text = told("status", answers=[status])
    assert "lab url:" in text and "{" not in text


def test_show_finds_a_component_by_any_of_its_ulids(told: Told) -> None:
    """Show with a ULID that is not the preferred one shows the component that it is, with the preferred one first."""
    one, two = str(ULID()), str(ULID())
    found = {"name": "arm", "id": one, "component_type": "node", "state": "free", "locked": False, "other_ids": [two]}
    found |= {"fencing_token": None, "created_at": CREATED, "last_seen": SEEN}
    missing = {"code": "not_found", "message": "no component is called that"}
    text = told("show", two, answers=[missing, {"component": found}])
    assert [asked["op"] for asked in told.asked] == ["get", "whois"] and text.index(one) < text.index(two)
