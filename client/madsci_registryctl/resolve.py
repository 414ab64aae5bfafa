"""`resolve`: the ULID of a name, made if new. It takes no lock; `run` does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from madsci_registry.errors import InvalidError, NotFoundError
from madsci_registry.types import COMPONENT_TYPES
from madsci_registryctl.invocation import Command, Invocation, complete_name
from madsci_registryctl.strict_json import loads

if TYPE_CHECKING:
    from madsci_registry.types import ComponentType


def parse_metadata(items: tuple[str, ...]) -> dict[str, Any]:
    """Turn `key=value` words into metadata: a value that is JSON counts as JSON, any other as text.

    Raises:
        InvalidError: a word without `=`, an empty key, or a key given twice.
    """
    metadata: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InvalidError(f"{item!r} is not of the form key=value", field="metadata", reason="not key=value")
        if key in metadata:
            raise InvalidError(f"{key!r} is given twice", field=f"metadata.{key}", reason="given twice")
        metadata[key] = _parse_value(text, f"metadata.{key}")
    return metadata


def _parse_value(text: str, field: str) -> Any:
    try:
        json.loads(text)
    except ValueError:
        return text
    return loads(text.encode("utf-8", "surrogateescape"), field)


@click.command("resolve", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.option("--type", "component_type", type=click.Choice(COMPONENT_TYPES), help="Needed to create the name.")
@click.option("--meta", multiple=True, metavar="KEY=VALUE", help="Merge this into its metadata; a value may be JSON.")
@click.pass_obj
def resolve_command(
    invocation: Invocation, name: str, component_type: ComponentType | None, meta: tuple[str, ...]
) -> None:
    """Print the ULID of NAME; with --type make it if it is new. Takes no lock.

    Without --type nothing is ever created: an unknown name is exit status 3.
    """
    if component_type is None:
        _resolve_known(invocation, name, meta)
        return
    metadata = parse_metadata(meta)
    with invocation.client() as client:
        registration = client.resolve(name, component_type, metadata or None, acquire_lock=False)
        if not invocation.as_json:
            for warning in registration.warnings:
                invocation.say(f"registryctl: {warning}")
            click.echo(registration.id)
            return
        component = client.get(name)
    from madsci_registryctl.render import print_json

    print_json({**component.to_json(), "is_new": registration.is_new, "warnings": list(registration.warnings)})


def _resolve_known(invocation: Invocation, name: str, meta: tuple[str, ...]) -> None:
    if meta:
        raise click.UsageError("--meta needs --type; `registryctl set` changes the metadata of a known name.")
    try:
        with invocation.client() as client:
            component = client.get(name)
    except NotFoundError as error:
        error.hint = f"give --type to create it ({', '.join(COMPONENT_TYPES)})"  # type: ignore[attr-defined]
        if error.renamed_to:
            error.hint = f"it is called {error.renamed_to!r} now; {error.hint}"  # type: ignore[attr-defined]
        raise
    if invocation.as_json:
        from madsci_registryctl.render import print_json

        print_json({**component.to_json(), "is_new": False, "warnings": []})
    else:
        click.echo(component.id)
