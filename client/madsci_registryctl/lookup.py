"""`lookup`: the ULID of a name. Kept apart and small, since it is what scripts call."""

from __future__ import annotations

import click

from madsci_registryctl.invocation import Command, Invocation, complete_name


@click.command("lookup", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.pass_obj
def lookup_command(invocation: Invocation, name: str) -> None:
    """Print the ULID of NAME; exit status 3 if there is no such name."""
    with invocation.client() as client:
        # get says where a renamed name went, which lookup cannot.
        id = client.lookup(name) or client.get(name).id
    if invocation.as_json:
        from madsci_registryctl.render import print_json

        print_json({"name": name, "id": id})
    else:
        click.echo(id)
