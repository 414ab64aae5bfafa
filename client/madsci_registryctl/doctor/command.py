"""`doctor`: checks host, registry and daemon, and says the fix for each finding. Starts no daemon of the registry."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from madsci_registry.errors import RegistryError
from madsci_registryctl import exits
from madsci_registryctl.invocation import Command, Invocation
from madsci_registryctl.render import print_json, printable

if TYPE_CHECKING:
    from madsci_registryctl.doctor.case import Case, Check
    from madsci_registryctl.doctor.findings import Finding

CHECK_COLUMNS = 16
"""Room for the longest name of a check: findings are shown as they come, so the widest is not known before."""
_STYLES = {
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "error": "red",
}


@click.command("doctor", cls=Command)
@click.option("--verify", "with_verify", is_flag=True,
              help="Check the whole database too; where a daemon serves, a copy of it.")  # fmt: skip
@click.option("--crash-test", "with_crash_test", is_flag=True,
              help="Kill holders and daemon of a scratch registry, and measure how locks go on.")  # fmt: skip
@click.pass_context
def doctor_command(context: click.Context, with_verify: bool, with_crash_test: bool) -> None:
    """Check this host, the registry and its daemon; say the fix for whatever is not as it should be.

    Starts no daemon and changes nothing. Exit status 11 where it found errors; warnings and notes are 0.
    """
    invocation: Invocation = context.obj
    found: list[Finding] = []
    with _unwound(), closing(findings(invocation, with_verify=with_verify, with_crash_test=with_crash_test)) as all_of:
        for finding in all_of:
            found.append(finding)
            if not invocation.as_json:
                print_finding(invocation, finding)
    _conclude(invocation, found)
    context.exit(exits.ERRORS_FOUND if any(finding.level == "error" for finding in found) else exits.OK)


def findings(invocation: Invocation, *, with_verify: bool, with_crash_test: bool) -> Generator[Finding, None, None]:
    """Yield all that was found, in the order in which it is shown."""
    from madsci_registryctl.doctor.case import run_checks, unreadable

    try:
        case = look(invocation)
    except OSError as error:
        yield unreadable("registry", error)
    else:
        yield from run_checks(_checks(), case)
        if with_verify:
            from madsci_registryctl.doctor.integrity import integrity

            invocation.say("Checking the whole database...")
            yield from run_checks({"integrity": lambda case: integrity(invocation, case)}, case)
    if with_crash_test:
        from madsci_registryctl.doctor.crash_test import crash_test

        invocation.say("Crash test, on a scratch registry of its own: a few seconds...")
        yield from crash_test()


def look(invocation: Invocation) -> Case:
    """Choose the registry and ask its daemon, if one serves, at most for the timeout."""
    from madsci_registryctl.doctor.case import Case

    endpoint = invocation.endpoint()
    try:
        with invocation.client(autostart=False) as client:
            return Case(endpoint, client.status(), client.sessions())
    except RegistryError as error:
        return Case(endpoint, error=error)


def _checks() -> Mapping[str, Check]:
    from madsci_registryctl.doctor import checks, daemon_checks, socket_checks

    return {
        "registry": checks.registry,
        "daemon": daemon_checks.daemon,
        "other daemon": socket_checks.other_daemon,
        "version": daemon_checks.versions,
        "program": daemon_checks.program,
        "degraded": daemon_checks.degraded,
        "registry.json": daemon_checks.registry_json,
        "proof of life": checks.proof,
        "clients": daemon_checks.clients,
        "socket folder": socket_checks.socket_folder,
        "sockets": socket_checks.sockets,
        "socket paths": socket_checks.socket_paths,
        "container": checks.container,
        "database": checks.database,
        "file system": checks.file_system,
        "disk space": checks.disk_space,
    }


def print_finding(invocation: Invocation, finding: Finding) -> None:
    """Print a finding on a line, its fix on the next; on a terminal with its level in colour."""
    word = f"{finding.word:<7}  "
    rest = f"{finding.check:<{CHECK_COLUMNS}}  {printable(finding.found)}"
    fix = None if finding.fix is None else f"{'':<{len(word) + CHECK_COLUMNS}}  fix: {printable(finding.fix)}"
    if sys.stdout.isatty():
        _print_styled(invocation, (word, _STYLES[finding.level]), rest, fix)
        return
    click.echo(word + rest)
    if fix is not None:
        click.echo(fix)


def _print_styled(invocation: Invocation, word: tuple[str, str], rest: str, fix: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(no_color=invocation.no_color or None, highlight=False, soft_wrap=True)
    console.print(Text.assemble(word, rest))
    if fix is not None:
        console.print(Text(fix, style="dim"))


def _conclude(invocation: Invocation, found: list[Finding]) -> None:
    from madsci_registryctl.doctor.findings import worst

    if invocation.as_json:
        print_json({"worst": worst(found), "findings": [finding.to_json() for finding in found]})
        return
    counts = {level: sum(finding.level == level for finding in found) for level in ("error", "warning", "note")}
    said = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count)
    invocation.say(f"{said or 'Nothing to do'}.")


@contextmanager
def _unwound() -> Iterator[None]:
    """Let TERM and HUP end this process by an exception, so that what a test has started is ended and removed."""

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    listened = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in listened}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
