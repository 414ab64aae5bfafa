"""`rename`, `revive`, `set` and `unset`: changes of a component that nobody needs to be asked about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from madsci_registryctl.invocation import Command, Invocation, complete_name
from madsci_registryctl.reading import print_component
from madsci_registryctl.render import print_json
from madsci_registryctl.resolve import parse_metadata

if TYPE_CHECKING:
    from madsci_registry.types import Component


def _report(invocation: Invocation, component: Component, done: str) -> None:
    if invocation.as_json:
        print_json(component.to_json())
    else:
        invocation.say(done)


@click.command("rename", cls=Command)
@click.argument("old", shell_complete=complete_name)
@click.argument("new")
@click.option("--force", is_flag=True, help="Even while it is held: the holder keeps the lock and is told.")
@click.pass_obj
def rename_command(invocation: Invocation, old: str, new: str, force: bool) -> None:
    """Give the component OLD the name NEW; its ULID goes with it. OLD is free then."""
    with invocation.client() as client:
        component = client.rename(old, new, force)
    _report(invocation, component, f"{old} is now called {new} ({component.id}).")


@click.command("revive", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.pass_obj
def revive_command(invocation: Invocation, name: str) -> None:
    """Take a retired NAME back into use, with its ULID."""
    with invocation.client() as client:
        component = client.revive(name)
    _report(invocation, component, f"{name} is in use ({component.id}).")


@click.command("set", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.argument("items", metavar="KEY=VALUE...", nargs=-1, required=True)
@click.pass_obj
def set_command(invocation: Invocation, name: str, items: tuple[str, ...]) -> None:
    """Replace these keys in the metadata of NAME; a value may be JSON."""
    metadata = parse_metadata(items)
    with invocation.client() as client:
        component = client.set_metadata(name, set=metadata)
    _show_changed(invocation, component)


@click.command("unset", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@click.pass_obj
def unset_command(invocation: Invocation, name: str, keys: tuple[str, ...]) -> None:
    """Drop these keys from the metadata of NAME."""
    with invocation.client() as client:
        component = client.set_metadata(name, unset=keys)
    _show_changed(invocation, component)


def _show_changed(invocation: Invocation, component: Component) -> None:
    if invocation.as_json:
        print_json(component.to_json())
    elif not invocation.quiet:
        print_component(component)
