"""Fence: what stands in front of a device and refuses older tokens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import PATIENCE_S, environment, until
from madsci_registry import BusyError, CorruptError, Fence, InvalidError, LockLostError, fence


@pytest.fixture(params=["memory", "file"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "arm.fence" if request.param == "file" else None


def test_check_of_an_older_token_is_refused(path: Path | None) -> None:
    """A token passes as often as it comes, until a higher one was seen; from then on it is lock_lost, for ever."""
    gate = Fence(path)
    assert gate.highest == 0
    for token in (5, 5, 7, 7, 9):
        gate.check(token)
    for older in (1, 5, 7, 8):
        with pytest.raises(LockLostError, match="9 was seen") as caught:
            gate.check(older)
        assert caught.value.fencing_token == older
    gate.check(9)
    assert gate.highest == 9


@pytest.mark.parametrize("bad", [0, -1, 2**53, True, None, "7", 7.0])
def test_check_of_what_is_no_token_is_invalid(path: Path | None, bad: object) -> None:
    """Only integers above 0 and below 2^53 are tokens; nothing else is let through or remembered."""
    gate = Fence(path)
    with pytest.raises(InvalidError) as caught:
        gate.check(bad)  # type: ignore[arg-type]
    assert caught.value.field == "fencing_token"
    assert gate.highest == 0


def test_file_keeps_the_highest_token_over_restarts(tmp_path: Path) -> None:
    """What one Fence has seen, the next one on the same file has seen too."""
    Fence(tmp_path / "f").check(2**53 - 1)
    with pytest.raises(LockLostError):
        Fence(tmp_path / "f").check(2**53 - 2)
    assert Fence(os.fspath(tmp_path / "f")).highest == 2**53 - 1


@pytest.mark.parametrize("content", [b"7", b"x" * 17, b"0" * 16 + b" ", b"0" * 17 + b"\n", b"0000000000000007\n\n"])
def test_file_that_holds_no_token_lets_nobody_through(tmp_path: Path, content: bytes) -> None:
    """A file with anything else in it is corrupt: it is neither overwritten nor taken for empty."""
    (tmp_path / "f").write_bytes(content)
    for look in (lambda: Fence(tmp_path / "f").check(9), lambda: Fence(tmp_path / "f").highest):
        with pytest.raises(CorruptError) as caught:
            look()
        assert caught.value.path == str(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content


def test_file_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    """A missing folder, a folder in its place and a symbolic link are refused by the system's own error."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for bad in (tmp_path / "none" / "f", tmp_path, tmp_path / "link"):
        with pytest.raises(OSError):
            Fence(bad).check(1)
    assert not (tmp_path / "elsewhere").exists()


