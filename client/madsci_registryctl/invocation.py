"""What one command line asked for in general: the global options, before or after the command."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from madsci_registry._endpoint import Endpoint
    from madsci_registry.client import RegistryClient

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


@dataclass
class Invocation:
    """The global options of this run of registryctl; every command gets it as its first argument."""

    registry: str | None = None
    socket: str | None = None
    timeout: float = 5.0
    """Seconds, per request."""
    as_json: bool = False
    no_color: bool = False
    quiet: bool = False
    yes: bool = False

    def client(self, *, autostart: bool = True) -> RegistryClient:
        """Make a client of the registry that the options name. `autostart=False`: it never starts a daemon."""
        from madsci_registry.client import RegistryClient

        return RegistryClient(self.registry, socket=self.socket, timeout=self.timeout, autostart=autostart)

    def endpoint(self) -> Endpoint:
        """Say which registry and sockets the options, the environment and the disk name."""
        from madsci_registry._endpoint import choose_here

        return choose_here(self.registry, self.socket)

    def say(self, text: str) -> None:
        """Talk to the person, on stderr; not with -q."""
        if not self.quiet:
            from madsci_registryctl.render import printable

            click.echo(printable(text), err=True)

    def confirm(self, question: str) -> None:
        """Ask the person, unless -y was given.

        Raises:
            click.UsageError: nobody can be asked (stdin is no terminal). click.Abort: the answer was no.
        """
        if self.yes:
            return
        from madsci_registryctl.render import printable

        if not sys.stdin.isatty():
            raise click.UsageError(f"{printable(question)} There is no terminal to ask on: say -y to do it.")
        click.confirm(printable(question), abort=True, err=True)


def seconds(text: str) -> float:
    """Read a duration in seconds, 0 or more, `inf` for no limit. Raises click.BadParameter."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise click.BadParameter(f"{text!r} is not a number of seconds.")
    return value


def finite_seconds(text: str) -> float:
    """Read a duration in seconds, more than 0 and finite. Raises click.BadParameter."""
    value = seconds(text)
    if value in (0, math.inf):
        raise click.BadParameter(f"{text!r} is not a finite number of seconds above 0.")
    return value


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None and param.name:
        setattr(ctx.ensure_object(Invocation), param.name, value)


def global_options(*, hidden: bool) -> list[click.Option]:
    """Make the options that every command takes; hidden in the help of the single commands."""

    def option(*names: str, help: str, **settings: Any) -> click.Option:
        return click.Option(
            names, help=help, default=None, expose_value=False, callback=_keep, hidden=hidden, **settings
        )

    return [
        option("--registry", metavar="PATH", help="The registry's JSON file."),
        option("--socket", metavar="PATH", help="The daemon's socket."),
        option("--timeout", type=finite_seconds, metavar="S", help="Seconds for each request.  [default: 5]"),
        option("--json", "as_json", is_flag=True, help="Answer in JSON, errors too."),
        option("--no-color", is_flag=True, help="No colours; NO_COLOR in the environment says the same."),
        option("-q", "--quiet", is_flag=True, help="No talk on stderr, only errors."),
        option("-y", "--yes", is_flag=True, help="Answer yes to every question."),
    ]


def with_globals(*, hidden: bool) -> Callable[[_Decorated], _Decorated]:
    """Give the decorated command the global options, for a group (commands use `Command`)."""

    def decorate(function: _Decorated) -> _Decorated:
        params = getattr(function, "__click_params__", [])
        function.__click_params__ = [*params, *reversed(global_options(hidden=hidden))]  # type: ignore[attr-defined]
        return function

    return decorate


class Command(click.Command):
    """A command of registryctl: it takes the global options as well."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("epilog", "Global options, as --json or --registry, are listed by registryctl --help.")
        super().__init__(*args, **settings)
        self.params.extend(global_options(hidden=True))


def complete_name(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """List the names that begin so, for the shell's completion; none where no daemon answers at once."""
    from madsci_registry.errors import RegistryError

    invocation = _ctx.ensure_object(Invocation)
    invocation.timeout = 0.5  # a person waits at the prompt
    try:
        with invocation.client(autostart=False) as client:
            return [c.name for c in client.list() if c.name.startswith(incomplete)]
    except RegistryError:
        return []
