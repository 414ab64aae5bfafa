"""The parts of a lab, each by itself: settings, tokens, the feed, and the thread that looks for silent hosts."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers import FakeClock, until
from lab_stores import state
from madsci_registry.errors import NoSpaceError, UnavailableError
from madsci_registry_lab import registry as registry_module
from madsci_registry_lab import settings
from madsci_registry_lab.faults import Fault
from madsci_registry_lab.feed import Feed
from madsci_registry_lab.registry import LabRegistry, open_store
from madsci_registry_lab.sqlite_store import SqliteStore
from madsci_registry_lab.store import Page
from madsci_registry_lab.tokens import TokenFile, read_tokens, token_in

# settings


def test_option_goes_before_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a setting that is given in several places, the option counts, else the environment, else the file."""
    config = tmp_path / "lab.toml"
    config.write_text('listen = "127.0.0.1:1"\nstore = "sqlite:file.db"\nlog_level = "error"\n')
    monkeypatch.setenv("MADSCI_REGISTRY_LAB_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("MADSCI_REGISTRY_LAB_LOG_LEVEL", "debug")
    loaded = settings.load({"listen": "[::1]:3", "log_level": None}, config)
    assert (loaded.address, loaded.log_level, loaded.store) == (("::1", 3), "debug", "sqlite:file.db")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lissten = 1", "the nearest known one is listen"),
        ("listen = '127.0.0.1'", "HOST:PORT"),
        ("listen = '127.0.0.1:99999'", "HOST:PORT"),
        ("listen = '0.0.0.0:1'", "may be reached from other hosts"),
        ("listen = '[::]:1'", "may be reached from other hosts"),
        ("listen = 'lab.example:1'", "may be reached from other hosts"),
        ("tls_cert = '/x.pem'", "one is of no use without the other"),
        ("log_level = 'loud'", "log_level"),
        ("listen =", "is no TOML"),
    ],
)
def test_bad_setting_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """A setting that is unknown or cannot be is a fault with status 78 that says why."""
    (tmp_path / "lab.toml").write_text(text)
    with pytest.raises(Fault, match=said) as fault:
        settings.load({}, tmp_path / "lab.toml")
    assert fault.value.status == 78


