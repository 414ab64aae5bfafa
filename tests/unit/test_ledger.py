"""The client's bookkeeping: a lock stays one Grant, whichever way its name or token changes, whatever comes first."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from madsci_registry._grants import Grant, Key
from madsci_registry._ledger import Call, Ledger

ME = "instance"


def key(name: str) -> Key:
    return Key(ME, name)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def asked(ledger: Ledger, *names: str) -> Call:
    """Begin a resolve."""
    call = Call(ME, names)
    ledger.begin(call)
    return call


def answered(
    ledger: Ledger, call: Call, token: int, lab: str | None = "unconfirmed", look: Callable[[], object] = lambda: None
) -> Grant | None:
    """Take in the reply to a resolve of one name; `look` takes in lines that nobody has read."""
    (name,) = call.names
    return ledger.granted(call, name, token, lab, look)


def granted(ledger: Ledger, name: str, token: int, lab: str | None = "unconfirmed") -> Grant:
    """Resolve a name."""
    call = asked(ledger, name)
    grant = answered(ledger, call, token, lab)
    ledger.finish(call)
    assert grant is not None
    return grant


def test_token_that_grows_keeps_the_grant(ledger: Ledger) -> None:
    """A lock that the lab confirms with a higher token is the same grant, found under its name, and given back with
    the new token."""
    mine = granted(ledger, "arm", 1)
    assert (mine.lab, mine.fencing_token) == ("unconfirmed", 1)
    assert ledger.stands(key("arm"), 1, 7, "confirmed")
    assert (mine.lab, mine.place) == ("confirmed", (key("arm"), 7))
    assert ledger.find(key("arm")) is mine and granted(ledger, "arm", 7, "confirmed") is mine


def test_lines_that_overtake_the_reply_are_not_lost(ledger: Ledger) -> None:
    """Whatever lines said of a lock before the reply that grants it, in their order, is so once it is granted."""
    call = asked(ledger, "arm")
    assert ledger.stands(key("arm"), 1, 1, "confirmed")
    assert ledger.stands(key("arm"), 1, 1, "unconfirmed")
    assert ledger.stands(key("arm"), 1, 5, "confirmed")
    assert ledger.renamed(key("arm"), 5, "leg", 6)
    assert ledger.stands(key("leg"), 6, 9, "unconfirmed")
    assert ledger.conflicts(key("leg"), 9, "preferred")
    mine = answered(ledger, call, 1, None)
    assert mine is not None
    assert (mine.place, mine.lab, mine.preferred_id) == ((key("leg"), 9), "unconfirmed", "preferred")
    assert ledger.find(key("leg")) is mine and ledger.find(key("arm")) is None


def test_line_that_overtakes_a_second_reply_for_the_same_lock(ledger: Ledger) -> None:
    """A reply to a second resolve that still has the old token, or the old name, means the lock that is held."""
    mine = granted(ledger, "arm", 1)
    second, third = asked(ledger, "arm"), asked(ledger, "arm")
    ledger.stands(key("arm"), 1, 4, "confirmed")
    assert answered(ledger, second, 1, "unconfirmed") is mine
    ledger.finish(second)
    ledger.renamed(key("arm"), 4, "leg", 5)
    assert answered(ledger, third, 1, "unconfirmed") is mine
    assert ledger.held() == [mine] and (mine.place, mine.lab) == ((key("leg"), 5), "confirmed")


def test_reply_with_the_new_token_overtakes_the_line(ledger: Ledger) -> None:
    """A line that is read after the reply which has its token or name already finds the lock: it is wanted, and what
    lines say next is followed."""
    mine = granted(ledger, "arm", 7, "confirmed")
    assert ledger.stands(key("arm"), 1, 7, "confirmed")
    assert ledger.stands(key("arm"), 7, 7, "unconfirmed") and mine.lab == "unconfirmed"
    leg = granted(ledger, "leg", 9)
    assert ledger.renamed(key("arm 2"), 3, "leg", 9) and leg.held


def test_known_lock_that_has_grown_is_seen_by_a_look(ledger: Ledger) -> None:
    """A reply with a higher token than the lock that is held has the lines looked at that nobody has read: they say
    whether it is the same lock."""
    mine, call = granted(ledger, "arm", 1), asked(ledger, "arm")

    def look() -> None:
        assert ledger.stands(key("arm"), 1, 4, "confirmed")

    assert answered(ledger, call, 4, "confirmed", look) is mine and mine.held


def test_reply_that_is_older_than_a_line_does_not_undo_it(ledger: Ledger) -> None:
    """What a reply says of the lab counts for a lock that is new here; later it is lines that say how it stands."""
    mine = granted(ledger, "arm", 1)
    again = asked(ledger, "arm")
    ledger.stands(key("arm"), 1, 1, "confirmed")
    assert answered(ledger, again, 1, "unconfirmed") is mine
    assert mine.lab == "confirmed"


def test_two_calls_that_are_answered_with_one_lock_share_its_grant(ledger: Ledger) -> None:
    """Two threads that get the same lock have the same grant, also where a line made it grow in between."""
    first, second = asked(ledger, "arm"), asked(ledger, "arm")
    mine = answered(ledger, first, 1, "unconfirmed")
    ledger.finish(first)
    ledger.stands(key("arm"), 1, 3, "confirmed")
    assert mine is not None and answered(ledger, second, 1, "unconfirmed") is mine
    assert mine.held


def test_lock_that_grew_while_it_was_given_back_is_given_back_again(ledger: Ledger) -> None:
    """A line about a lock that was released here says that it is not wanted, so that its new token is released too; a
    call that asks for the name wants it."""
    mine = granted(ledger, "arm", 1)
    assert ledger.give_back(mine)
    assert not ledger.stands(key("arm"), 1, 2, "confirmed")
    ledger.drop(mine)
    assert not ledger.stands(key("arm"), 1, 2, "confirmed") and not ledger.renamed(key("arm"), 1, "leg", 2)
    call = asked(ledger, "arm")
    assert ledger.stands(key("arm"), 1, 2, "confirmed")
    ledger.finish(call)
    assert ledger.held() == []


def test_grant_given_back_is_not_handed_out_with_an_older_token(ledger: Ledger) -> None:
    """A reply with the token from before it grew, of a lock that was given back since, has the name asked for anew."""
    mine = granted(ledger, "arm", 1)
    call = asked(ledger, "arm")
    ledger.stands(key("arm"), 1, 2, "confirmed")
    ledger.give_back(mine)
    assert answered(ledger, call, 1, "unconfirmed") is None
    assert answered(ledger, call, 2, "confirmed") is None


def test_lock_that_is_just_being_released_is_not_handed_out(ledger: Ledger) -> None:
    """A resolve that begins, or is under way, while a lock is released, and is answered with that lock, asks anew."""
    mine, before = granted(ledger, "arm", 1), asked(ledger, "arm")
    ledger.give_back(mine)
    after = asked(ledger, "arm")
    ledger.drop(mine)
    assert [answered(ledger, call, 1) for call in (before, after)] == [None, None]
    assert answered(ledger, after, 2) is not None


def test_loss_after_growth_overtakes_the_reply(ledger: Ledger) -> None:
    """A lock that grew and was lost before its reply came is born lost."""
    call = asked(ledger, "arm")
    ledger.stands(key("arm"), 1, 2, "confirmed")
    ledger.lost(key("arm"), 2, "given away")
    mine = answered(ledger, call, 1, "unconfirmed")
    assert mine is not None and mine.state(is_connected=True) == "lost"
    assert ledger.held() == []


def test_lock_granted_anew_ends_the_one_before(ledger: Ledger) -> None:
    """A higher token of which no line says that it is the same lock grown is another lock: the earlier one is lost."""
    mine, call = granted(ledger, "arm", 1), asked(ledger, "arm")
    other = answered(ledger, call, 2, "confirmed")
    assert other is not mine and mine.state(is_connected=True) == "lost"
    assert ledger.held() == [other]


def test_resume_tells_what_has_grown_and_how_it_stands(ledger: Ledger) -> None:
    """At a resume a token that grew meanwhile is followed, and each lock stands as the daemon says now; one of which it
    says nothing has no lab."""
    grown, kept, lost = (granted(ledger, name, 1, "confirmed") for name in ("grown", "kept", "lost"))
    said = {(key("grown"), 3): "unconfirmed", (key("kept"), 1): None}
    ledger.renamed(key("grown"), 1, "grown", 3)
    assert ledger.unknown(said) == []
    ledger.reconcile(list(said))
    ledger.stand(said)
    assert [g.lab for g in (grown, kept)] == ["unconfirmed", "none"]
    assert (grown.fencing_token, grown.held, lost.held) == (3, True, False)


def test_nothing_is_remembered_once_nobody_asks(ledger: Ledger) -> None:
    """What replies mean is forgotten with the last call that asks for the name, and for one that goes on asking, with
    the lock."""
    open_call = asked(ledger, "arm")
    for token in range(1, 50):
        ledger.give_back(mine := granted(ledger, "arm", token))
        ledger.drop(mine)
    assert len(ledger._meant) <= 1
    ledger.finish(open_call)
    assert ledger._meant == {} and ledger.is_idle


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that are switched between as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_threads_and_lines_at_once_have_one_grant_that_follows(ledger: Ledger) -> None:
    """While lines make a lock grow, and replies with whatever token it had in between come before or after them, all
    who asked get one grant, which ends with the last token."""
    random.seed(7)
    for turn in range(100):
        name, tokens = f"arm {turn}", range(100 * turn + 1, 100 * turn + 20)
        calls = [asked(ledger, name) for _ in range(4)]
        got: list[Grant | None] = []
        lines = _Lines(ledger, name, tokens)

        def answer(call: Call, tokens: range = tokens, lines: _Lines = lines, got: list[Grant | None] = got) -> None:
            token = random.choice(tokens)
            got.append(answered(ledger, call, token, look=lambda: lines.read(token)))

        threads = [threading.Thread(target=answer, args=[call]) for call in calls]
        threads.append(threading.Thread(target=lines.read, args=[tokens[-1]]))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (mine,) = ledger.held()
        assert got == [mine] * 4 and mine.fencing_token == tokens[-1]
        for call in calls:
            ledger.finish(call)
        ledger.give_back(mine)
        ledger.drop(mine)
    assert ledger.is_idle and ledger._meant == {}


class _Lines:
    """What the daemon says of a lock that grows, read by one thread at a time."""

    def __init__(self, ledger: Ledger, name: str, tokens: range) -> None:
        self._ledger = ledger
        self._key = key(name)
        self._left = list(itertools.pairwise(tokens))
        self._reading = threading.Lock()

    def read(self, token: int) -> None:
        """Read up to the line with this token."""
        with self._reading:
            while self._left and self._left[0][1] <= token:
                assert self._ledger.stands(self._key, *self._left.pop(0), "confirmed")