def test_full_disk_lets_nobody_through_and_leaves_no_damage(tmp_path: Path) -> None:
    """Where the token cannot be written the caller is refused, and a later check finds the file as it was."""
    program = (
        "import resource, signal, sys; from madsci_registry import Fence\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: Fence(sys.argv[1]).check(5)\n"
        "except OSError as error: print('refused', error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "f"], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("refused"), done.stderr
    assert Fence(tmp_path / "f").highest == 0


def _show(path: Path, tokens: range, passed: list[int]) -> None:
    gate = Fence(path)
    for token in tokens:
        try:
            gate.check(token)
            passed.append(token)
        except LockLostError:
            pass


def _show_and_write(path: Path, tokens: range, out: Path) -> None:
    passed: list[int] = []
    _show(path, tokens, passed)
    out.write_bytes(pickle.dumps(passed))


def test_file_shared_by_processes_never_goes_back(tmp_path: Path) -> None:
    """Several processes that show tokens to one file at once: each sees only what is at least as high pass, and the
    highest of all stays."""
    context = multiprocessing.get_context("spawn")
    crowd = [
        context.Process(target=_show_and_write, args=(tmp_path / "f", range(1 + n, 200, 3), tmp_path / f"out{n}"))
        for n in range(3)
    ]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(PATIENCE_S)
    passed = [pickle.loads((tmp_path / f"out{n}").read_bytes()) for n in range(3)]
    assert all(tokens == sorted(tokens) for tokens in passed)
    assert Fence(tmp_path / "f").highest == 199


def test_threads_of_one_fence_in_memory_never_go_back() -> None:
    """A token that was refused in one thread is refused in all."""
    gate = Fence()
    threads = [threading.Thread(target=_try_all, args=(gate, range(1, 2000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.highest == 1999


def _try_all(gate: Fence, tokens: range) -> None:
    for token in tokens:
        with suppress(LockLostError):
            gate.check(token)


def test_process_stopped_in_the_middle_makes_the_others_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is frozen while it is at the file keeps the others out, who are told so instead of waiting for
    ever; when it goes on or dies they get through."""
    monkeypatch.setattr(fence, "LOCK_WAIT_S", 0.1)
    program = (
        "import sys, time; from madsci_registry import fence\n"
        "with fence._File(__import__('pathlib').Path(sys.argv[1])): print('in', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "f"], env=environment(), stdout=subprocess.PIPE
    ) as frozen:
        try:
            assert frozen.stdout is not None and frozen.stdout.readline() == b"in\n"
            frozen.send_signal(signal.SIGSTOP)
            with pytest.raises(BusyError, match="may be stopped"):
                Fence(tmp_path / "f").check(1)
        finally:
            frozen.kill()
    until(lambda: frozen.poll() is not None)
    Fence(tmp_path / "f").check(1)


def test_child_forked_while_a_thread_checks_is_not_kept_out_and_keeps_nobody_out(tmp_path: Path) -> None:
    """A child that is forked while another thread of its parent is at the file can check, and the parent can while the
    child lives on with all that it inherited."""
    gate, there, go_on = Fence(tmp_path / "f"), threading.Event(), threading.Event()

    def be_at_it() -> None:
        with fence._only_thread(gate._key), fence._File(tmp_path / "f"):
            there.set()
            go_on.wait(PATIENCE_S)

    thread = threading.Thread(target=be_at_it)
    thread.start()
    assert there.wait(PATIENCE_S)
    context = multiprocessing.get_context("fork")
    go_on_in_child, done = context.Event(), context.Event()

    def live_on() -> None:
        go_on_in_child.wait(PATIENCE_S)
        gate.check(5)
        done.set()
        signal.pause()

    with warnings.catch_warnings():  # forking with threads is what shall be tested
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=live_on)
        child.start()
    try:
        go_on.set()
        thread.join(PATIENCE_S)
        gate.check(4)
        go_on_in_child.set()
        assert done.wait(PATIENCE_S)
        gate.check(6)
    finally:
        child.kill()
        child.join(PATIENCE_S)


def test_check_from_a_signal_handler_in_the_middle_of_one_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that interrupts a check and checks itself is told so, and does not hang."""
    monkeypatch.setattr(fence, "LOCK_WAIT_S", 0.05)
    gate = Fence(tmp_path / "f")
    with fence._only_thread(gate._key), pytest.raises(BusyError):
        gate.check(1)
    gate.check(1)


def test_forked_child_shares_the_file_and_not_the_memory(tmp_path: Path) -> None:
    """After a fork a file goes on to be one fence for both."""
    gate = Fence(tmp_path / "f")
    gate.check(1)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=gate.check, args=(8,))
    child.start()
    child.join(PATIENCE_S)
    with pytest.raises(LockLostError):
        gate.check(7)


def test_file_of_two_names_is_one_fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fences of one process that reach one file by two names keep each other out, also after somebody else in the
    process has opened and closed the file."""
    monkeypatch.setattr(fence, "LOCK_WAIT_S", 0.05)
    Fence(tmp_path / "f").check(1)
    (tmp_path / "g").hardlink_to(tmp_path / "f")
    with fence._File(tmp_path / "f"):
        (tmp_path / "f").read_bytes()
        with pytest.raises(BusyError):
            Fence(tmp_path / "g").check(2)
    Fence(tmp_path / "g").check(2)
    assert Fence(tmp_path / "f").highest == 2
