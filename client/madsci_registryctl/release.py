"""`release --force`: ends somebody else's lock (the protocol's break_lock)."""

from __future__ import annotations

import click

from madsci_registry.errors import ConflictError, HeldError
from madsci_registryctl.invocation import Command, Invocation, complete_name
from madsci_registryctl.render import holder_text, print_json


@click.command("release", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.option("--force", is_flag=True, help="Break the lock, whoever holds it.")
@click.option("--reason", default="", metavar="TEXT", help="Told to the holder, kept in the history.")
@click.pass_obj
def release_command(invocation: Invocation, name: str, force: bool, reason: str) -> None:
    """Break the lock on NAME: shows who holds it and asks. The holder is told that it lost the lock.

    A lock ends by itself with the process that holds it; this is for one that lives and must not hold it any more.
    """
    if not force:
        raise click.UsageError(
            "a lock ends with the process that holds it: end that process (registryctl show NAME says which), "
            "or break its lock with --force"
        )
    with invocation.client() as client:
        component = client.get(name)
        if component.old_lock is not None:
            message = f"{name} is held by {component.old_lock.label}, whose lock cannot be broken: end that program"
            raise HeldError(message, name=name, id=component.id, old_lock=component.old_lock)
        if component.holder is None or component.fencing_token is None:
            _report(invocation, name, broken=False, said=f"Nobody holds {name}.")
            return
        token = component.fencing_token
        who = holder_text(component.holder)
        invocation.confirm(f"{name} is held by {who}. Break the lock?")
        broken = client.break_lock(name, fencing_token=token, reason=reason)
        if not broken:
            now = client.get(name)
            if now.locked:
                raise ConflictError(f"{name} has another holder by now; nothing was broken", name=name, id=now.id)
    said = f"The lock on {name} is broken (it was held by {who})." if broken else f"Nobody holds {name} any more."
    _report(invocation, name, broken=broken, said=said)


def _report(invocation: Invocation, name: str, *, broken: bool, said: str) -> None:
    if invocation.as_json:
        print_json({"name": name, "broken": broken})
    else:
        invocation.say(said)
