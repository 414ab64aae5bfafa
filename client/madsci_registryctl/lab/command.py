"""`lab`: how the daemon stands with the lab's registry, and conflicts between hosts, which a person may decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from madsci_registry.errors import NotFoundError, RegistryTimeoutError
from madsci_registryctl.invocation import Command, Invocation, complete_name, with_globals
from madsci_registryctl.lab import views
from madsci_registryctl.lab.options import with_lab
from madsci_registryctl.render import holder_text, print_fields, print_json

if TYPE_CHECKING:
    from madsci_registry.client import RegistryClient
    from madsci_registryctl.lab.asking import LabRegistry

SYNC_WAIT_S = 60.0
"""10,000 changes take a lab some 20 s."""


@click.group("lab", short_help="The registry of the whole lab.")
@with_globals(hidden=True)
def lab_command() -> None:
    """Look after the lab's registry, to which the daemon belongs: one name, one component, on every host.

    With --lab URL, `conflicts` and `merge` ask the lab itself; so do list, show, history and status.
    """


@lab_command.command("status", cls=Command)
@click.pass_obj
def status_command(invocation: Invocation) -> None:
    """Say how the daemon stands with its lab: state, how far behind, locks, conflicts. Starts no daemon."""
    with invocation.client(autostart=False) as client:
        lab = client.status().get("lab", {"state": "off"})
    if invocation.as_json:
        print_json(lab)
    else:
        print_fields(views.standing(lab))


@lab_command.command("sync", cls=Command)
@click.pass_context
def sync_command(context: click.Context) -> None:
    """Have the daemon tell the lab of all changes now, and wait until the lab knows them: --timeout S, 60 by default.

    Exit status 5: it does not know all yet. The daemon goes on by itself.
    """
    invocation: Invocation = context.obj
    wait_s = invocation.timeout if _is_given(context, "timeout") else SYNC_WAIT_S
    with invocation.client(autostart=False) as client:
        lab = client.lab_sync(wait_s)
    if lab["behind"]:
        error = f": {lab['error']}" if lab.get("error") else ""
        message = f"the lab does not know {lab['behind']} changes after {wait_s:g} s; it is {lab['state']}{error}"
        raise RegistryTimeoutError(message)
    if invocation.as_json:
        print_json(lab)
    else:
        invocation.say("The lab knows all changes.")


def _is_given(context: click.Context | None, option: str) -> bool:
    while context is not None:
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            return True
        context = context.parent
    return False


@lab_command.command("conflicts", cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--decided", is_flag=True, help="Those too that were decided.")
@click.pass_obj
@with_lab
def conflicts_command(invocation: Invocation, name: str | None, decided: bool, lab: LabRegistry | None) -> None:
    """Show where hosts contradict the lab, what both say side by side; all conflicts, or those of NAME."""
    holders: dict[str, str] = {}
    if lab is not None:
        conflicts = lab.conflicts(name, decided=decided)
    else:
        with invocation.client() as client:
            conflicts = client.lab_conflicts(name, decided=decided)
            if not invocation.as_json:
                holders = _holders_here(client, conflicts)
    if invocation.as_json:
        print_json(conflicts)
        return
    views.print_conflicts(invocation, conflicts, holders)
    if any(not conflict.get("decided_at") for conflict in conflicts):
        invocation.say("`registryctl lab merge NAME --prefer ULID` decides which ULID a name has.")
    elif not conflicts:
        invocation.say("There is no conflict.")


def _holders_here(client: RegistryClient, conflicts: list[dict[str, Any]]) -> dict[str, str]:
    """Say of the components of this host who holds them, by the ULID that the host has for them."""
    host, holders = client.status().get("lab", {}).get("host"), {}
    for said in (conflict["said"] for conflict in conflicts if conflict["host"] == host):
        try:
            component = client.whois(said["id"])
        except NotFoundError:
            continue
        holders[said["id"]] = holder_text(component.holder) if component.holder else "nobody"
    return holders


@lab_command.command("merge", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.option("--prefer", metavar="ULID", required=True, help="The ULID that NAME has from now on.")
@click.pass_obj
@with_lab
def merge_command(invocation: Invocation, name: str, prefer: str, lab: LabRegistry | None) -> None:
    """Decide a conflict: NAME has this ULID in the lab from now on. The other one stays known as the same component.

    Who holds the name keeps its ULID until it resolves the name anew. A decision may be changed by another one. Through
    the daemon it is for administrators.
    """
    if lab is not None:
        _ask(invocation, name, prefer, lab.conflicts(name, decided=True))
        entry = lab.merge(name, prefer)
    else:
        with invocation.client() as client:
            _ask(invocation, name, prefer, client.lab_conflicts(name, decided=True))
            entry = client.lab_merge(name, prefer)
    if invocation.as_json:
        print_json(entry)
    else:
        others = ", ".join(views.other_ids(entry)) or "no other"
        invocation.say(f"{name} is {entry.get('id')} in the lab; {others} is known as the same component.")


def _ask(invocation: Invocation, name: str, prefer: str, conflicts: list[dict[str, Any]]) -> None:
    """Have the person confirm, who sees what is decided. Raises NotFoundError: there is nothing to decide."""
    if not conflicts:
        raise NotFoundError(f"nobody contradicts the lab about {name!r}: there is nothing to decide", name=name)
    if not invocation.yes and not invocation.as_json:
        views.print_conflicts(invocation, conflicts, {})
    invocation.confirm(f"Shall {name} be {prefer} from now on?")
