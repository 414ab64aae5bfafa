"""Metrics: what is counted, what Prometheus is told of it, and where it is given out."""

from __future__ import annotations

import re
import socket
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers import PATIENCE_S, PROJECT, FakeClock, until
from madsci_registry.errors import BY_CODE, NoSpaceError
from madsci_registry.protocol import REQUESTS
from madsci_registryd.clock import Timers
from madsci_registryd.faults import BadConfiguration
from madsci_registryd.meters import Histogram
from madsci_registryd.metrics import Metrics
from madsci_registryd.outlets import RENDER_S, STALE_S, Listener, Outlets
from madsci_registryd.settings import load
from pair import Pair

OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
PREFIX = "madsci_registryd_"
STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "protocol_version": 1,
    "sqlite_version": "3.51.3",
    "epoch": 7,
    "revision": 8,
    "names": 5,
    "held": 2,
    "retired": 1,
    "waiting": 3,
    "degraded": ["this", "that"],
    "export": {"state": "failing", "claims": 4, "refused": 5, "old_programs": [{}, {}]},
    "lab": {"state": "away", "behind": 6, "confirmed": 0, "unconfirmed": 2, "contested": ["arm"], "conflicts": 7},
}


class Shown:
    """What a text of metrics says, read by Prometheus' own parser."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._values.get((PREFIX + name, *sorted(labels.items())))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "registry.db")
    yield pair
    pair.close()


def metrics_of(pair: Pair, status: dict[str, Any] | None = None) -> str:
    return Metrics(pair.core, lambda: {**STATUS, **(status or {})}, pair.path, 1000.5).text()


def shown(pair: Pair, status: dict[str, Any] | None = None) -> Shown:
    return Shown(metrics_of(pair, status))


# counting


def test_answers_are_counted_by_verb_and_outcome(pair: Pair) -> None:
    """Each answer counts once, under its verb and `ok` or its error; what could not be read under the verb `none`."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    b.resolve("arm")
    for _ in range(3):
        a.send("lookup", name="arm")
    a.send("get", name="nobody")
    a.send("lookup", name="arm", epoch=1)
    a.raw(b"no JSON")
    counted = {key: count for key, count in pair.core.meters.requests.items() if count}
    assert counted == {
        ("resolve", "ok"): 1,
        ("resolve", "held"): 1,
        ("lookup", "ok"): 3,
        ("get", "not_found"): 1,
        ("lookup", "stale_epoch"): 1,
        ("none", "invalid"): 1,
    }
    assert shown(pair)("requests_total", verb="lookup", code="ok") == 3


def test_waiting_request_is_counted_when_it_is_answered(pair: Pair) -> None:
    """A request that waits counts with its answer, and its grant as a hand-over."""
    a, b = pair.session("a"), pair.session("b")
    token = a.resolve("arm").ok()["fencing_token"]
    waits = b.resolve("arm", wait_s=5.0)
    assert pair.core.meters.requests["resolve", "ok"] == 1
    a.release("arm", token)
    assert waits.code == "ok"
    assert pair.core.meters.requests["resolve", "ok"] == 2
    assert (pair.core.meters.grants, pair.core.meters.hand_overs) == (2, 1)


def test_locks_are_counted_by_how_they_ended(pair: Pair) -> None:
    """Released, broken, and ended with the holder's process, its bye, or its connection are told apart."""
    a, b, c, d, e = (pair.session(name) for name in "abcde")
    a.release("one", a.resolve("one").ok()["fencing_token"])
    a.send("break_lock", name="two", fencing_token=b.resolve("two").ok()["fencing_token"])
    c.resolve("three")
    c.ended()
    d.resolve("four")
    pair.core.registrar.end_session(d.record, "it said bye")
    pair.commit()
    e.resolve("five")
    e.drop()
    pair.wait(2.5)
    ended = shown(pair)
    for how in ("released", "broken", "process_died", "said_bye", "not_resumed"):
        assert ended("locks_ended_total", how=how) == 1, how
    assert ended("locks_ended_total", how="other") == 0


