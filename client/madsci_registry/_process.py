"""Which process this is, in a way that a fork cannot hide: a child in a new PID namespace may have its parent's pid."""

from __future__ import annotations

import os

_mark = object()
"""Another one in each forked child; compared by identity."""


def this_process() -> tuple[object, int]:
    """Return what equals itself in this process alone. The pid tells a child that was forked past Python's hooks."""
    return _mark, os.getpid()


def _renew() -> None:
    global _mark
    _mark = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
