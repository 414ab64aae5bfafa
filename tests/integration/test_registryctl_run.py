"""registryctl run: a command that runs while a name is held."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Workers
from ctl import Ctl
from helpers import PATIENCE_S, DaemonProcess
from madsci_registryctl import exits

READY_THEN_SLEEP = "echo $$; exec sleep 1000"


@pytest.fixture
def ctl(daemon: DaemonProcess) -> Ctl:
    """Registryctl on a registry with a daemon."""
    return Ctl(daemon.registry)


class Running:
    """A `registryctl run` whose command has said its pid."""

    def __init__(self, ctl: Ctl, script: str = READY_THEN_SLEEP, *options: str) -> None:
        self.process = ctl.start("run", "a", "--type", "node", *options, "--", "sh", "-c", script)
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.child_pid = int(line)
        self.child = os.pidfd_open(self.child_pid)

    def child_ends(self) -> bool:
        """Tell whether the command ends soon."""
        return bool(select.select([self.child], [], [], PATIENCE_S)[0])

    def end(self) -> None:
        """Kill both, if they still run."""
        try:
            signal.pidfd_send_signal(self.child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.close(self.child)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def running(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A command that holds the name `a`; its registryctl starts no daemon where the test ends one."""
    with monkeypatch.context() as patch:
        patch.setenv("MADSCI_REGISTRY_AUTOSTART", "0")
        made = Running(ctl)
    yield made
    made.end()


def test_run_command_sees_its_identity(ctl: Ctl) -> None:
    """CMD sees its ULID, its name and its fencing token, and the name is held while it runs, free after."""
    script = 'echo "$MADSCI_COMPONENT_ID|$MADSCI_COMPONENT_NAME|$MADSCI_FENCING_TOKEN"; exec "$@" --json show "an arm"'
    done = ctl("run", "an arm", "--type", "node", "--", "sh", "-c", script, "sh", *ctl.words())
    line, _, shown = done.partition("\n")
    ulid, name, token = line.split("|")
    assert name == "an arm"
    assert ulid == ctl("lookup", "an arm").strip()
    assert f'"fencing_token": {token},' in shown
    assert ctl.json("show", "an arm")["state"] == "free"


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_run_hands_on_the_exit_status(ctl: Ctl, script: str, status: int) -> None:
    """The exit status is the command's own, 128 + n where signal n ended it."""
    ctl("run", "a", "--type", "node", "--", "sh", "-c", script, status=status)


def test_run_command_reads_and_writes_our_streams(ctl: Ctl) -> None:
    """The command has registryctl's own stdin and stdout, and its options are its own."""
    assert (
        ctl("run", "a", "--type", "node", "--", "sh", "-c", "cat; echo $1", "sh", "--json", stdin="in\n")
        == "in\n--json\n"
    )


def test_run_held_name_command_not_started(ctl: Ctl, workers: Workers, tmp_path: Path) -> None:
    """Where the lock is not got the command is not started: exit status 125, and who holds the name."""
    worker = workers()
    worker.ask("resolve", "a")
    command = ["run", "a", "--type", "node", "--wait", "0.05", "--", "touch", str(tmp_path / "ran")]
    error = ctl.error(*command, status=exits.LOCK_NOT_GOT)
    assert (error["code"], error["holder"]["pid"]) == ("held", worker.pid)
    assert str(worker.pid) in ctl.run(*command, status=exits.LOCK_NOT_GOT).stderr
    ctl("run", "a", "--type", "module", "--", "touch", tmp_path / "ran", status=exits.LOCK_NOT_GOT)
    assert not (tmp_path / "ran").exists()


def test_run_waits_for_a_held_name(ctl: Ctl, running: Running) -> None:
    """Run --wait inf begins when the holder has ended."""
    second = ctl.start("run", "a", "--type", "node", "--wait", "inf", "--", "echo", "mine")
    assert second.stdout
    while not ctl.json("show", "a")["waiting"]:
        assert second.poll() is None
    running.process.kill()
    assert second.communicate(timeout=PATIENCE_S)[0] == "mine\n"
    assert second.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_run_forwards_signals(ctl: Ctl, running: Running, number: signal.Signals) -> None:
    """A signal that would end registryctl ends the command, and the status says so; the name is free after."""
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE_S) == 128 + number
    assert running.child_ends()
    assert ctl.json("show", "a")["state"] == "free"


def test_run_forwards_user_signals_while_the_command_lives(ctl: Ctl) -> None:
    """USR1 and USR2 reach the command, which goes on; its own status counts."""
    script = "trap 'echo one' USR1; trap 'exit 5' USR2; echo $$; while :; do sleep 0.05; done"
    running = Running(ctl, script)
    try:
        assert running.process.stdout
        running.process.send_signal(signal.SIGUSR1)
        assert running.process.stdout.readline() == "one\n"
        running.process.send_signal(signal.SIGUSR2)
        assert running.process.wait(PATIENCE_S) == 5
    finally:
        running.end()


