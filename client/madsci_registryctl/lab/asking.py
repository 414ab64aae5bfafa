"""The lab's registry, asked itself (`--lab URL`) instead of a daemon. What it answers is shown, never trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from madsci_registry._lab import Lab
from madsci_registry.errors import LabUnavailableError, NotFoundError

_Object = dict[str, Any]


class LabRegistry:
    """A lab's registry, by the routes of its own (docs/lab.md). Every method raises LabUnavailableError, and what the
    lab refuses with."""

    def __init__(self, lab: Lab, host: str) -> None:
        """`host`: in whose name it is asked for changes."""
        self._lab = lab
        self._host = host

    def status(self) -> _Object:
        """Return how the lab is, and the hosts that it hears."""
        hosts = _list(self._lab.ask("GET", "/registry/hosts"), "hosts")
        return {**self._lab.ask("GET", "/registry/health"), "hosts": hosts}

    def entries(self, component_type: str | None) -> list[_Object]:
        """Return all components in the order of their names."""
        return list(self._pages("list", "entries", {"component_type": component_type}))

    def find(self, name_or_id: str) -> _Object:
        """Return the component with this name, else the one that ever had this ULID. Raises NotFoundError."""
        try:
            return self._lab.ask("POST", "/registry/lookup", {"name": name_or_id})
        except NotFoundError as error:
            no_name = error
        try:
            return self._lab.ask("POST", "/registry/lookup", {"id": name_or_id})
        except NotFoundError:
            raise no_name from None

    def history(self, name: str) -> list[_Object]:
        """Return the changes of a name and of its component, oldest first."""
        return list(self._pages("history", "events", {"name": name}))

    def conflicts(self, name: str | None, *, decided: bool) -> list[_Object]:
        """Return conflicts, of one name or all: those that nobody has decided, or all."""
        body: _Object = {"decided": decided} | ({} if name is None else {"after": [name, ""]})
        found = []
        for conflict in self._pages("conflicts", "conflicts", body):
            if name is not None and conflict.get("name") != name:
                break
            found.append(conflict)
        return found

    def merge(self, name: str, prefer: str) -> _Object:
        """Decide a conflict; return what the lab has under the name now."""
        return self._lab.ask("POST", "/registry/merge", {"host": self._host, "name": name, "prefer": prefer})

    def _pages(self, route: str, key: str, body: _Object) -> Iterator[_Object]:
        after: Any = None
        while True:
            given = {k: v for k, v in body.items() if v is not None} | ({} if after is None else {"after": after})
            page = self._lab.ask("POST", f"/registry/{route}", given)
            yield from _list(page, key)
            before, after = after, page.get("after")
            if after is None:
                return
            if after == before:
                raise LabUnavailableError(f"{self._lab} answered the same page of {key} twice")


def _list(answer: _Object, key: str) -> list[_Object]:
    items = answer.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise LabUnavailableError(f"what the lab answered has no list of {key}")
    return items
