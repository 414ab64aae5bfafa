"""`list`, `show` and `history`: what the registry knows and what happened in it."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from madsci_registry.errors import NotFoundError
from madsci_registry.names import is_ulid
from madsci_registry.types import COMPONENT_TYPES
from madsci_registryctl.invocation import Command, Invocation, complete_name
from madsci_registryctl.lab import views
from madsci_registryctl.lab.options import with_lab
from madsci_registryctl.render import (
    holder_fields,
    old_lock_fields,
    print_fields,
    print_json,
    print_table,
    whole_seconds,
)

if TYPE_CHECKING:
    from madsci_registry.client import RegistryClient
    from madsci_registry.types import Component, ComponentType, Event, State
    from madsci_registryctl.lab.asking import LabRegistry


@click.command("list", cls=Command)
@click.argument("pattern", metavar="[GLOB]", required=False)
@click.option("--type", "component_type", type=click.Choice(COMPONENT_TYPES), help="Only components of this type.")
@click.option("--state", type=click.Choice(["held", "free", "retired"]), help="Only names in this state.")
@click.option("--all", "include_retired", is_flag=True, help="Retired names too.")
@click.pass_obj
@with_lab
def list_command(
    invocation: Invocation,
    pattern: str | None,
    component_type: ComponentType | None,
    state: State | None,
    include_retired: bool,
    lab: LabRegistry | None,
) -> None:
    """List the components, or those whose name matches GLOB (* ? [])."""
    if lab is not None:
        _list_lab(invocation, lab.entries(component_type), pattern, state, include_retired)
        return
    with invocation.client() as client:
        components = client.list(
            pattern, component_type=component_type, state=state, include_retired=include_retired
        )  # fmt: skip
    if invocation.as_json:
        print_json([c.to_json() for c in components])
        return
    columns: list[str] = ["NAME", "TYPE", "STATE", "ID", "HOLDER", "LAST SEEN"]
    rows = [_row(c) for c in components]
    if any(c.lab or c.preferred_id for c in components):
        columns.append("LAB")
        rows = [(*row, _in_lab(c)) for row, c in zip(rows, components, strict=True)]
    print_table(invocation, columns, rows)


def _list_lab(
    invocation: Invocation, entries: list[dict[str, Any]], pattern: str | None, state: str | None, include_retired: bool
) -> None:
    # SQLite's GLOB, which the daemon has, negates a set by ^, fnmatch by !.
    glob = (pattern or "*").replace("[^", "[!")
    shown = [
        entry
        for entry in entries
        if fnmatchcase(str(entry.get("name")), glob)
        and (views.state_of(entry) == state if state else include_retired or views.state_of(entry) != "retired")
    ]
    if invocation.as_json:
        print_json(shown)
    else:
        views.print_entries(invocation, shown)


def _in_lab(component: Component) -> str | None:
    """Say in a word or two how a component stands in the lab."""
    words = [component.lab, "conflict" if component.preferred_id else None]
    return " ".join(filter(None, words)) or None


def _row(component: Component) -> tuple[object, ...]:
    holder = component.holder
    who = None if holder is None else f"{holder.comm or 'process'}[{holder.pid or '?'}]@{holder.host}"
    if component.old_lock:
        who = f"old program[{component.old_lock.holder_pid}]@{component.old_lock.holder_host}"
    return (
        component.name,
        component.component_type,
        component.state,
        component.id,
        who,
        whole_seconds(component.last_seen),
    )


@click.command("show", cls=Command)
@click.argument("name", metavar="NAME|ULID", shell_complete=complete_name)
@click.pass_obj
@with_lab
def show_command(invocation: Invocation, name: str, lab: LabRegistry | None) -> None:
    """Show all that is known of a component (the protocol's get and whois)."""
    if lab is not None:
        _show_lab(invocation, lab.find(name))
        return
    with invocation.client() as client:
        component = find(client, name)
    if invocation.as_json:
        print_json(component.to_json())
    else:
        print_component(component)


def _show_lab(invocation: Invocation, entry: dict[str, Any]) -> None:
    if invocation.as_json:
        print_json(entry)
    else:
        views.print_entry(entry)


def find(client: RegistryClient, name_or_id: str) -> Component:
    """Return the component with this name, else with this id, a ULID or not. Raises NotFoundError."""
    try:
        return client.get(name_or_id)
    except NotFoundError as error:
        no_name = error
    if no_name.renamed_to:
        raise no_name
    try:
        return client.whois(name_or_id)
    except NotFoundError:
        if is_ulid(name_or_id):
            raise
        raise no_name from None


def print_component(component: Component) -> None:
    """Print a component for people, one fact a line."""
    shown: dict[str, object] = {
        "name": component.name,
        "id": component.id,
        "type": component.component_type,
        "state": component.state,
        "created": whole_seconds(component.created_at),
        "last seen": whole_seconds(component.last_seen),
    }
    if component.preferred_id:
        shown["preferred id"] = f"{component.preferred_id}, by the lab: its next resolve gives that one"
    if component.other_ids:
        shown["other ids"] = component.other_ids
    if component.lab:
        shown["lab"] = component.lab
    if component.holder:
        shown |= holder_fields(component.holder)
        shown["fencing token"] = component.fencing_token
    if component.old_lock:
        shown |= old_lock_fields(component.old_lock)
    if component.waiting:
        shown["waiting"] = component.waiting
    if component.metadata:
        shown["metadata"] = [f"{key}={_json(value)}" for key, value in component.metadata.items()]
    print_fields(shown)


@click.command("history", cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@click.pass_obj
@with_lab
def history_command(invocation: Invocation, name: str | None, lab: LabRegistry | None) -> None:
    """Tell every change of the registry, or those of NAME, oldest first. With --lab a NAME is needed."""
    if lab is not None:
        _history_of_lab(invocation, lab, name)
        return
    with invocation.client() as client:
        events = client.history(name)
    if invocation.as_json:
        print_json([event.to_json() for event in events])
        return
    print_table(
        invocation,
        ("REVISION", "AT", "EVENT", "NAME", "ID", "BY", "WHY"),
        [(e.revision, whole_seconds(e.at), e.kind, e.name, e.id, _actor(e), _why(e)) for e in events],
    )


def _history_of_lab(invocation: Invocation, lab: LabRegistry, name: str | None) -> None:
    if name is None:
        raise click.UsageError("--lab tells the history of a NAME; the lab's feed (docs/lab.md) has all changes.")
    events = lab.history(name)
    if invocation.as_json:
        print_json(events)
    else:
        views.print_events(invocation, events)


def _actor(event: Event) -> str | None:
    words = [f"{what} {value}" for what, value in (("uid", event.uid), ("pid", event.pid)) if value is not None]
    return " ".join(words) or None


def _why(event: Event) -> str | None:
    return " ".join(f"{key}={_json(value)}" for key, value in event.why.items()) or None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