def test_change_that_was_refused_counts_no_lock(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its savepoint undid is in no count."""
    a = pair.session("a")
    token = a.resolve("arm").ok()["fencing_token"]
    release = pair.core.service.release

    def breaks(*args: Any) -> None:
        release(*args)
        raise NoSpaceError("undone")

    monkeypatch.setattr(pair.core.handlers, "_table", dict(pair.core.handlers._table))
    for request, change in pair.core.handlers._table.items():
        if request is REQUESTS["release"]:
            pair.core.handlers._table[request] = change._replace(verb=breaks)
    assert a.send("release", name="arm", instance="i", fencing_token=token).code == "no_space"
    assert pair.core.meters.locks_ended["released"] == 0


def test_commits_are_timed_and_batches_measured(pair: Pair) -> None:
    """A commit counts once, as synced or not, a batch with the number of its changes."""
    a = pair.session("a")
    before = pair.core.meters.batches.sum
    for name in ("one", "two", "three"):
        a.resolve(name, turn=False)
    pair.commit()
    now = shown(pair)
    assert now("batch_writes_sum") == before + 3
    assert now("commit_seconds_count", synced="yes") == 1
    a.release("one", a.get("one")["fencing_token"])
    assert shown(pair)("commit_seconds_count", synced="no") == 1


def test_histogram_counts_a_value_on_a_bound_below_it() -> None:
    """A bucket holds what is at most its bound; the last one all."""
    histogram = Histogram((1, 5))
    for value in (0.5, 1, 1.1, 5, 7):
        histogram.add(value)
    assert histogram.cumulated() == [("1.0", 2), ("5.0", 4), ("+Inf", 5)]
    assert histogram.sum == 14.6


# what Prometheus is told


def test_metrics_say_what_status_says(pair: Pair) -> None:
    """Version, names, waiting, degraded, registry.json and the lab are those of `status`; sizes those on the disk."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    b.drop()
    now = shown(pair)
    build = now.families[PREFIX + "build_info"].samples[0].labels
    assert (build["version"], build["sqlite"], build["protocol"]) == ("1.2.3", "3.51.3", "1")
    assert [now("names", state=state) for state in ("held", "free", "retired")] == [2, 3, 1]
    assert [now(name) for name in ("epoch", "revision", "waiting", "degraded")] == [7, 8, 3, 2]
    assert now("start_time_seconds") == 1000.5
    assert [now("export_state", state=s) for s in ("on", "off", "failing", "stopped")] == [0, 0, 1, 0]
    assert [now(name) for name in ("export_claims", "old_changes_refused_total", "old_programs")] == [4, 5, 2]
    assert [now("lab_state", state=s) for s in ("off", "connecting", "up", "away", "refused")] == [0, 0, 0, 1, 0]
    assert [now("lab_behind"), now("lab_contested"), now("lab_conflicts")] == [6, 1, 7]
    assert [now("lab_locks", standing=s) for s in ("confirmed", "unconfirmed")] == [0, 2]
    assert now("sessions", proof="pidfd", presence="attached") == 1
    assert now("sessions", proof="pidfd", presence="dropped") == 1
    assert now("database_bytes") == pair.path.stat().st_size
    assert now("wal_bytes") == Path(f"{pair.path}-wal").stat().st_size
    free = now("disk_free_bytes")
    assert free is not None and free > 0
    assert shown(pair, {"export": {"state": "off"}})("export_state", state="off") == 1
    assert shown(pair, {"lab": {"state": "off"}})("lab_state", state="off") == 1


def test_documented_metrics_are_those_that_there_are(pair: Pair) -> None:
    """The table of docs/operations.md has each metric with its type and labels, in their order, and no other."""
    section = OPERATIONS.split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", section, re.MULTILINE)
    documented = [(name, kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows]
    told = []
    for family in shown(pair).families.values():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        told.append((family.name + "_total" * (family.type == "counter"), family.type, labels))
    assert documented == told


def test_metrics_are_named_as_prometheus_wants(pair: Pair) -> None:
    """Every metric has our prefix and a help text; units are seconds and bytes; `promtool` has nothing to add."""
    for family in shown(pair).families.values():
        assert re.fullmatch(PREFIX + r"[a-z]+(_[a-z]+)*", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|milliseconds|us|kb|mb|total|count|sum|bucket)$", family.name), family.name


def test_labels_hold_nothing_that_clients_choose(pair: Pair) -> None:
    """However many names, users and broken requests there were, the series are those of the program's own tables."""
    client = pair.session("a", uid=4321)
    before = len(metrics_of(pair).splitlines())
    for n in range(50):
        client.resolve(f"name-{n}")
        client.raw(b'{"op": "verb-%d"}' % n)
        pair.session(f"s{n}", uid=5000 + n).send("lookup", name="x")
    text = metrics_of(pair)
    assert "name-" not in text and "verb-" not in text and "4321" not in text and "5001" not in text
    assert len(text.splitlines()) - before <= 2  # the first answers of their kinds
    codes = {s.labels["code"] for s in Shown(text).families[PREFIX + "requests"].samples}
    assert codes <= {"ok", *BY_CODE}


def test_counting_costs_a_request_next_to_nothing(pair: Pair) -> None:
    """A count of an answer takes microseconds at most: it is one addition in a dictionary."""
    meters = pair.core.meters
    reply: dict[str, Any] = {"ok": {}}

    def count() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            meters.counted("lookup", lambda reply: None, reply)
        return (time.perf_counter() - start) / 1000

    assert min(count() for _ in range(20)) < 10e-6


# settings


@pytest.mark.parametrize("text", ["127.0.0.1:9847", "127.8.7.6:1", "[::1]:65535"])
def test_metrics_may_be_served_on_loopback(text: str) -> None:
    """Any loopback address will do, of IPv4 or IPv6."""
    address = load({"metrics_listen": text}, None).metrics_address
    assert address is not None
    assert address[0] in text and text.endswith(f":{address[1]}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0.0.0.0:9847", "loopback"),
        ("192.168.1.7:9847", "loopback"),
        ("[::]:9847", "loopback"),
        ("[fe80::1]:9847", "loopback"),
        ("localhost:9847", "in numbers"),
        ("127.0.0.1", "ADDRESS:PORT"),
        (":9847", "in numbers"),
        ("127.0.0.1:0", "ADDRESS:PORT"),
        ("127.0.0.1:65536", "ADDRESS:PORT"),
        ("127.0.0.1:http", "ADDRESS:PORT"),
    ],
)
def test_metrics_elsewhere_are_refused_with_the_reason(text: str, why: str) -> None:
    """An address that other hosts may reach, a name, or no port at all is a wrong setting, and the message says why."""
    with pytest.raises(BadConfiguration, match=f"metrics_listen: .*{why}") as refused:
        load({"metrics_listen": text}, None)
    assert refused.value.status == 78


