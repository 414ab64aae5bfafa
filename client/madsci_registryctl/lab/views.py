"""How people see the lab: how a daemon stands with it, what it has under a name, and both sides of a conflict.

What comes from a lab is another program's word: a field may be missing, or be anything.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from madsci_registryctl.render import print_fields, print_table, printable, whole_seconds

if TYPE_CHECKING:
    from madsci_registryctl.invocation import Invocation

_Object = dict[str, Any]
_HEALTH = ("service", "version", "api_version", "healthy", "description", "epoch", "cursor", "lease_s")
_REASONS = {
    "two_ids": "it was made on two hosts while they were apart",
    "name_taken": "it was renamed to a name that another component has",
    "held": "it was renamed while another host held it",
    "wrong_type": "it has another type there",
}


def standing(lab: _Object) -> dict[str, object]:
    """Say in lines how a daemon stands with its lab: the `lab` of its status."""
    shown: dict[str, object] = {"lab": lab["state"]}
    if lab["state"] == "off":
        return shown
    if lab.get("since"):
        shown["lab"] = f"{lab['state']} since {whole_seconds(lab['since'])}"
    facts = {
        "lab url": lab.get("url"),
        "lab host": lab.get("host"),
        "lab error": lab.get("error"),
        "lab required": "yes: without it, what it has to be asked for is refused" if lab.get("require") else None,
        "lab behind": f"{lab['behind']} changes" if lab.get("behind") else None,
        "lab locks": _locks(lab),
        "lab contested": lab.get("contested"),
        "lab conflicts": lab.get("conflicts"),
    }
    return shown | {key: value for key, value in facts.items() if value}


def _locks(lab: _Object) -> str | None:
    words = [f"{lab[what]} {what}" for what in ("confirmed", "unconfirmed") if lab.get(what)]
    return ", ".join(words) or None


def print_status(status: _Object) -> None:
    """Print how the lab itself is, and a line for each host that it hears."""
    facts = {key: status[key] for key in _HEALTH if key in status}
    print_fields({**facts, "host": [_host(host) for host in status["hosts"]] or "none is heard"})


def _host(host: _Object) -> str:
    label = f" ({host['label']})" if host.get("label") else ""
    return f"{host.get('host')}{label} since {_instant(host.get('since'))}, holds {host.get('locks')} names"


def state_of(entry: _Object) -> str:
    """Say whether a component of the lab is held, free or retired."""
    return "held" if entry.get("lock") else "retired" if entry.get("retired") else "free"


def other_ids(entry: _Object) -> list[str]:
    """Return the ULIDs that are the same component."""
    ids = entry.get("other_ids")
    return [str(id) for id in ids] if isinstance(ids, list) else []


def print_entries(invocation: Invocation, entries: list[_Object]) -> None:
    """Print components of the lab as a table."""
    rows = [
        (
            entry.get("name"),
            entry.get("component_type"),
            state_of(entry),
            entry.get("id"),
            _holder_in_short(_object(entry.get("lock"))),
            _instant(entry.get("changed_at")),
        )
        for entry in entries
    ]
    print_table(invocation, ("NAME", "TYPE", "STATE", "ID", "HOLDER", "CHANGED"), rows)


def _holder_in_short(lock: _Object) -> str | None:
    if not lock:
        return None
    holder = _object(lock.get("holder"))
    pid = holder.get("pid", holder.get("holder_pid"))
    return f"{holder.get('comm') or 'process'}[{pid or '?'}]@{lock.get('host')}"


def print_entry(entry: _Object) -> None:
    """Print a component of the lab, one fact a line."""
    lock, metadata = _object(entry.get("lock")), _object(entry.get("metadata"))
    shown: dict[str, object] = {
        "name": entry.get("name"),
        "id": entry.get("id"),
        "type": entry.get("component_type"),
        "state": state_of(entry),
        "created": _instant(entry.get("created_at")),
        "changed": f"{_instant(entry.get('changed_at'))} by host {entry.get('host')}",
    }
    facts = {
        "other ids": other_ids(entry),
        "holder": _holder(lock) if lock else None,
        "term": entry.get("term"),
        "metadata": [f"{key}={value!r}" for key, value in metadata.items()],
    }
    print_fields(shown | {key: value for key, value in facts.items() if value})


def _holder(lock: _Object) -> str:
    """Say who holds a name in the lab: its host's word."""
    holder = _object(lock.get("holder"))
    pid = holder.get("pid", holder.get("holder_pid"))
    who = f"pid {pid}" if pid else "a process"
    facts = [str(holder[key]) for key in ("comm", "user", "container", "unit") if holder.get(key)]
    program = f" ({', '.join(facts)})" if facts else ""
    return f"{who}{program} on {lock.get('host')} since {_instant(lock.get('since'))}"


def print_events(invocation: Invocation, events: list[_Object]) -> None:
    """Print changes that the lab has seen."""
    columns = ("REVISION", "AT", "EVENT", "NAME", "ID", "HOST", "WHY")
    print_table(invocation, columns, [_event(event) for event in events])


def _event(event: _Object) -> tuple[object, ...]:
    why = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in _object(event.get("why")).items())
    known = [event.get(key) for key in ("kind", "name", "id", "host")]
    return (event.get("revision"), _instant(event.get("at")), *known, why or None)


def print_conflicts(invocation: Invocation, conflicts: list[_Object], holders: dict[str, str]) -> None:
    """Print conflicts, what the lab has and what the host said side by side.

    Args:
        invocation: of the command.
        conflicts: as the lab tells them.
        holders: who holds a component on our own host, by its ULID.
    """
    for n, conflict in enumerate(conflicts):
        said, entry = _object(conflict.get("said")), _object(conflict.get("entry"))
        if n:
            click.echo()
        reason = _REASONS.get(str(conflict.get("reason")), str(conflict.get("reason")))
        decided = f"decided {_instant(conflict['decided_at'])}" if conflict.get("decided_at") else "not decided"
        click.echo(printable(f"{conflict.get('name')}: {reason}; seen {_instant(conflict.get('at'))}, {decided}"))
        print_table(
            invocation,
            ("", "THE LAB HAS", f"HOST {printable(conflict.get('host'))} SAYS"),
            [
                ("id", entry.get("id"), said.get("id")),
                ("name", entry.get("name"), said.get("name")),
                ("type", entry.get("component_type"), said.get("component_type")),
                ("created", _instant(entry.get("created_at")), _instant(said.get("created_at"))),
                ("changed", _changed(entry), _instant(said.get("changed_at"))),
                ("last seen", None, _instant(said.get("last_seen"))),
                ("retired", _yes_or_no(entry.get("retired")), _yes_or_no(said.get("retired"))),
                ("other ids", " ".join(other_ids(entry)) or None, None),
                ("held by", _held_in_lab(entry), holders.get(str(said.get("id")))),
            ],
        )


def _changed(entry: _Object) -> str | None:
    return f"{_instant(entry.get('changed_at'))} by host {entry.get('host')}" if entry else None


def _held_in_lab(entry: _Object) -> str | None:
    lock = _object(entry.get("lock"))
    return _holder(lock) if lock else "nobody" if entry else None


def _yes_or_no(value: object) -> str | None:
    return None if value is None else "yes" if value else "no"


def _instant(value: object) -> str | None:
    return whole_seconds(value) if isinstance(value, str) else None


def _object(value: object) -> _Object:
    return value if isinstance(value, dict) else {}
