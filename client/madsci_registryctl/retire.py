"""`retire`: takes names out of use, one by name or all that were not seen for long. No ULID is ever forgotten."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import click

from madsci_registry.errors import ConflictError, HeldError, NotFoundError
from madsci_registryctl.invocation import Command, Invocation, complete_name
from madsci_registryctl.render import print_json, print_table, whole_seconds

if TYPE_CHECKING:
    from madsci_registry.client import RegistryClient
    from madsci_registry.types import Component

# A hundred years: any larger number is a typing error, and a date before year 1 cannot be told.
DAYS_MAX = 36525


@click.command("retire", cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--older-than", "older_than_days", type=click.FloatRange(0, DAYS_MAX), metavar="DAYS",
              help="Every free name that was not seen for so many days.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="With --older-than: only say what would be retired.")
@click.pass_obj
def retire_command(invocation: Invocation, name: str | None, older_than_days: float | None, dry_run: bool) -> None:
    """Take NAME out of use; its ULID is kept, and resolving or reviving the name brings it back.

    A held name is not retired (exit status 4). With --older-than a name that is held or seen meanwhile is left alone.
    """
    if (name is None) == (older_than_days is None):
        raise click.UsageError("give either NAME or --older-than DAYS.")
    if older_than_days is not None:
        _retire_older(invocation, older_than_days, dry_run)
        return
    if dry_run:
        raise click.UsageError("--dry-run needs --older-than.")
    assert name is not None
    with invocation.client() as client:
        component = client.retire(name)
    if invocation.as_json:
        print_json(component.to_json())
    else:
        invocation.say(f"{name} is retired; its ULID {component.id} is kept.")


def _retire_older(invocation: Invocation, days: float, dry_run: bool) -> None:
    cutoff = datetime.now(timezone.utc) - timedelta(days=days)
    with invocation.client() as client:
        stale = [c for c in client.list(state="free") if _instant(c.last_seen) < cutoff]
        results = [_retire_one(client, c, cutoff, dry_run) for c in stale]
    if invocation.as_json:
        print_json(results)
        return
    rows = [(r["outcome"], r["name"], r["id"], whole_seconds(r["last_seen"]), r["reason"] or None) for r in results]
    print_table(invocation, ("OUTCOME", "NAME", "ID", "LAST SEEN", "REASON"), rows)
    retired = sum(r["outcome"] == "retired" for r in results)
    invocation.say(f"{len(results)} would be retired." if dry_run else f"{retired} of {len(results)} retired.")


def _retire_one(client: RegistryClient, component: Component, cutoff: datetime, dry_run: bool) -> dict[str, Any]:
    outcome, reason = ("would retire", "") if dry_run else ("retired", "")
    if not dry_run:
        try:
            client.retire(component.name, id=component.id, unseen_since=cutoff.isoformat())
        except (HeldError, ConflictError, NotFoundError) as error:
            outcome, reason = "kept", error.message
    return {
        "name": component.name,
        "id": component.id,
        "last_seen": component.last_seen,
        "outcome": outcome,
        "reason": reason,
    }


def _instant(text: str) -> datetime:
    # Python 3.10 does not read the Z of ISO 8601.
    instant = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return instant if instant.tzinfo else instant.replace(tzinfo=timezone.utc)
