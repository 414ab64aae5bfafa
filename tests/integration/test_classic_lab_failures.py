"""A lab that fails, is silent or is none is never fatal, in bounded time; and how a lab is asked.

The lab is a stub with the documented routes (tests/lab_stub.py); the registry's daemon is a real one.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from classic import ULID, Classic, node, warned
from helpers import PATIENCE_S, DaemonProcess, until
from lab_stub import LabStub
from madsci_registry import RegistryLockError, _lab
from madsci_registry._lab import Lab
from madsci_registry.names import is_ulid


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> float:
    """Limits of a tenth, for labs that are slow; the bound that follows."""
    for name in ("CONNECT_S", "READ_S", "EXCHANGE_S"):
        monkeypatch.setattr(_lab, name, getattr(_lab, name) / 10)
    return _lab.EXCHANGE_S


WAYS = ["silent", "drip_head", "drip_body", "huge", "html", "no_ulid", "error", "redirect", "cut", "garbage"]


@pytest.mark.parametrize("way", WAYS)
def test_lab_that_fails_is_never_fatal(
    lab: LabStub, classic: Classic, quick: float, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """Whatever a lab does wrong, the name is resolved here in time, held, with a warning; the lab is not asked a second
    time, and nobody else is."""
    lab.behaviour, lab.known["arm"] = way, {"id": ULID}
    resolver, began = classic.resolver(lab.url), time.monotonic()
    result = resolver.resolve_with_info("arm", "node")
    assert time.monotonic() - began < quick + 4
    assert (result.is_new, result.source) == (True, "new") and result.id != ULID
    resolver.local_registry.refresh_lock("arm")
    assert "'arm' is resolved without the lab" in warned(caplog)
    assert lab.requests == [("GET", "/registry/resolve/arm")]


@pytest.mark.parametrize("way", ["silent", "drip_head", "error", "redirect", "cut"])
def test_lab_that_cannot_be_told_is_never_fatal(
    lab: LabStub, classic: Classic, quick: float, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """Where the lab fails after the name is held, the resolve is what it was, in time, with a warning."""
    resolver = classic.resolver(lab.url)
    id = resolver.local_registry.resolve("arm", "node", acquire_lock=False)
    lab.behaviour, began = way, time.monotonic()
    assert resolver.resolve("arm", "node") == id
    assert time.monotonic() - began < quick + 4
    assert "the lab was not told of 'arm'" in warned(caplog)
    lab.behaviour = ""
    assert resolver.resolve("arm", "node") == id and [name for name, _ in lab.entries] == ["arm"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1",
        "http://name.invalid",
        "http://",
        "ftp://127.0.0.1",
        "nothing",
        "http://127.0.0.1:port",
        "http://a b/",
        "https://127.0.0.1:1/x",
    ],
)
def test_lab_that_there_is_not_is_never_fatal(classic: Classic, caplog: pytest.LogCaptureFixture, url: str) -> None:
    """A lab_url where nobody is, or that is none, is a warning."""
    resolver = classic.resolver(url)
    assert is_ulid(resolver.resolve("arm", "node"))
    assert "'arm' is resolved without the lab" in warned(caplog)
    assert resolver.lookup("nobody") is None and "'nobody' is looked up without the lab" in warned(caplog)


def test_without_httpx_the_lab_is_away(
    lab: LabStub, classic: Classic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of the thread that asks, such as a library that is missing, is a lab that is away: told at once."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    resolver, began = classic.resolver(lab.url), time.monotonic()
    assert is_ulid(resolver.resolve("arm", "node"))
    assert time.monotonic() - began < _lab.EXCHANGE_S - 1
    assert "ModuleNotFoundError" in warned(caplog)


def test_password_of_a_lab_url_is_sent_but_not_logged(
    lab: LabStub, classic: Classic, caplog: pytest.LogCaptureFixture
) -> None:
    """What a lab_url holds before its @ goes to the lab as basic authentication, and into no log."""
    caplog.set_level(logging.DEBUG)
    lab.behaviour = "error"
    resolver = classic.resolver(lab.url.replace("//", "//me:secret@"))
    resolver.resolve("arm", "node")
    assert lab.headers[0]["Authorization"].startswith("Basic ")
    assert "127.0.0.1" in warned(caplog)
    assert "secret" not in caplog.text + repr(resolver) + repr(resolver.lab_client)


def test_bare_lab_manager_is_no_lab_registry(classic: Classic, caplog: pytest.LogCaptureFixture) -> None:
    """A 404 without the header of a lab registry does not mean that the name is absent: the name is resolved without
    the lab, with a warning, and nothing is sent there."""
    with LabStub(marked=False) as bare:
        resolver = classic.resolver(bare.url)
        assert is_ulid(resolver.resolve("arm", "node"))
        assert "it does not say that it is a lab registry" in warned(caplog)
        assert [method for method, _ in bare.requests] == ["GET"]
        assert resolver.lookup("nobody") is None
        with pytest.raises(Exception, match="does not say"):
            Lab(bare.url).find("nobody")


def test_slow_lab_does_not_take_the_time_of_a_waiter(lab: LabStub, classic: Classic, quick: float) -> None:
    """A lab that is silent does not turn a resolve that may wait into one that may not, nor the other way round."""
    lab.behaviour = "silent"
    holder = classic.manager()
    resolver, lasting = classic.resolver(lab.url), quick
    lab.before_answer = lambda: None
    assert resolver.resolve("arm", "node", retry_timeout=lasting / 2)
    resolver.release("arm")
    holder.resolve("arm", "node")
    began = time.monotonic()
    with pytest.raises(RegistryLockError) as refused:
        classic.resolver(lab.url).resolve("arm", "node", retry_timeout=0.3)
    assert refused.value.code == "held" and 0.3 <= time.monotonic() - began < 4


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_no_proxy_of_the_environment_is_asked(
    lab: LabStub, classic: Classic, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """The lab is asked by itself: a proxy in the environment hears nothing, and neither .netrc nor cookies are sent."""
    with LabStub() as other:
        monkeypatch.setenv(proxy, other.url)
        lab.known["arm"] = {"id": ULID}
        assert classic.resolver(lab.url).resolve("arm", "node") == ULID
        assert other.requests == []
    sent = {key.lower() for headers in lab.headers for key in headers}
    assert not sent & {"authorization", "cookie", "proxy-authorization"}


def test_frozen_daemon_and_silent_lab_end_in_time(lab: LabStub, daemon: DaemonProcess) -> None:
    """Where the daemon does not answer, the lab is not asked, and the node ends as it would without a lab."""
    daemon.signal(signal.SIGSTOP)
    try:
        lab.behaviour = "silent"
        with node("0.5", lab.url, registry=daemon.registry) as process:
            output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1 and "RegistryLock" in errors
        code, took_s = output.split()
        assert code == "timeout" and float(took_s) < 5.5
        assert lab.requests == []
    finally:
        daemon.signal(signal.SIGCONT)


# the lab's own thread


def threads() -> int:
    """Count all threads of this process: those of the stub end with their connections."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_one_thread_asks_and_ends_with_its_lab(lab: LabStub) -> None:
    """A Lab asks by one thread, made at the first question, which ends when the Lab is collected."""
    before = threads()
    mine = Lab(lab.url)
    assert threads() == before
    for name in ("a", "b"):
        assert mine.find(name) is None
    until(lambda: threads() == before + 1, "for the stub's threads to end")
    del mine
    until(lambda: threads() == before, "for the thread to end")


def test_lab_that_was_silent_is_asked_anew(lab: LabStub, quick: float) -> None:
    """After a question that was given up the next one is asked at once; the old thread ends when it can."""
    mine, lab.behaviour = Lab(lab.url), "silent"
    with pytest.raises(Exception, match=r"ReadTimeout|did not answer"):
        mine.find("a")
    lab.behaviour = ""
    assert mine.find("a") is None


def test_without_room_for_a_thread_the_lab_is_away(
    lab: LabStub, classic: Classic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no thread can be started, as at the end of the interpreter, the name is resolved without the lab."""
    resolver = classic.resolver(lab.url)
    resolver.local_registry.lookup("arm")  # what the client itself needs is there

    monkeypatch.setattr(_lab, "start_thread", lambda *_: False)
    assert is_ulid(resolver.resolve("arm", "node"))
    assert "no thread could be started" in warned(caplog)


def test_lab_client_is_made_once_and_only_with_a_url(lab: LabStub, classic: Classic) -> None:
    """lab_client is None without a lab_url, else the same object every time."""
    resolver: Any = classic.resolver(lab.url)
    assert resolver.lab_client is resolver.lab_client is not None
    assert classic.resolver().lab_client is None
    assert classic.resolver("").lab_client is None