def test_run_lock_lost_ends_the_command(ctl: Ctl, running: Running) -> None:
    """When an operator breaks the lock the command gets TERM and the status is 123."""
    ctl("release", "a", "--force", "-y")
    assert running.process.wait(PATIENCE_S) == exits.LOCK_LOST
    assert running.child_ends()


def test_run_lock_lost_kills_after_the_grace(ctl: Ctl) -> None:
    """A command that ignores TERM is killed when the grace has passed."""
    running = Running(ctl, "trap '' TERM; echo $$; exec sleep 1000", "--grace", "0.1")
    try:
        ctl("release", "a", "--force", "-y")
        assert running.process.wait(PATIENCE_S) == exits.LOCK_LOST
        assert running.child_ends()
    finally:
        running.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_run_registryctl_dies_command_is_killed(ctl: Ctl, running: Running, number: signal.Signals) -> None:
    """If registryctl dies by any means the kernel kills the command, and the name is free."""
    running.process.send_signal(number)
    assert running.child_ends()
    ctl("run", "a", "--type", "node", "--wait", "20", "--", "true")


def test_run_daemon_killed_command_goes_on(ctl: Ctl, daemon: DaemonProcess, running: Running) -> None:
    """A daemon that is killed and started again takes nothing from a running command; breaking is told after it."""
    daemon.restart()
    while not any(s["attached"] and s["held"] for s in ctl.json("sessions")):
        assert running.process.poll() is None
    ctl("run", "a", "--type", "node", "--", "true", status=exits.LOCK_NOT_GOT)
    ctl("release", "a", "--force", "-y")
    assert running.process.wait(PATIENCE_S) == exits.LOCK_LOST


def test_run_bad_command_as_shells_say(ctl: Ctl, tmp_path: Path) -> None:
    """A command that is not there is 127, one that cannot be run 126; no name is made for it."""
    plain = tmp_path / "plain"
    plain.write_text("no program")
    ctl("run", "a", "--type", "node", "--", "no-such-command-here", status=exits.COMMAND_NOT_FOUND)
    ctl("run", "a", "--type", "node", "--", plain, status=exits.NOT_EXECUTABLE)
    assert ctl.json("list") == []
    plain.chmod(0o755)
    ctl("run", "a", "--type", "node", "--", plain, status=exits.NOT_EXECUTABLE)
    plain.write_text("#!/no/such/interpreter\n")
    ctl("run", "a", "--type", "node", "--", plain, status=exits.COMMAND_NOT_FOUND)
    assert ctl.json("show", "a")["state"] == "free"


def test_run_terminal_interrupt_reaches_the_command_once(ctl: Ctl) -> None:
    """Ctrl-C on the terminal reaches the command once, not once more from registryctl."""
    script = "trap 'echo got' INT; trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    words = ctl.words("run", "a", "--type", "node", "--", "sh", "-c", script)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    try:
        said = _read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        said = _read_until(terminal, b"got")
        os.kill(pid, signal.SIGTERM)
        said += _read_until(terminal, b"")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        assert said.count(b"got") == 1
    finally:
        os.close(terminal)


def _read_until(terminal: int, word: bytes) -> bytes:
    """Read what the terminal shows up to a word; an empty word: to the end."""
    said = b""
    while not word or word not in said:
        assert select.select([terminal], [], [], PATIENCE_S)[0], said
        try:
            said += os.read(terminal, 4096)
        except OSError:  # all that had it open have ended
            assert not word, said
            return said
    return said


def test_run_interrupt_while_waiting_withdraws(ctl: Ctl, running: Running) -> None:
    """Ctrl-C while waiting for the name ends registryctl with 130 and leaves no waiter behind."""
    second = ctl.start("run", "a", "--type", "node", "--wait", "inf", "--", "true")
    while not ctl.json("show", "a")["waiting"]:
        assert second.poll() is None
    second.send_signal(signal.SIGINT)
    _, talk = second.communicate(timeout=PATIENCE_S)
    assert (second.returncode, talk.strip()) == (exits.INTERRUPTED, "")
    while ctl.json("show", "a")["waiting"]:
        assert running.process.poll() is None


def test_run_without_type_is_usage(ctl: Ctl) -> None:
    """Run needs a name, a type and a command: else exit status 2, and nothing is made."""
    for words in (
        ["run", "a", "--", "true"],
        ["run", "a", "--type", "node"],
        ["run", "a", "--type", "x", "--", "true"],
    ):
        ctl(*words, status=exits.USAGE)
    ctl("run", "a", "--type", "node", "--wait", "nan", "--", "true", status=exits.USAGE)
    assert ctl.json("list") == []


def test_run_in_a_process_that_ignores_signals_for_nohup(ctl: Ctl) -> None:
    """A HUP that registryctl was started to ignore (nohup) stays ignored by it and by the command."""
    script = "echo $$; kill -HUP $PPID; kill -HUP $$; exit 4"
    words = ctl.words("run", "a", "--type", "node", "--", "sh", "-c", script)
    done = subprocess.run(["nohup", *words], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 4
