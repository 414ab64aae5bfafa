"""The socket of requests where several users come: a real ROUTER and real DEALERs, a clock to turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from helpers import FakeClock, until
from madsci_registry.types import Process
from madsci_registryd.admission import Admission
from madsci_registryd.locks import Identity, Session
from madsci_registryd.quotas import Limits, Quotas
from madsci_registryd.server import (
    FRAME_OF_A_USER_BYTES,
    FRAMES_A_TURN,
    STRANGER,
    STRANGERS_BYTES,
    STRANGERS_REQUESTS,
    TURN_BYTES,
    Server,
)
from madsci_registryd.sockets import ListeningPath

ALICE, BOB = 1001, 1002


class Peers:
    """A server that lets in everyone, and users who send to it; each request says whose it is."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        clock = FakeClock()
        path = ListeningPath(folder / "run" / "x.sock", owns_folder=True)
        self.server = Server(path, Admission("everyone", frozenset(), 0, 0), Quotas(limits, clock), clock)
        self.server.session_of = self._session_of
        self.server.bind()
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self.served: list[dict[str, Any]] = []
        self._address = f"ipc://{path.path}"

    def dealer(self, uid: int | None) -> zmq.Socket[bytes]:
        """Return a socket of a user, connected; None: of one who has no session."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(self._address)
        self._sockets.append(dealer)
        self.send(dealer, uid, "hello")
        assert self.answers(dealer, 1) == [{"ok": "hello"}]
        self.served.clear()
        return dealer

    def send(self, dealer: zmq.Socket[bytes], uid: int | None, what: str) -> None:
        dealer.send_multipart([b"", json.dumps({"uid": uid, "what": what}).encode()])

    def drain(self) -> None:
        self.server.wake(0)
        self.server.drain(self._handle)

    def drain_until(self, condition: Callable[[], object]) -> None:
        def look() -> object:
            self.drain()
            return condition()

        until(look)

    def _handle(self, body: bytes, answer: Callable[[dict[str, Any]], None]) -> None:
        request = json.loads(body)
        self.served.append(request)
        answer({"ok": request["what"]})

    def _session_of(self, body: bytes) -> Session | None:
        uid = json.loads(body)["uid"]
        if uid is None:
            return None
        process = Process(pid=1, uid=uid, gid=uid, proof="pidfd")
        return Session(str(uid), b"", process, Identity(1, 1, 1, "boot", 1), "", is_admin=uid == 0)

    def answers(self, dealer: zmq.Socket[bytes], count: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def look() -> bool:
            while dealer.poll(0):
                found.append(json.loads(dealer.recv_multipart()[-1]))
            return len(found) >= count

        self.drain_until(look)
        return found

    def close(self) -> None:
        for dealer in self._sockets:
            dealer.close()
        self._context.term()
        self.server.close()


@pytest.fixture
def make_peers(tmp_path: Path) -> Iterator[Callable[..., Peers]]:
    made: list[Peers] = []

    def make(**limits: int) -> Peers:
        made.append(Peers(tmp_path, Limits()._replace(**limits)))
        return made[-1]

    yield make
    for peers in made:
        peers.close()


def test_users_are_served_in_turn_however_much_one_has_sent(make_peers: Callable[..., Peers]) -> None:
    """A request of one user is done after one of another user's at most, though that one has sent a hundred before."""
    peers = make_peers()
    alice, bob = [peers.dealer(ALICE) for _ in range(4)], peers.dealer(BOB)
    peers.server.is_busy = lambda uid: True  # all is read, nothing done
    for n in range(100):
        peers.send(alice[n % 4], ALICE, f"a{n}")
    queue = peers.server._queue
    peers.drain_until(lambda: queue.waiting(ALICE) == 100)
    peers.send(bob, BOB, "b")
    peers.drain_until(lambda: queue.waiting(BOB) == 1)
    assert peers.served == []
    peers.server.is_busy = lambda uid: False
    peers.drain_until(lambda: len(peers.served) >= 101)
    assert [request["what"] for request in peers.served].index("b") <= 1


