"""The unusual ends of a holder's process: zombie, exec, the end of its first thread, a pid that comes again. Real
processes, on a daemon whose clock can be turned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import Workers
from helpers import PATIENCE_S, environment, until
from madsci_registry.protocol import RESUME_S
from madsci_registry.types import Proof
from namespaces import PidNamespace, inner_pid, need_pid_choice, need_proof
from onlooker import let_wait, token_of
from raw_client import RawProcess
from turned_clock import DAY_S, TurnedDaemon

Raw = Callable[[], RawProcess]


@pytest.mark.parametrize("daemon_is", ["up", "down"])
def test_zombie_holds_nothing(turned: TurnedDaemon, workers: Workers, daemon_is: str) -> None:
    """A killed holder that its parent has not reaped holds nothing: the waiter has the name at once, and a daemon that
    is started beside the zombie frees it without grace."""
    holder, waiter = workers(), workers()
    holder.ask("resolve", "arm")
    if daemon_is == "up":
        let_wait(waiter, turned.registry)
    else:
        turned.kill()
    killed_at = time.monotonic()
    holder.signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    if daemon_is == "up":
        assert waiter.answer()["at"] - killed_at < RESUME_S / 2
    else:
        turned.start()
        assert waiter.ask("resolve", "arm", wait=RESUME_S)["held"]
    assert ") Z " in Path(f"/proc/{holder.pid}/stat").read_text()


_BECOMES_SLEEP = (
    "import os, sys; from madsci_registry import RegistryClient; client = RegistryClient(sys.argv[1]); "
    "client.resolve('arm', 'node'); print('holds', flush=True); sys.stdin.readline(); "
    "os.execvp('sleep', ['sleep', '600'])"
)
_FIRST_THREAD_ENDS = (
    "import ctypes, sys, threading; from madsci_registry import RegistryClient; client = RegistryClient(sys.argv[1]); "
    "client.resolve('arm', 'node'); print('holds', flush=True); "
    "threading.Thread(target=sys.stdin.readline).start(); ctypes.CDLL(None).pthread_exit(None)"
)


@pytest.fixture
def program(turned: TurnedDaemon) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a client program that holds the arm and goes on when its stdin says so."""
    started: list[subprocess.Popen[bytes]] = []

    def start(text: str) -> subprocess.Popen[bytes]:
        death = "import ctypes; ctypes.CDLL(None).prctl(1, 9); "
        command = [sys.executable, "-c", death + text, str(turned.registry)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment(MADSCI_REGISTRY_AUTOSTART="0"))
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"holds\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


Program = Callable[[str], "subprocess.Popen[bytes]"]


def _tell(process: subprocess.Popen[bytes]) -> float:
    assert process.stdin
    at = time.monotonic()
    process.stdin.write(b"\n")
    process.stdin.flush()
    return at


def test_holder_that_becomes_another_program_loses_its_locks(
    turned: TurnedDaemon, program: Program, workers: Workers
) -> None:
    """A holder that calls exec takes no lock with it: its client is gone, and RESUME_S later so are its locks, while
    the process lives on under the same pid."""
    holder = program(_BECOMES_SLEEP)
    waiter = workers()
    let_wait(waiter, turned.registry)
    began = _tell(holder)
    assert waiter.answer()["at"] - began >= RESUME_S
    assert Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n"
    assert holder.poll() is None


def test_program_that_inherits_the_lifeline_over_exec_holds_on(
    turned: TurnedDaemon, raw: Raw, workers: Workers
) -> None:
    """Where the lifeline is handed on over exec on purpose, the lock lasts: same process, connection up; over a restart
    of the daemon too; its death frees at once."""
    holder = raw()
    token = holder.holds("arm")
    holder.ask("exec", keep_lifeline=True)
    until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "for the exec")
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token
    turned.restart()
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token
    waiter = workers()
    let_wait(waiter, turned.registry)
    killed_at = holder.kill()
    assert waiter.answer()["at"] - killed_at < RESUME_S / 2


def test_process_whose_first_thread_ended_lives(turned: TurnedDaemon, program: Program, workers: Workers) -> None:
    """A holder whose first thread has ended is shown as a zombie and is none: while another thread runs it keeps its
    lock, over a restart of the daemon too; it dies with its last thread."""
    holder = program(_FIRST_THREAD_ENDS)
    until(lambda: ") Z " in Path(f"/proc/{holder.pid}/stat").read_text(), "for the first thread to end")
    token = token_of(turned.registry)
    turned.restart()
    turned.pass_time(DAY_S)
    assert token_of(turned.registry) == token is not None
    waiter = workers()
    let_wait(waiter, turned.registry)
    killed_at = time.monotonic()
    holder.kill()
    assert waiter.answer()["at"] - killed_at < RESUME_S / 2


@pytest.mark.parametrize("tier", ["pidfd", "pid"])
def test_pid_that_comes_again_is_not_the_holder(registry_path: Path, workers: Workers, tier: Proof) -> None:
    """The holder dies while no daemon runs and a stranger gets its pid: the next daemon frees the name at once, and the
    stranger's life and death mean nothing to it."""
    need_pid_choice()
    need_proof(tier)
    daemon = TurnedDaemon(registry_path, tier)
    with PidNamespace() as container, ExitStack() as stack:
        stack.callback(daemon.kill)
        with container.entered():
            daemon.start()
            holder, other = workers(), workers()
        token = holder.ask("resolve", "arm")["fencing_token"]
        number = inner_pid(holder.pid)
        daemon.kill()
        holder.kill()
        container.choose_next_pid(number)
        with container.entered():
            stranger = workers()
            assert inner_pid(stranger.pid) == number
            daemon.start()
        granted = other.ask("resolve", "arm", wait=RESUME_S)
        assert granted["fencing_token"] > token
        stranger.kill()
        assert token_of(registry_path) == granted["fencing_token"]