def test_metrics_file_must_end_as_node_exporter_wants() -> None:
    """A file that node_exporter would not read is a wrong setting."""
    with pytest.raises(BadConfiguration, match=r"metrics_file: .*\.prom"):
        load({"metrics_file": Path("/tmp/metrics.txt")}, None)


# outlets


class Given:
    """Outlets on a clock that a test turns."""

    def __init__(self, listen: tuple[str, int] | None, file: Path | None) -> None:
        self.clock = FakeClock()
        self.timers = Timers(self.clock)
        self.rendered = 0
        self.outlets = Outlets(self.clock, self.timers, self.render, listen=listen, file=file)

    def render(self) -> str:
        self.rendered += 1
        return f"rendered {self.rendered}\n"

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.timers.run_due()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def given() -> Iterator[Callable[..., Given]]:
    made: list[Given] = []

    def make(listen: tuple[str, int] | None = None, file: Path | None = None) -> Given:
        made.append(Given(listen, file))
        return made[-1]

    yield make
    for each in made:
        each.outlets.close()


def fetch(port: int, path: str = "/metrics") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


def test_nothing_is_rendered_where_nothing_is_configured(given: Callable[..., Given]) -> None:
    """A daemon without these settings never makes a text of metrics by itself."""
    idle = given()
    idle.wait(10 * RENDER_S)
    assert idle.rendered == 0


