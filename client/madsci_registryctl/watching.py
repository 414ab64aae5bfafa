"""`status`, `where` and `sessions`: the daemon (or the lab) and its clients. None of them ever starts a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from madsci_registry.errors import RegistryError
from madsci_registryctl.invocation import Command, Invocation
from madsci_registryctl.lab import views
from madsci_registryctl.lab.options import with_lab
from madsci_registryctl.render import print_fields, print_json, print_table, whole_seconds

if TYPE_CHECKING:
    from madsci_registryctl.lab.asking import LabRegistry


@click.command("status", cls=Command)
@click.pass_obj
@with_lab
def status_command(invocation: Invocation, lab: LabRegistry | None) -> None:
    """Say what the daemon is and does; exit status 6 if none serves. Starts none. With --lab: how the lab itself is."""
    if lab is not None:
        _show_lab(invocation, lab)
        return
    with invocation.client(autostart=False) as client:
        status = client.status()
    if invocation.as_json:
        print_json(status)
        return
    degraded = status.pop("degraded", [])
    export, standing = status.pop("export", {"state": "off"}), status.pop("lab", {"state": "off"})
    print_fields(status)
    print_fields(_of_file(export))
    print_fields(views.standing(standing))
    if degraded:
        print_fields({"degraded": degraded})


def _show_lab(invocation: Invocation, lab: LabRegistry) -> None:
    status = lab.status()
    if invocation.as_json:
        print_json(status)
    else:
        views.print_status(status)


def _of_file(export: dict[str, Any]) -> dict[str, object]:
    """Say how it stands with registry.json, and which old programs were seen to write it."""
    shown: dict[str, object] = {"registry.json": export["state"]}
    if export["state"] == "off":
        return shown
    old = [f"pid {o['pid']} on {o['host']}, seen {whole_seconds(o['seen_at'])}" for o in export["old_programs"]]
    facts = {
        "fault": export["fault"],
        "old programs": old,
        "refused changes": export["refused"],
        "put aside": export["put_aside"],
    }
    return shown | {key: value for key, value in facts.items() if value}


@click.command("where", cls=Command)
@click.pass_obj
def where_command(invocation: Invocation) -> None:
    """Say which registry is chosen here, and why; and whether a daemon serves it. Starts none."""
    endpoint = invocation.endpoint()
    serving_pid, answer = _who_serves(invocation)
    chosen: dict[str, object] = {
        "registry": _text(endpoint.registry),
        "database": _text(endpoint.database),
        "socket": str(endpoint.socket),
        "lifeline": str(endpoint.lifeline),
        "reason": endpoint.reason,
        "exists": endpoint.exists(),
        "answers": serving_pid is not None,
        "pid": serving_pid,
    }
    if invocation.as_json:
        print_json(chosen)
        return
    chosen["exists"] = "yes" if chosen["exists"] else "not yet" if endpoint.registry else "only its daemon knows"
    chosen["answers"] = f"yes, pid {serving_pid}" if serving_pid is not None else f"no: {answer}"
    del chosen["pid"]
    print_fields(chosen)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _who_serves(invocation: Invocation) -> tuple[int | None, str]:
    try:
        with invocation.client(autostart=False) as client:
            return int(client.status()["pid"]), ""
    except RegistryError as error:
        return None, error.message


@click.command("sessions", cls=Command)
@click.pass_obj
def sessions_command(invocation: Invocation) -> None:
    """List the client processes that the daemon knows. Starts no daemon."""
    with invocation.client(autostart=False) as client:
        sessions = client.sessions()
    if invocation.as_json:
        print_json([session.to_json() for session in sessions])
        return
    print_table(
        invocation,
        ("SESSION", "PID", "USER", "PROGRAM", "RUNS IN", "SINCE", "CONNECTION", "PROOF", "HELD", "WAITING"),
        [
            (
                s.id,
                s.pid,
                s.user or s.uid,
                s.comm,
                s.container[:12] if s.container else s.unit,
                whole_seconds(s.started_at),
                "attached" if s.attached else "detached",
                s.proof,
                s.held,
                s.waiting,
            )
            for s in sessions
        ],
    )
