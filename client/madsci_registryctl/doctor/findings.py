"""What `doctor` finds: one value for each thing it looked at, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Level = Literal["ok", "note", "warning", "error"]
"""note: good to know; warning: it works, but not as well as it could; error: something does not work or is not safe."""
LEVELS: tuple[Level, ...] = get_args(Level)
"""From harmless to bad."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what was found."""

    level: Level
    check: str
    """What was looked at, in a word or two."""
    found: str
    fix: str | None = None
    """What a person can do about it; None: nothing needs to be done."""

    @property
    def word(self) -> str:
        """What people see in front of it."""
        return self.level

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trial(Finding):
    """One thing that the crash test tried and measured."""

    times_ms: tuple[float, ...] = ()
    """What was measured, each time that it was tried."""
    promise_ms: float = 0.0
    broken: tuple[str, ...] = ()
    """The promises of safety that did not hold. A time that is too long is none."""

    @property
    def word(self) -> str:
        """OK, SLOW or FAILED."""
        return {"ok": "OK", "warning": "SLOW"}.get(self.level, "FAILED")


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level of all, ok where there is none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
