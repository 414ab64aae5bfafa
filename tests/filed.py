"""The daemon's core with its registry.json, on one clock to turn: passes are made in the turn that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import FakeClock
from madsci_registryd import fragments
from madsci_registryd.bridge import Bridge
from madsci_registryd.clock import iso
from madsci_registryd.export import Export, Job
from old_program import OldProgram
from pair import Pair


class FiledPair(Pair):
    """A pair that keeps `folder`/registry.json. `turn` makes the passes that are due."""

    def __init__(self, folder: Path, clock: FakeClock | None = None) -> None:
        self.registry = folder / "registry.json"
        self.jobs: list[Job] = []
        self.hold_passes = False
        """Passes that are asked for wait until this is False again."""
        super().__init__(folder / "registry.db", clock)

    def _open(self) -> None:
        super()._open()
        self.jobs.clear()
        claim = fragments.claim(4242, "here", self.core.epoch, iso(self.clock.wall()))
        self.export = Export(self.registry, self.clock, claim, str(self.core.store.meta("created_at")))
        self.bridge = Bridge(self.core, self.export, self.jobs.append)
        self.core.service.old_programs = self.bridge
        self.bridge.open()

    def commit(self) -> None:
        self.turn()

    def turn(self) -> None:
        super().turn()
        for _ in range(20):
            self.bridge.pump()
            if self.hold_passes:
                return
            if self.jobs:
                self.bridge.done(self.export.run(self.jobs.pop(0)), was_asked=True)
            elif self.export.has_changed():
                result = self.export.run(Job())
                self.bridge.done(result, was_asked=False)
                if result.failed:
                    super().turn()
                    return  # the next look comes later
            else:
                return
            super().turn()
        raise AssertionError("the daemon does not come to rest")

    def kill(self) -> None:
        """The daemon dies: what is in memory is gone, nothing is written any more. `revive` starts the next one."""
        self.export.close()
        self.core.close()

    def revive(self) -> None:
        self._open()

    def restart(self) -> None:
        self.kill()
        self.revive()

    def close(self) -> None:
        self.kill()

    def stop(self) -> None:
        """The daemon ends in order."""
        self.bridge.close()
        self.core.close()

    def old(self, pid: int = 100) -> OldProgram:
        return OldProgram(self.registry, self.clock.wall, pid)

    def get_state(self, name: str) -> str:
        row = self.core.store.by_name(name)
        assert row is not None
        return "held" if row.lock or row.old_lock else "free"

    def entry(self, name: str) -> dict[str, Any]:
        """Return what the file says of a name."""
        return dict(self.old().read()["entries"][name])

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.old().edit(change)
