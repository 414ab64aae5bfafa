"""`service`: installs the daemon as a service of systemd, takes it away again, and shows its log."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from madsci_registry.errors import UnsupportedError
from madsci_registryctl.invocation import Command, Invocation, with_globals
from madsci_registryctl.render import print_json

if TYPE_CHECKING:
    from madsci_registryctl.service.plan import Plan, Scope, Service
    from madsci_registryctl.service.work import Report

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

OWN_VENV = "/opt/madsci-registryd"
"""Where `make install`, and the documentation, put the program of a system's service."""


def _with_service_options(function: _Decorated) -> _Decorated:
    folder = click.option("--folder", type=click.Path(path_type=Path), metavar="DIR",
                          help="The service of this .madsci folder.")  # fmt: skip
    system = click.option("--system", "scope", flag_value="system", help="Of this host; needs root.")
    user = click.option("--user", "scope", flag_value="user", help="Of your own user, without root.")
    return user(system(folder(function)))


@click.group("service", short_help="Install the daemon as a service of systemd.")
@with_globals(hidden=True)
def service_command() -> None:
    """Run the daemon as a service of systemd: after each boot, and again whenever it ends.

    Of your own user (--user, the default): the registry that `registryctl where` names, or that of --folder. Of this
    host (--system): one registry for all its programs, or with --folder that of a .madsci folder, run as its owner.
    """


@service_command.command("install", cls=Command)
@_with_service_options
@click.option("--socket-activation", is_flag=True,
              help="systemd holds the sockets: no client is refused while it starts. --system only.")  # fmt: skip
@click.option("--print", "only_print", is_flag=True, help="Print the files and commands; write and run nothing.")
@click.pass_obj
def install_command(
    invocation: Invocation, scope: Scope | None, folder: Path | None, socket_activation: bool, only_print: bool
) -> None:
    """Write the units, enable and start them; say each file that is written.

    May be repeated: what is as it should be is left, and a service that is older than its program is started anew
    (locks stay). A file that a person has changed is kept.
    """
    from madsci_registryctl.service import choice, reach, systemd
    from madsci_registryctl.service.plan import installation
    from madsci_registryctl.service.work import Report, install

    service = choice.chosen(invocation, scope, folder)
    if service.folder is not None:
        choice.check_folder(service.folder)
    if socket_activation and service.folder is not None:
        raise click.UsageError("--socket-activation is for the system's registry: --system without --folder.")
    program = reach.program()
    owner = choice.owner_of(service.folder) if service.folder is not None and service.scope == "system" else None
    plan = installation(service, program.parent, owner=owner, socket_activation=socket_activation)
    refusal = _refusal(program) if service.scope == "system" else None
    if only_print:
        _print_plan(invocation, service, plan)
        if refusal is not None:
            invocation.say(f"registryctl: without --print it is refused: {refusal.message}")
        return
    if refusal is not None:
        raise refusal
    choice.require_rights(service)
    systemd.require(service.scope)
    report = Report(invocation)
    install(report, service, plan)
    report.end(service.unit, [*_kept(report), *_how_to_look(service)])


@service_command.command("uninstall", cls=Command)
@_with_service_options
@click.pass_obj
def uninstall_command(invocation: Invocation, scope: Scope | None, folder: Path | None) -> None:
    """Stop the service and remove its files; say each one.

    Without --folder: all services of your user, or of the host. Registries, backups and files that a person has changed
    stay, and so does the user madsci.
    """
    from madsci_registryctl.service import choice
    from madsci_registryctl.service.plan import Service
    from madsci_registryctl.service.work import Report, uninstall

    if folder is None:
        service = Service(scope or choice.default_scope(), choice.home())
    else:
        service = choice.chosen(invocation, scope, folder)
    choice.require_rights(service)
    report = Report(invocation)
    uninstall(report, service)
    report.end(None if folder is None else service.unit, [*_kept(report), *_what_is_left(report, service)])


