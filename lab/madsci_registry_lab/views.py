"""What answers look like: the store's values as JSON objects."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from madsci_registry_lab.store import Applied, Conflict, Entry, Event, Lock, Page, Session, State


def entry(value: Entry) -> dict[str, Any]:
    """An entry of the lab, with its lock."""
    return {
        **asdict(value),
        "metadata": json.loads(value.metadata),
        "other_ids": [*value.other_ids],
        "lock": lock(value.lock) if value.lock else None,
    }


def lock(value: Lock) -> dict[str, Any]:
    """A lock. Not its session: that is for its host alone."""
    return {
        "name": value.name,
        "term": value.term,
        "host": value.host,
        "since": value.since,
        "holder": value.holder,
    }


def state(value: State) -> dict[str, Any]:
    """What a host said of a component."""
    return {**asdict(value), "metadata": json.loads(value.metadata)}


def session(value: Session) -> dict[str, Any]:
    """A living host. Not its session: that is for itself alone."""
    return {
        "host": value.host,
        "label": value.label,
        "boot": value.boot,
        "since": value.started_at,
        "locks": value.locks,
        "lease_s": value.lease_s,
    }


def applied(value: Applied) -> dict[str, Any]:
    """What became of changes."""
    return {
        "mark": asdict(value.mark) if value.mark else None,
        "changed": value.changed,
        "repeated": value.repeated,
        "unapplied": [
            {"name": u.state.name, "id": u.state.id, "reason": u.reason, "preferred": u.preferred}
            for u in value.unapplied
        ],
    }


def conflict(value: Conflict) -> dict[str, Any]:
    """A conflict with what both sides say."""
    return {
        "name": value.name,
        "id": value.id,
        "reason": value.reason,
        "host": value.host,
        "at": value.at,
        "decided_at": value.decided_at,
        "said": state(value.state),
        "entry": entry(value.entry) if value.entry else None,
    }


def event(value: Event) -> dict[str, Any]:
    """A change of the lab."""
    return asdict(value)


def page(value: Page) -> dict[str, Any]:
    """A piece of the feed."""
    return {"events": [event(e) for e in value.events], "cursor": value.cursor}