def test_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is a fault that names it and the nearest setting."""
    monkeypatch.setenv("MADSCI_REGISTRY_LAB_TOKENFILE", "x")
    with pytest.raises(Fault, match="TOKENFILE; the nearest known one is token_file"):
        settings.load({}, None)


@pytest.mark.parametrize("url", ["", "sqlite:", "postgres:x", "lab.db"])
def test_store_that_there_is_not_is_refused(url: str) -> None:
    """A store setting of an unknown kind is a fault with status 78."""
    with pytest.raises(Fault, match="must be sqlite:PATH") as fault:
        open_store(url, FakeClock())
    assert fault.value.status == 78


# tokens


@pytest.mark.parametrize("line", ["lab3 short", "lab3", "lab3 SECRET-long-enough SECRET", "lab3 token-of-lab1-01234"])
def test_bad_token_file_is_refused_without_telling_it(tmp_path: Path, line: str) -> None:
    """A line that is no host with a token, or has another's, is a fault that says which line, and not what it holds."""
    path = tmp_path / "tokens"
    path.write_text(f"# all\nlab1 token-of-lab1-01234  # mine\n\n{line}\n")
    with pytest.raises(Fault, match="line 4") as fault:
        read_tokens(path)
    assert fault.value.status == 78
    assert not {"SECRET", "short", "token-of-lab1-01234"} & set(str(fault.value).split())


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"\xff\xfe"])
def test_token_file_without_tokens_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """No file, an empty one, and one that is no text, are faults: a lab is never open by mistake."""
    if content is not None:
        (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(Fault, match="token_file"):
        read_tokens(tmp_path / "tokens")


def test_token_is_found_in_either_scheme(tmp_path: Path) -> None:
    """A token is known as a bearer's and as the password of basic authentication; a host may have two; others are
    nobody's."""
    (tmp_path / "tokens").write_text("a token-1-0123456789\na token-2-0123456789\nb token-3-0123456789\n")
    tokens = read_tokens(tmp_path / "tokens")
    assert [tokens.host_of(f"token-{n}-0123456789") for n in (1, 2, 3, 4)] == ["a", "a", "b", None]
    assert token_in("Bearer abc") == "abc"
    assert token_in("basic YTpiOmM=") == "b:c"
    assert [token_in(text) for text in ("", "Basic !", "Digest x", "Basic /w==")] == [None] * 4


def test_token_file_that_has_changed_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A host that is new in the file is let in, and one that is not in it any more is not, once the file has been the
    same for two looks; a file that is none is told, and what was before goes on."""
    path = tmp_path / "tokens"
    path.write_text("a token-1-0123456789\n")
    tokens = TokenFile(path)

    def hosts() -> list[str | None]:
        return [tokens.host_of(f"token-{n}-0123456789") for n in (1, 2)]

    path.write_text("b token-2-0123456789\n")
    tokens.look()
    assert hosts() == ["a", None]
    tokens.look()
    assert hosts() == [None, "b"]
    for n, content in enumerate(("b too-short", "", None)):
        path.write_text(content) if content is not None else path.unlink()
        for _ in range(3):
            tokens.look()
        assert hosts() == [None, "b"]
        assert caplog.text.count("the tokens from before go on") == n + 1
    path.write_text("a token-1-0123456789\n")
    for _ in range(2):
        tokens.look()
    assert hosts() == ["a", None]


# the feed


class Late(SqliteStore):
    """A store in which somebody writes just after a reader has found nothing."""

    def changes(self, cursor: str | None, limit: int) -> Page:
        page = super().changes(cursor, limit)
        if cursor is not None and not page.events:
            self.resolve("a", "1", state("arm", 1), None, None)
        return page


def test_change_that_comes_just_after_the_look_is_not_slept_through(tmp_path: Path) -> None:
    """A reader that has found nothing, and is not waiting yet when a change comes, hears of it at once."""
    with closing(Late(tmp_path / "lab.db")) as late:
        feed, cursor = Feed(late), late.changes(None, 1).cursor
        page = asyncio.run(feed.changes(cursor, 10, 20.0, asyncio.sleep(60)))
    assert [event.name for event in page.events] == ["arm"]
    assert feed.waiting == 0


# the registry


def test_silent_host_is_ended_by_the_registry_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lab that runs ends the session of a host that is silent for its lease, and the feed tells it."""
    monkeypatch.setattr(registry_module, "LOOK_S", 0.005)
    clock = FakeClock()
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db", clock=clock)) as lab:
        cursor = lab.store.changes(None, 1).cursor
        lab.store.register("a", "boot-1", 15.0, "")
        looked = threading.Event()
        real = lab.store.expire

        def expire() -> int:
            ended = real()
            looked.set()
            return ended

        monkeypatch.setattr(lab.store, "expire", expire)
        for second in range(15):
            assert len(lab.store.sessions()) == 1, f"ended after {second} s"
            clock.advance(1)
            looked.clear()
            looked.wait(10)
        until(lambda: not lab.store.sessions(), "for the session to end")
        assert [(e.kind, e.host) for e in lab.store.changes(cursor, 9).events] == [
            ("registered", "a"),
            ("expired", "a"),
        ]


def test_failed_store_is_unhealthy_and_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is broken is told by the health, and is what the program ends for; a full disk is not, nor one that
    does not answer now."""
    monkeypatch.setattr(registry_module, "LOOK_S", 0.005)
    answers: list[Any] = [NoSpaceError("no space"), UnavailableError("the disk failed")]
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db")) as lab:
        looked = threading.Event()

        def expire() -> int:
            looked.set()
            raise answers[0]

        monkeypatch.setattr(lab.store, "expire", expire)
        assert looked.wait(10)
        assert lab.failed == ""
        del answers[0]
        looked.clear()
        assert looked.wait(10)
        assert lab.failed == ""  # it may answer again
        monkeypatch.setattr(type(lab.store), "broken", property(lambda _: "the disk failed"))
        until(lambda: lab.failed, "for the failure to be noticed")
        lab.store.close()
        assert lab.health()["healthy"] is False
        assert lab.identify()["service"] == "madsci-registry-lab"


def test_fault_of_the_look_for_silent_hosts_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lab that cannot look for silent hosts any more, for whatever reason, says that it is not well, and ends."""
    monkeypatch.setattr(registry_module, "LOOK_S", 0.005)
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db")) as lab:
        monkeypatch.setattr(lab.store, "expire", lambda: 1 // 0)
        until(lambda: lab.failed, "for the failure to be noticed")
        assert lab.health() == {"healthy": False, "description": lab.failed, "version": lab.version}
        assert "ZeroDivisionError" in lab.failed
