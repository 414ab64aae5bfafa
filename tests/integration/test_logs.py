"""Logs of a real daemon: what is in them, what never is, and on a real systemd what the journal has of them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from conftest import Workers
from ctl import Ctl
from helpers import PATIENCE_S, DaemonProcess, accepts, environment, until
from madsci_registryd.messages import MESSAGES
from raw_client import RawClient
from sandbox import PREFIX, Sandbox
from turned_clock import TurnedDaemon

_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=[A-Z]+ pid=\d+ at=madsci_registryd\.\w+ (?:id=(\w+) )?(.+)"
)
HOSTILE = (
    "why\nMESSAGE_ID=00000000000000000000000000000000\n2026-01-01T00:00:00.000Z level=INFO pid=1 at=x id=stopped y"
)


def test_start_and_stop_are_logged_under_their_names(daemon: DaemonProcess) -> None:
    """A daemon that starts and ends in order says `started` and `stopped`, a line each."""
    until(lambda: "id=started" in daemon.log, "for the daemon to say so")
    assert daemon.terminate() == 0
    lines = [_LINE.fullmatch(line) for line in daemon.log.splitlines()]
    assert [line and line[1] for line in lines] == ["started", "stopped"]
    assert lines[0] and lines[0][2].startswith(f"serving registry={daemon.registry} ")


def test_no_log_holds_a_token(registry_path: Path) -> None:
    """The secret of a session is in no line of a log, at any level, whatever its client does wrong with it."""
    turned = TurnedDaemon(registry_path)
    turned.options = (*turned.options, "--log-level", "debug")
    with turned as daemon:
        client = RawClient(daemon.socket)
        welcome = client.hello()
        assert welcome is not None
        token = welcome["token"]
        assert len(token) == 64
        client.resolve("arm")
        client.request_of("resolve", name=7, component_type="node", instance=token)
        client.request_of("no such verb")
        client.request_of("get", name=token)
        for line in (
            {"op": "resume", "token": token, "client": "twice"},
            {"op": "resume", "token": token, "no_such_field": token},
            {"op": "resume", "token": [token]},
            {"op": "no such line", "token": token},
        ):
            turned.pass_time(61)  # one refusal of a kind is logged each minute
            other = RawClient(daemon.socket)
            other.say(line)
            other.heard()
            other.close()
        turned.pass_time(61)
        stranger = RawClient(daemon.socket)
        stranger.stream.sendall(b'{"op": "resume", "token": "' + token.encode() + b"\n")
        stranger.heard()
        stranger.close()
        client.close()
        until(lambda: daemon.log.count(" refused a line: ") == 4, "for the refusals")
        assert daemon.terminate() == 0
        assert token not in daemon.log


def test_reason_with_newlines_fakes_no_line(daemon: DaemonProcess, workers: Workers) -> None:
    """Who breaks a lock, and why, is one line of the log, whatever the reason holds."""
    workers().ask("resolve", "arm")
    Ctl(daemon.registry)("-y", "release", "arm", "--force", "--reason", HOSTILE)
    found = [_LINE.fullmatch(line) for line in daemon.log.splitlines()]
    broken = [line[2] for line in found if line and line[1] == "lock_broken"]
    assert len(broken) == 1
    assert broken[0].startswith("the lock of 'arm' was broken by uid 0 ") and "why\\nMESSAGE_ID=" in broken[0]
    assert [line and line[1] for line in found] == ["started", "lock_broken"]


def test_refused_start_is_said_to_people_as_before(daemon: DaemonProcess) -> None:
    """Where no journal reads stderr, a start that is refused says so in one plain line."""
    done = subprocess.run(
        daemon.command(), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 69
    assert done.stderr == f"madsci-registryd: pid {daemon.pid} serves this registry already\n"


def test_journal_stream_of_another_process_changes_nothing(registry_path: Path) -> None:
    """A daemon whose stderr is not what $JOURNAL_STREAM names logs to stderr."""
    daemon = DaemonProcess(registry_path)
    done = subprocess.Popen(
        daemon.command(), env=environment(JOURNAL_STREAM="1:1"), stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        until(lambda: accepts(daemon.lifeline), "for the daemon to serve")
        assert done.stderr is not None
        assert " id=started serving " in done.stderr.readline()
    finally:
        done.terminate()
        done.communicate(timeout=PATIENCE_S)


def entries(sandbox: Sandbox, *match: str) -> list[dict[str, Any]]:
    """Return what the journal has that matches, oldest first."""
    out = sandbox.run("journalctl", "--no-pager", "--all", "--output=json", *match, status=None).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_journal_has_rare_messages_by_their_ids(sandbox: Sandbox) -> None:
    """Under a real systemd: entries have id, priority, registry and facts; a hostile reason stays in its field; a
    refused start is an entry; and a line of Python's own is in the journal too."""
    registry = Path("/srv/lab/registry.json")
    program = [str(PREFIX / "bin" / "python"), "-m", "madsci_registryd"]
    sandbox.run("mkdir", "-p", str(registry.parent))
    sandbox.run("systemd-run", "--unit=lab", "--service-type=notify", *program, "--registry", registry)
    worker = sandbox.worker(registry)
    with worker:
        worker.ask("resolve", "arm")
        sandbox.registryctl("--registry", registry, "-y", "release", "arm", "--force", "--reason", HOSTILE)
        sandbox.run("rm", str(registry.parent / "run" / "registry.sock"))
        made_again = f"MESSAGE_ID={MESSAGES['socket_made_again'].id}"
        until(lambda: entries(sandbox, made_again), "for the socket to be made again")
    sandbox.run("systemd-run", "--unit=second", "--wait", *program, "--registry", registry, status=69)
    sandbox.run("systemctl", "stop", "lab")

    def only(name: str) -> dict[str, Any]:
        found = entries(sandbox, f"MESSAGE_ID={MESSAGES[name].id}")
        assert len(found) == 1, found
        assert found[0]["MADSCI_MESSAGE"] == name
        assert found[0]["MADSCI_REGISTRY"] == str(registry)
        assert found[0]["SYSLOG_IDENTIFIER"] == "madsci-registryd"
        return found[0]

    assert only("started")["PRIORITY"] == "6"
    broken = only("lock_broken")
    assert (broken["PRIORITY"], broken["MADSCI_NAME"], broken["MADSCI_UID"]) == ("4", "arm", "0")
    assert broken["MESSAGE"].endswith(HOSTILE.replace("\n", "\\n"))
    assert broken["_SYSTEMD_UNIT"] == "lab.service"
    assert only("socket_made_again")["MADSCI_PATH"] == str(registry.parent / "run" / "registry.sock")
    refused = only("not_started")
    assert (refused["MADSCI_STATUS"], refused["PRIORITY"]) == ("69", "2")
    assert only("stopped")["MESSAGE"] == "stopping: SIGTERM"
    assert entries(sandbox, "MESSAGE_ID=00000000000000000000000000000000") == []
