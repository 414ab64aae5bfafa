"""A lab's store on a real etcd, for the tests that every store has to pass."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from etcd import WHY_NOT, Cluster, control, fresh_url, is_here, shared
from helpers import FakeClock
from madsci_registry_lab.etcd_access import parse
from madsci_registry_lab.etcd_store import EtcdStore
from madsci_registry_lab.store import LabStore


class EtcdStores:
    """A prefix of its own in an etcd that tests share, until it is set back: that is an etcd of its own. A context
    manager."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        if not is_here():
            pytest.skip(WHY_NOT)
        self._folder = folder
        self._clock = clock
        self._prefix = fresh_url().rpartition("/")[2]
        self._cluster = shared()
        self._open = ExitStack()
        self._own = ExitStack()

    def __enter__(self) -> EtcdStores:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._own.close()

    @property
    def url(self) -> str:
        """The setting of a lab that uses it."""
        return f"{self._cluster.url}/{self._prefix}"

    def open(self) -> LabStore:
        """Open what is there, as a start of a lab does; once more: another replica."""
        store = EtcdStore(parse(self.url), self._clock)
        self._open.callback(store.close)
        return store

    def close(self) -> None:
        """Close it, as the end of a lab does."""
        self._open.close()

    def back_up(self) -> None:
        """Keep a copy of what is there."""
        self._cluster.control("snapshot", "save", str(self._folder / "backup"))

    def restore(self) -> None:
        """Go on with an etcd that was made of that copy; it must be closed."""
        cluster = Cluster(self._folder, 1)
        member = cluster.members[0]
        control(
            "snapshot", "restore", str(self._folder / "backup"), "--name", member.name,
            "--data-dir", str(self._folder / member.name), "--initial-advertise-peer-urls", member.peer,
            "--initial-cluster", f"{member.name}={member.peer}", "--initial-cluster-token", self._folder.name,
        )  # fmt: skip
        self._cluster = self._own.enter_context(cluster)