def test_file_is_replaced_whole_and_readable_by_all(given: Callable[..., Given], tmp_path: Path) -> None:
    """The file is there from the start, renewed every RENDER_S, of mode 0644, and gone after an orderly stop; beside
    it nothing is left that node_exporter would read."""
    path = tmp_path / "madsci.prom"
    running = given(file=path)
    first = path.stat()
    assert path.read_text() == "rendered 1\n"
    assert stat.S_IMODE(first.st_mode) == 0o644
    running.wait(RENDER_S / 2)
    assert running.rendered == 1
    running.wait(RENDER_S / 2)
    assert path.read_text() == "rendered 2\n"
    assert path.stat().st_ino != first.st_ino
    assert list(tmp_path.iterdir()) == [path]
    running.outlets.close()
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_is_told_once_and_tried_again(
    given: Callable[..., Given], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is not there stops nothing; when it is, the file comes."""
    path = tmp_path / "later" / "madsci.prom"
    running = given(file=path)
    running.wait(RENDER_S)
    assert [record.rare.name for record in caplog.records] == ["metrics_failing"]  # type: ignore[attr-defined]
    path.parent.mkdir()
    running.wait(RENDER_S)
    assert path.read_text() == "rendered 3\n"


def test_listener_serves_the_last_text(given: Callable[..., Given]) -> None:
    """/metrics is what the loop rendered last, in Prometheus' content type; anything else is not found."""
    port = free_port()
    running = given(listen=("127.0.0.1", port))
    assert fetch(port) == (200, "rendered 1\n")
    assert fetch(port, "/metrics?x=1") == (200, "rendered 1\n")
    assert fetch(port, "/")[0] == 404
    assert running.rendered == 1
    running.wait(RENDER_S)
    assert fetch(port) == (200, "rendered 2\n")
    running.outlets.close()
    with pytest.raises(urllib.error.URLError):
        fetch(port)


def test_listener_does_not_serve_the_text_of_a_loop_that_hangs(given: Callable[..., Given]) -> None:
    """After 30 s without a new text the answer is 503, so that a daemon that hangs does not look well."""
    port = free_port()
    running = given(listen=("127.0.0.1", port))
    running.clock.advance(STALE_S)  # nobody runs the timers
    assert fetch(port)[0] == 503
    running.timers.run_due()
    assert fetch(port)[0] == 200


def test_port_that_is_taken_is_told_and_tried_again(
    given: Callable[..., Given], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The registry is served without the listener until the port is free, and the file is written all the same."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        running = given(listen=("127.0.0.1", port), file=tmp_path / "madsci.prom")
        assert f"127.0.0.1 port {port}: " in caplog.text
        assert (tmp_path / "madsci.prom").exists()
    running.wait(RENDER_S)
    assert fetch(port) == (200, "rendered 2\n")


def test_connections_that_stay_open_cost_the_daemon_one_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connect and say nothing, one of them is accepted at a time, and cut off after its patience."""
    monkeypatch.setattr(Listener, "patience_s", 0.2)
    listener = Listener(("127.0.0.1", 0), FakeClock())
    try:
        port = listener.server_address[1]
        listener.give(b"text\n")
        before = len(list(Path("/proc/self/fd").iterdir()))
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        until(lambda: len(list(Path("/proc/self/fd").iterdir())) > before + 5, "for the first to be accepted")
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + len(silent) + 2
        assert fetch(port) == (200, "text\n")
        for sock in silent:
            sock.close()
    finally:
        listener.stop()


@contextmanager
def dripping(port: int) -> Iterator[None]:
    """Somebody who asks for metrics a byte every 50 ms, from the time at which he was heard."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(0.05):
                    sock.sendall(b"G")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def test_connection_that_says_a_little_all_the_time_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends byte by byte has no longer than who says nothing, and whoever comes next is served."""
    monkeypatch.setattr(Listener, "patience_s", 0.3)
    listener = Listener(("127.0.0.1", 0), FakeClock())
    try:
        listener.give(b"text\n")
        with dripping(listener.server_address[1]):
            assert fetch(listener.server_address[1]) == (200, "text\n")
    finally:
        listener.stop()


def test_listener_stops_while_somebody_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits for no connection, whatever its patience."""
    monkeypatch.setattr(Listener, "patience_s", 600.0)
    listener = Listener(("127.0.0.1", 0), FakeClock())
    with dripping(listener.server_address[1]):
        until(lambda: listener._served is not None, "for the connection")
        stopper = threading.Thread(target=listener.stop, daemon=True)
        stopper.start()
        stopper.join(PATIENCE_S)
        assert not stopper.is_alive()


def test_turns_of_the_loop_are_timed_without_their_waiting() -> None:
    """What is told of a turn is the time between one wait and the next."""
    from madsci_registryd.loop import Loop

    instants = iter([10.0, 18.0, 20.0, 28.5, 30.0])  # awake, to sleep, awake, to sleep, awake
    loop = Loop(lambda: next(instants))
    worked: list[float] = []
    loop.worked = worked.append
    for _ in range(3):
        loop.turn(0)
    loop.close()
    assert worked == [8.0, 8.5]