def test_turn_ends_after_some_requests_though_more_wait(make_peers: Callable[..., Peers]) -> None:
    """However much waits, a turn is short, so that deaths are seen; and the loop does not sleep while some is left."""
    peers = make_peers()
    alice = peers.dealer(ALICE)
    peers.server.is_busy = lambda uid: True
    for n in range(60):
        peers.send(alice, ALICE, f"a{n}")
    peers.drain_until(lambda: peers.server._queue.waiting(ALICE) == 60)
    assert not peers.server.has_input()  # who may not have a turn is nothing to wake up for
    peers.server.is_busy = lambda uid: False
    peers.drain()
    assert 0 < len(peers.served) < 60
    assert peers.server.has_input()


@pytest.mark.parametrize(("what", "limit", "kept"), [("requests", 3, 3), ("bytes", 40, 2)])
def test_more_than_a_user_may_have_waiting_is_refused(
    make_peers: Callable[..., Peers], what: str, limit: int, kept: int
) -> None:
    """Requests beyond what may wait for one user are answered `quota` at once, and another user's are taken."""
    peers = make_peers(**{what: limit})
    alice, bob = peers.dealer(ALICE), peers.dealer(BOB)
    peers.server.is_busy = lambda uid: True
    for n in range(5):
        peers.send(alice, ALICE, f"a{n}")  # 27 bytes
    refused = [answer["error"] for answer in peers.answers(alice, 5 - kept)]
    assert {(error["code"], error["what"], error["limit"]) for error in refused} == {("quota", what, limit)}
    peers.send(bob, BOB, "b")
    peers.drain_until(lambda: peers.server._queue.waiting(BOB) == 1)
    assert peers.server._queue.waiting(ALICE) == kept


def test_requests_of_no_session_share_one_turn_and_are_few(
    make_peers: Callable[..., Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends requests without a session's token gets one turn with all such others, and of many or large requests
    the answer at once that there is no session."""
    peers = make_peers()
    strangers = [peers.dealer(None) for _ in range(2)]
    with monkeypatch.context() as nothing_is_done:
        nothing_is_done.setattr("madsci_registryd.server.FAIR_FRAMES_A_TURN", 0)
        for n in range(STRANGERS_REQUESTS):
            peers.send(strangers[n % 2], None, "few")
        peers.drain_until(lambda: peers.server._queue.waiting(STRANGER) == STRANGERS_REQUESTS)
        peers.send(strangers[0], None, "one more")
        peers.send(strangers[1], None, "x" * STRANGERS_BYTES)
        for stranger in strangers:
            assert [answer["error"]["code"] for answer in peers.answers(stranger, 1)] == ["session_required"]
    peers.drain_until(lambda: len(peers.served) == STRANGERS_REQUESTS)


def test_large_requests_are_for_administrators(make_peers: Callable[..., Peers]) -> None:
    """Where several users may come, a request that takes long is refused, but for administrators."""
    peers = make_peers()
    alice, root = peers.dealer(ALICE), peers.dealer(0)
    for dealer, uid in ((alice, ALICE), (root, 0)):
        peers.send(dealer, uid, "x" * FRAME_OF_A_USER_BYTES)
    assert [answer["error"]["code"] for answer in peers.answers(alice, 1)] == ["too_large"]
    assert "ok" in peers.answers(root, 1)[0]


def test_turn_ends_after_so_many_bytes(make_peers: Callable[..., Peers]) -> None:
    """Large requests are done in several turns, though there were time for more of them."""
    peers = make_peers()
    alice = peers.dealer(ALICE)
    peers.server.is_busy = lambda uid: True
    for _ in range(8):
        peers.send(alice, ALICE, "x" * (TURN_BYTES // 4))
    peers.drain_until(lambda: peers.server._queue.waiting(ALICE) == 8)
    peers.server.is_busy = lambda uid: False
    peers.drain()
    assert len(peers.served) <= 4


def test_message_of_too_many_frames_is_read_on_over_several_turns(
    make_peers: Callable[..., Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message of very many frames is dropped without keeping the others waiting, and the next one is read."""
    peers = make_peers()
    alice, bob = peers.dealer(ALICE), peers.dealer(BOB)
    monkeypatch.setattr("madsci_registryd.server.READING_S", 0.0)  # one read a turn
    alice.send_multipart([b""] * (20 * FRAMES_A_TURN))
    peers.drain_until(lambda: peers.server._is_skipping)
    peers.send(bob, BOB, "b")
    peers.send(alice, ALICE, "a")
    peers.drain_until(lambda: {request["what"] for request in peers.served} == {"a", "b"})
