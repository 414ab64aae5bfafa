"""IdentityResolver with a lab_url where the daemon belongs to a lab itself: that one counts, nobody else is asked.

The daemon is a script (tests/scripted.py), the lab of the lab_url a stub (tests/lab_stub.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from classic import ULID, Classic, warned
from helpers import PATIENCE_S
from lab_stub import LabStub
from madsci_registry import IdentityResolver
from scripted import ScriptedDaemon

ELSEWHERE = "http://lab.example:8010"


class Scene:
    """A resolver in a thread of its own, and its daemon."""

    def __init__(self, daemon: ScriptedDaemon, classic: Classic, threads: ThreadPoolExecutor) -> None:
        self.daemon = daemon
        self.classic = classic
        self._threads = threads
        self._is_connected = False

    def begin(self, resolver: IdentityResolver, verb: str, *arguments: str) -> Future[Any]:
        """Begin a call."""
        begun = self._threads.submit(getattr(resolver, verb), *arguments)
        if not self._is_connected:
            self.daemon.welcome()
            self._is_connected = True
        return begun

    def answer(self, op: str, **answer: Any) -> None:
        """Answer the next request, which is this one."""
        request = self.daemon.request()
        assert request.body["op"] == op
        request.ok(**answer)

    def grant(self, **more: Any) -> None:
        """Answer the next request, a resolve."""
        self.daemon.request().grant(5, **more)

    def resolve_known(self, resolver: IdentityResolver, standing: dict[str, Any], **more: Any) -> Any:
        """Resolve a name that the daemon knows."""
        begun = self.begin(resolver, "resolve_with_info", "arm", "node")
        self.answer("lookup", id=ULID)
        self.grant(**more)
        self.answer("status", lab=standing)
        return begun.result(PATIENCE_S)


@pytest.fixture
def scene(registry_path: Path) -> Iterator[Scene]:
    """A registry whose daemon is a script."""
    with ExitStack() as stack:
        daemon = stack.enter_context(ScriptedDaemon(registry_path))
        classic = stack.enter_context(Classic(registry_path))
        yield Scene(daemon, classic, stack.enter_context(ThreadPoolExecutor(1)))
        for manager in classic._made:
            manager._client.timeout = 0.001  # nobody answers any more
        daemon.hang_up()


def test_name_that_is_new_is_left_to_the_daemons_lab(
    lab: LabStub, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the daemon belongs to a lab, a name that neither knows is made by it, and the lab of the lab_url hears
    nothing; that it is another lab is warned about, once."""
    resolver = scene.classic.resolver(lab.url)
    for _ in range(2):
        begun = scene.begin(resolver, "resolve_with_info", "arm", "node")
        scene.answer("lookup", id=None)
        scene.answer("status", lab={"state": "up", "url": ELSEWHERE})
        scene.grant(lab="confirmed", is_new=True)
        result = begun.result(PATIENCE_S)
        assert (result.id, result.is_new, result.source) == (ULID, True, "new")
    assert lab.requests == []
    assert warned(caplog) == (
        f"<Lab {lab.url}> is not asked: the daemon belongs to the lab at {ELSEWHERE}, and that one counts"
    )


@pytest.mark.parametrize("word", ["confirmed", "unconfirmed"])
def test_name_that_is_known_is_not_told_to_the_lab_url(
    lab: LabStub, scene: Scene, caplog: pytest.LogCaptureFixture, word: str
) -> None:
    """A lock that the daemon's lab has, or shall have, is not told to the lab of the lab_url; the ULID that the daemon
    learnt from its lab comes from the lab. A release tells it nothing either."""
    resolver = scene.classic.resolver(lab.url)
    result = scene.resolve_known(resolver, {"state": "up", "url": ELSEWHERE}, lab=word, source="lab")
    assert (result.id, result.is_new, result.source) == (ULID, False, "lab")
    begun = scene.begin(resolver, "release", "arm")
    scene.answer("release", released=True)
    begun.result(PATIENCE_S)
    assert lab.requests == [] and warned(caplog).count("is not asked") == 1


@pytest.mark.parametrize("daemons", ["http://127.0.0.1:{port}/", "HTTP://127.0.0.1:{port}"])
def test_lab_url_that_is_the_daemons_own_is_no_warning(
    lab: LabStub, scene: Scene, caplog: pytest.LogCaptureFixture, daemons: str
) -> None:
    """The same URL, with a password or another spelling, is the same lab."""
    port = lab.url.rpartition(":")[2]
    resolver = scene.classic.resolver(f"http://host:password@127.0.0.1:{port}")
    scene.resolve_known(resolver, {"state": "away", "url": daemons.format(port=port)}, lab="unconfirmed")
    assert lab.requests == [] and warned(caplog) == ""


def test_lookup_is_left_to_the_daemons_lab(lab: LabStub, scene: Scene) -> None:
    """What neither the daemon nor its lab knows is not looked up in the lab of the lab_url."""
    lab.known["arm"] = {"id": ULID}
    resolver = scene.classic.resolver(lab.url)
    begun = scene.begin(resolver, "lookup", "arm")
    scene.answer("lookup", id=None)
    scene.answer("status", lab={"state": "up", "url": ELSEWHERE})
    assert begun.result(PATIENCE_S) is None and lab.requests == []


def test_daemon_without_a_lab_leaves_it_to_the_resolver(lab: LabStub, scene: Scene) -> None:
    """Where the daemon says that it has no lab, the lab of the lab_url is asked before a ULID is made, and told."""
    lab.known["arm"] = {"id": ULID, "component_type": "node"}
    resolver = scene.classic.resolver(lab.url)
    begun = scene.begin(resolver, "resolve", "arm", "node")
    scene.answer("lookup", id=None)
    scene.answer("status", lab={"state": "off"})
    scene.answer("import", report=[["arm", "added", ""]], cursor=None)
    scene.grant(lab=None)
    assert begun.result(PATIENCE_S) == ULID
    assert [path for _, path in lab.requests] == ["/registry/resolve/arm", "/registry/entries/arm"]
