"""How a lock stands in the lab, from the holder's side: what its daemon says is followed, told, and counts at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from helpers import PATIENCE_S, until
from madsci_registry import LockLostError, Registration, RegistryClient
from scripted import ULID, ScriptedDaemon

OTHER = "01BX5ZZKBKACTAV9WEVGEMMVRZ"


class Stage:
    """A client, and a daemon that says what the test has it say."""

    def __init__(self, daemon: ScriptedDaemon, client: RegistryClient, threads: ThreadPoolExecutor) -> None:
        self.daemon = daemon
        self.client = client
        self._threads = threads

    def begin(self, name: str, **arguments: Any) -> Future[Registration]:
        """Begin a resolve."""
        return self._threads.submit(self.client.resolve, name, "node", **arguments)

    def holds(self, name: str, token: int, **more: Any) -> Registration:
        """Resolve a name; the first time, the client connects."""
        is_new = self.client._session is None
        waiting = self.begin(name)
        if is_new:
            self.daemon.welcome()
        self.daemon.request().grant(token, **more)
        return waiting.result(PATIENCE_S)

    def line(self, op: str, name: str, token: int, **more: Any) -> None:
        """Say a line about a lock of the client."""
        self.daemon.say({"op": op, "name": name, "instance": self.client.instance, "fencing_token": token, **more})

    def lab(self, name: str, old_token: int, token: int, lab: str) -> None:
        """Say how a lock stands in the lab."""
        self.line("lab", name, token, old_token=old_token, lab=lab)

    def hold(self, name: str, token: int, lab: str | None) -> dict[str, Any]:
        """Make an entry of a welcome's `held`."""
        return {"name": name, "instance": self.client.instance, "fencing_token": token, "lab": lab}


@pytest.fixture
def stage(registry_path: Path) -> Iterator[Stage]:
    """A client that has not connected yet."""
    with ExitStack() as stack:
        daemon = stack.enter_context(ScriptedDaemon(registry_path))
        client = stack.enter_context(RegistryClient(registry_path, timeout=PATIENCE_S, autostart=False))
        yield Stage(daemon, client, stack.enter_context(ThreadPoolExecutor(4)))
        stack.callback(daemon.hang_up)
        client.timeout = 0.001  # nobody answers any more


class Told:
    """What the callbacks of a registration saw when they were called, in order."""

    def __init__(self, registration: Registration) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        registration.on_state(lambda r, state: self._queue.put((state, r.lab, r.fencing_token)))

    def next(self) -> Any:
        return self._queue.get(timeout=PATIENCE_S)

    def nothing_more(self) -> bool:
        try:
            self._queue.get(timeout=0.05)
        except Empty:
            return True
        return False


def test_lab_of_a_grant_is_what_the_daemon_answers(stage: Stage) -> None:
    """A registration says whether its lock is confirmed in the lab and where its ULID came from; "none" where the
    daemon has no lab, or knows nothing of any."""
    answers: list[tuple[dict[str, Any], str]] = [
        ({"lab": "confirmed", "source": "lab"}, "confirmed"), ({"lab": "unconfirmed"}, "unconfirmed"),
        ({"lab": None}, "none"), ({}, "none"), ({"lab": "a word of a later version"}, "none"),
    ]  # fmt: skip
    for n, (answer, expected) in enumerate(answers):
        mine = stage.holds(f"arm {n}", 5, **answer)
        assert (mine.lab, mine.source, mine.preferred_id) == (expected, answer.get("source", "local"), None)


def test_lab_of_an_identity_without_a_lock(stage: Stage) -> None:
    """Where no lock was asked for, `lab` says whether the lab was asked for the ULID; it does not change."""
    waiting = stage.begin("arm", acquire_lock=False)
    stage.daemon.welcome()
    stage.daemon.request().grant(None, lab="unconfirmed", source="local")
    mine = waiting.result(PATIENCE_S)
    assert (mine.lab, mine.held, mine.fencing_token) == ("unconfirmed", False, None)


def test_lock_that_the_lab_confirms_later_has_its_higher_token(stage: Stage) -> None:
    """A lock taken while the lab was away is told to have been confirmed, with the token that it has then, and is given
    back with that one; so is one that is unconfirmed again."""
    mine = stage.holds("arm", 5, lab="unconfirmed")
    told = Told(mine)
    stage.lab("arm", 5, 9, "confirmed")
    assert told.next() == ("held", "confirmed", 9)
    stage.lab("arm", 9, 9, "unconfirmed")
    assert told.next() == ("held", "unconfirmed", 9)
    stage.lab("arm", 9, 9, "unconfirmed")
    stage.lab("arm", 9, 12, "unconfirmed")
    assert told.next() == ("held", "unconfirmed", 12) and told.nothing_more()
    mine.ensure()
    released = stage._threads.submit(mine.release)
    request = stage.daemon.request()
    assert (request.body["op"], request.body["fencing_token"]) == ("release", 12)
    request.ok(released=True)
    assert released.result(PATIENCE_S) and told.next()[0] == "released"


def test_line_that_nobody_has_read_yet_counts(stage: Stage) -> None:
    """What the daemon has said of the lab is known at the next look, without a wait for another thread."""
    mine = stage.holds("arm", 5, lab="unconfirmed")
    stage.lab("arm", 5, 9, "confirmed")
    assert (mine.lab, mine.fencing_token) == ("confirmed", 9)


