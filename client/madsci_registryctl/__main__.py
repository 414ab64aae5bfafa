"""`registryctl`: dispatches to the commands and turns every outcome into its exit status.

A command's module is imported only when it is asked for: `registryctl lookup` is typed often and starts quickly.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

import click

from madsci_registry.errors import RegistryError
from madsci_registryctl import exits
from madsci_registryctl.invocation import Command, Invocation, with_globals
from madsci_registryctl.render import print_error, print_usage_error

COMMANDS = {
    "status": "watching",
    "where": "watching",
    "sessions": "watching",
    "metrics": "metrics",
    "doctor": "doctor.command",
    "list": "reading",
    "show": "reading",
    "lookup": "lookup",
    "history": "reading",
    "resolve": "resolve",
    "run": "run",
    "dropin": "dropin",
    "release": "release",
    "rename": "changing",
    "retire": "retire",
    "revive": "changing",
    "set": "changing",
    "unset": "changing",
    "export": "transfer",
    "import": "transfer",
    "migrate": "migrate",
    "lab": "lab.command",
    "backup": "transfer",
    "stop": "stop",
    "service": "service.command",
    "completion": "completion",
}
"""Which module of this package has which command, as `NAME_command`; in the order of the help."""


class Registryctl(click.Group):
    """The group of all commands, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        return cast(Command, getattr(import_module(f"madsci_registryctl.{module}"), f"{cmd_name}_command"))


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"registryctl {version('madsci-registryd')}")
        ctx.exit()


@click.command(cls=Registryctl, epilog=exits.HELP, context_settings={"help_option_names": ["-h", "--help"]})
@with_globals(hidden=False)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def registryctl() -> None:
    """Ask and change the registry of component names.

    Data goes to stdout, talk and errors to stderr. The options below may stand before or after the command.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's own) and return its exit status, see `exits`."""
    logging.getLogger("madsci_registry").addHandler(logging.NullHandler())  # what it warns of, we say ourselves
    words = list(sys.argv[1:] if args is None else args)
    invocation = Invocation()
    _escape_unprintable()
    try:
        status = registryctl.main(words, "registryctl", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
        return status or exits.OK
    except click.ClickException as error:
        own_words = words[: words.index("--")] if "--" in words else words
        print_usage_error(error, as_json=invocation.as_json or "--json" in own_words)
        return error.exit_code
    except click.Abort as abort:
        return _aborted(abort)
    except RegistryError as error:
        print_error(error, as_json=invocation.as_json)
        return exits.status_of(error)
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python would complain at exit, when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.OTHER
    except OSError as error:
        failure = exits.of_os_error(error)
        print_error(failure, as_json=invocation.as_json)
        return exits.status_of(failure)


def _escape_unprintable() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _aborted(abort: click.Abort) -> int:
    if isinstance(abort.__cause__, KeyboardInterrupt):
        return exits.INTERRUPTED
    click.echo("Nothing was done.", err=True)
    return exits.OTHER


if __name__ == "__main__":
    sys.exit(main())