@service_command.command("logs", cls=Command)
@_with_service_options
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on.")
@click.option("--since", metavar="TIME", help='From when on, as journalctl reads it: "2026-11-24 18:00", -1h, today.')
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="The last N lines only.")
@click.pass_obj
def logs_command(
    invocation: Invocation, scope: Scope | None, folder: Path | None, follow: bool, since: str | None, lines: int | None
) -> None:
    """Show what the service has logged, by journalctl; its exit status is handed on.

    Without --user or --system: the service of the registry that `registryctl where` names.
    """
    from madsci_registryctl.service import choice, systemd
    from madsci_registryctl.service.plan import journal

    options = ["--follow"] if follow else []
    options += [f"--since={since}"] if since is not None else []
    options += [f"--lines={lines}"] if lines is not None else []
    command = journal(choice.to_read(invocation, scope, folder), options)
    if shutil.which(command[0]) is None:
        reason = f"{command[0]} is not here: this host has no systemd, or keeps its logs elsewhere"
        raise UnsupportedError(reason, reason=reason)
    if not systemd.may_read_journal():
        user = systemd.user_name()
        invocation.say(
            f"You may not read the journal. To be let in: sudo usermod --append --groups systemd-journal {user}"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(command[0], command)


def _refusal(program: Path) -> UnsupportedError | None:
    """Say why a service of the system cannot run this program, and the commands for one that it can; None: it can."""
    from importlib.metadata import version

    from madsci_registryctl.service.reach import obstacles, parts

    found = obstacles(parts(program))
    if not found:
        return None
    commands = (
        f"sudo python3 -m venv {OWN_VENV} && sudo {OWN_VENV}/bin/pip install madsci-registryd=="
        f"{version('madsci-registryd')} && sudo {OWN_VENV}/bin/registryctl service install --system"
    )
    why = "; ".join(found)
    message = (
        f"a service of the system cannot run this program: {why}. In a checkout: sudo make install. Or: {commands}"
    )
    return UnsupportedError(message, reason=why)


def _print_plan(invocation: Invocation, service: Service, plan: Plan) -> None:
    commands = [shlex.join(c) for c in (*plan.prepare, service.systemctl("enable", "--now", *plan.units))]
    if invocation.as_json:
        files = [{"path": str(file.path), "text": file.text} for file in plan.files]
        print_json({"unit": service.unit, "files": files, "commands": commands})
        return
    for file in plan.files:
        click.echo(f"==> {file.path}\n{file.text}")
    click.echo("\n".join(["==> commands", *commands]))


def _kept(report: Report) -> list[str]:
    return [f"Not touched, as a person has changed it: {path}" for path in report.paths("kept")]


def _how_to_look(service: Service) -> list[str]:
    from madsci_registryctl.service import choice, reach, systemd

    registryctl = shlex.quote(choice.as_typed(reach.program().with_name("registryctl")))
    when = "after each boot" if service.scope == "system" else "whenever you log in"
    of = "" if service.folder is None else f" --folder {shlex.quote(str(service.folder))}"
    named = "" if service.folder is None else f" --registry {shlex.quote(str(service.registry))}"
    lines = [
        f"madsci-registryd serves {service.registry}, now and {when}. To look at it:",
        f"  {shlex.join(service.systemctl('status', service.unit))}",
        f"  {registryctl}{named} status",
        f"  {registryctl} service logs --{service.scope}{of}",
    ]
    if service.folder is None:
        lines.append("Who may use it: `access` in /etc/madsci/registryd.toml; then systemctl restart madsci-registryd")
    if service.scope == "user" and not systemd.lingers():
        lines.append(f"It ends with your last session. To keep it: sudo loginctl enable-linger {systemd.user_name()}")
    return lines


def _what_is_left(report: Report, service: Service) -> list[str]:
    from madsci_registry._endpoint import SYSTEM_CONFIG

    if report.is_empty():
        return ["Nothing is installed."]
    lines = [f"Left, as it runs another program than this one's: {path}" for path in report.left]
    if service.scope == "user" or service.folder is not None:
        return [*lines, "Registries are left as they are."]
    if str(SYSTEM_CONFIG) in report.paths("kept"):
        lines.append(f"As long as it exists, programs look for the registry of this host: rm {SYSTEM_CONFIG}")
    return [*lines, "Left: /var/lib/madsci with registry and backups, and the user madsci, whom they belong to."]