def test_line_about_the_lab_overtakes_the_grant(stage: Stage) -> None:
    """A lock that is confirmed before the reply which grants it has come is confirmed, with the higher token."""
    other = stage.holds("other", 1, lab="unconfirmed")
    waiting = stage.begin("arm")
    request = stage.daemon.request()
    stage.lab("arm", 5, 9, "confirmed")
    stage.lab("other", 1, 1, "confirmed")
    until(lambda: other.lab == "confirmed", "for the lines to be read")
    request.grant(5, lab="unconfirmed")
    mine = waiting.result(PATIENCE_S)
    assert (mine.held, mine.lab, mine.fencing_token) == (True, "confirmed", 9)


def test_reply_with_the_higher_token_overtakes_the_line(stage: Stage) -> None:
    """A client that resolves anew what it holds is answered with the token that has grown: it is the same lock, and
    neither registration is lost."""
    mine = stage.holds("arm", 5, lab="unconfirmed")
    again = stage.begin("arm")
    request = stage.daemon.request()
    stage.lab("arm", 5, 9, "confirmed")
    request.grant(9, lab="confirmed")
    assert again.result(PATIENCE_S).held and mine.held
    assert {mine.fencing_token, again.result().fencing_token} == {9}


def test_lock_that_grew_while_it_was_released_is_released_again(stage: Stage) -> None:
    """Where the lab confirms a lock while its release is on the way, the release is said again with the new token."""
    mine = stage.holds("arm", 5, lab="unconfirmed")
    released = stage._threads.submit(mine.release)
    request = stage.daemon.request()
    assert request.body["fencing_token"] == 5
    stage.lab("arm", 5, 9, "confirmed")
    request.ok(released=False)
    assert released.result(PATIENCE_S)
    heard = stage.daemon.heard()
    assert (heard["op"], heard["name"], heard["fencing_token"]) == ("release", "arm", 9)


def test_resume_says_how_locks_stand_in_the_lab_by_now(stage: Stage) -> None:
    """A token that grew while the connection was down is followed at the resume, in which unconfirmed locks come first;
    on_state tells of suspended and held, and what is so then."""
    kept, grown = stage.holds("kept", 3, lab="confirmed"), stage.holds("grown", 5, lab="unconfirmed")
    told = Told(grown)
    stage.daemon.hang_up()
    resume = stage.daemon.welcome(
        held=[stage.hold("kept", 3, "unconfirmed"), stage.hold("grown", 9, "confirmed")],
        renamed=[
            {"name": "grown", "to": "grown", "old_token": 5, "fencing_token": 9, "instance": stage.client.instance}
        ],
    )
    assert [(hold["name"], hold["fencing_token"]) for hold in resume["holds"]] == [("grown", 5), ("kept", 3)]
    assert told.next()[0] == "suspended" and told.next() == ("held", "confirmed", 9)
    assert (kept.held, kept.lab) == (True, "unconfirmed")


def test_lock_given_away_in_the_lab_is_lost_with_the_host_in_the_reason(stage: Stage) -> None:
    """A lock that the lab gave to another host is lost, and the reason says to which."""
    mine = stage.holds("arm", 5, lab="confirmed")
    told = Told(mine)
    stage.line("lost", "arm", 5, reason="the lab gave it to host b", by={"host": "b"})
    assert told.next() == ("lost", "confirmed", 5)
    with pytest.raises(LockLostError, match=r"the lab gave it to host b$"):
        mine.ensure()


def test_conflict_in_the_lab_is_told_and_changes_nothing(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Where the lab has another ULID for the name, the holder is told once, by callback and log, and keeps its own; the
    registration that its next resolve gives has the lab's, and nothing that would be preferred."""
    caplog.set_level(logging.WARNING)
    mine = stage.holds("arm", 5, lab="confirmed")
    told = Told(mine)
    for _ in range(2):
        stage.line("conflict", "arm", 5, id=ULID, preferred=OTHER)
    assert told.next() == ("held", "confirmed", 5)
    assert (mine.id, mine.preferred_id, mine.held) == (ULID, OTHER, True)
    again = stage.begin("arm")
    stage.daemon.request().grant(5, lab="confirmed", id=OTHER)
    assert (again.result(PATIENCE_S).id, again.result().preferred_id) == (OTHER, None)
    assert (mine.id, mine.preferred_id) == (ULID, OTHER) and told.nothing_more()
    warned = until(lambda: [r.getMessage() for r in caplog.records], "for the warning")
    assert warned == [f"the lab knows 'arm' as {OTHER}: this process keeps {ULID} until it resolves the name anew"]


def test_conflict_overtakes_the_grant(stage: Stage) -> None:
    """A conflict that is told before the reply that grants the lock is known when that has come."""
    other = stage.holds("other", 1)
    waiting = stage.begin("arm")
    request = stage.daemon.request()
    stage.line("conflict", "arm", 5, id=ULID, preferred=OTHER)
    stage.lab("other", 1, 1, "confirmed")
    until(lambda: other.lab == "confirmed", "for the lines to be read")
    request.grant(5, lab="confirmed")
    assert waiting.result(PATIENCE_S).preferred_id == OTHER


def test_lines_of_a_later_version_are_ignored(stage: Stage) -> None:
    """A line that this client does not know changes nothing and ends nothing."""
    mine = stage.holds("arm", 5, lab="confirmed")
    stage.daemon.say({"op": "weather", "name": "arm"})
    stage.lab("arm", 5, 5, "unconfirmed")
    assert mine.lab == "unconfirmed" and mine.held
