"""How the client starts its threads."""

from __future__ import annotations

import _thread
from collections.abc import Callable


def start_thread(run: Callable[..., object], *arguments: object) -> bool:
    """Run a function in a thread of its own, which does not keep the interpreter from ending.

    Not by threading.Thread: its start() waits until the thread runs. A signal handler that raises in that wait, as
    Ctrl-C does, can come out of it as the RuntimeError "release unlocked lock", which looks as if no thread could be
    started while one was (seen with Python 3.11).

    Returns:
        False where none can be started: the interpreter ends, or there is no room for one.
    """
    try:
        _thread.start_new_thread(run, arguments)
    except RuntimeError:
        return False
    return True
