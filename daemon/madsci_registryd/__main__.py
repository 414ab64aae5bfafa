"""The command `madsci-registryd`: flags and exit statuses. What it does is in app.py, restore.py and rollback.py."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

log = logging.getLogger(__name__)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--registry", type=click.Path(path_type=Path), help="The registry: the path of its .json file.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Keep database and sockets in this folder instead.")
@click.option("--socket", type=click.Path(path_type=Path), help="Serve requests here (X.sock; the lifeline is X.life).")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--idle-exit", type=float, metavar="SECONDS", help="End when there was no client for so long.")
@click.option("--export/--no-export", default=None, help="Keep registry.json for MADSci's own programs (default).")
@click.option("--ephemeral", is_flag=True, default=None, help="In a container: the registry may go with it.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file with the same settings.")
@click.option("--autostarted", is_flag=True, hidden=True)
@click.version_option(version("madsci-registryd"), prog_name="madsci-registryd")
@click.pass_context
def main(context: click.Context, /, config: Path | None, autostarted: bool, **given: Any) -> None:
    """Own one registry of names and ULIDs, and serve it until told to stop.

    Settings come from these options, then the environment (MADSCI_REGISTRYD_*), then the file of --config.
    """
    if autostarted and context.invoked_subcommand is None:
        _detach()
    from madsci_registryd.faults import StartFault
    from madsci_registryd.journal import set_up
    from madsci_registryd.settings import Places, journal_stream, load

    handler = set_up(journal_stream())
    try:
        settings = load(given, config)
    except StartFault as fault:
        _fail(fault, autostarted)
    logging.getLogger().setLevel(settings.log_level.upper())
    handler.registry = str(Places(settings).registry)
    context.obj = settings
    if context.invoked_subcommand is None:
        sys.exit(_serve(settings, autostarted, config, lambda: load(given, config)))


@main.command()
@click.pass_obj
def verify(settings: Any) -> None:
    """Check the whole database; the daemon must not run. Exit 0: whole; 65: damaged, each fault on a line."""
    from madsci_registryd.faults import StartFault
    from madsci_registryd.restore import verify_database

    try:
        found = verify_database(settings)
    except StartFault as fault:
        _fail(fault, False)
    for line in found:
        click.echo(line)
    if found:
        sys.exit(65)
    click.echo("the database is whole", err=True)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--token-floor",
    type=click.IntRange(0, ((1 << 33) - (1 << 20)) << 20),  # tokens are below 2^53; this leaves a million starts
    default=0,
    metavar="TOKEN",
    help="Where the clock is off: let every later fencing token be above this one, the highest that a device saw; "
    "at most (2^33 - 2^20) * 2^20.",
)
@click.pass_obj
def restore(settings: Any, file: Path, token_floor: int) -> None:
    """Bring back what the backup FILE knows, and keep what the database knows beyond it; the daemon must not run."""
    from madsci_registryd.faults import StartFault
    from madsci_registryd.restore import restore_backup

    try:
        report = restore_backup(settings, file, token_floor)
    except StartFault as fault:
        _fail(fault, False)
    for line in report:
        click.echo(line)


@main.command()
@click.pass_obj
def rollback(settings: Any) -> None:
    """Clear our claims in registry.json, so that old MADSci can use it alone; the daemon must not run.

    Prints the names whose claims it cleared. The database is not touched, and may be missing or damaged.
    """
    from madsci_registryd.faults import StartFault
    from madsci_registryd.rollback import clear_claims
    from madsci_registryd.settings import Places

    try:
        cleared = clear_claims(settings)
    except StartFault as fault:
        _fail(fault, False)
    for name in cleared:
        click.echo(json.dumps(name) if not name.isprintable() else name)
    click.echo(
        f"Old MADSci can use {Places(settings).registry} now, as long as no daemon serves it. To come back, start the "
        "daemon: it takes in what changed meanwhile.",
        err=True,
    )


def _serve(settings: Any, autostarted: bool, config: Path | None, reload: Callable[[], Any]) -> int:
    from madsci_registryd.app import App
    from madsci_registryd.faults import AlreadyServed, StartFault
    from madsci_registryd.settings import supervision

    # Without a file there is nothing to read anew, and SIGHUP ends the daemon with its terminal.
    app = App(
        settings,
        config=config,
        reload=reload if config else None,
        supervision=supervision(),
        is_autostarted=autostarted,
    )
    try:
        app.start()
    except AlreadyServed as fault:
        if autostarted:
            _report({"ok": {"pid": None}})
            return 0
        _fail(fault, autostarted)
    except StartFault as fault:
        _fail(fault, autostarted)
    if autostarted:
        _report({"ok": {"pid": os.getpid()}})
    status = app.run()
    app.close()
    return status


def _detach() -> None:
    """Leave the client that started us: the parent ends at once, the daemon has a session of its own."""
    if os.fork():
        os._exit(0)
    os.setsid()


def _report(message: dict[str, Any]) -> None:
    """Tell the client that started us, once, and let go of its pipe."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _fail(fault: Any, autostarted: bool) -> None:
    if autostarted:
        _report({"error": fault.error.to_wire()})
    from madsci_registryd import journal, messages

    if journal.is_in_use():
        log.critical("%s", fault, extra=messages.NOT_STARTED(status=fault.status))
    else:  # a person reads it, or whoever started us
        click.echo(f"madsci-registryd: {fault}", err=True)
    sys.exit(fault.status)


if __name__ == "__main__":
    main()
