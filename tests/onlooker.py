"""What a bystander sees of a registry: who holds a name, who waits for it, what became of it."""

from __future__ import annotations

from pathlib import Path

from helpers import Worker, until
from madsci_registry import RegistryClient, SessionInfo


def token_of(registry: Path, name: str = "arm") -> int | None:
    """Return the token of the lock of a name, None where it is free, after the daemon has looked at the time."""
    with RegistryClient(registry, autostart=False) as client:
        client.lookup(name)  # a turn of the loop ends; the next begins with what is due
        return client.get(name).fencing_token


def holding_session(registry: Path) -> SessionInfo:
    """Return the only session that holds something."""
    with RegistryClient(registry, autostart=False) as client:
        (found,) = [session for session in client.sessions() if session.held]
        return found


def await_resume(registry: Path) -> None:
    """Wait until the only session that holds something is connected."""
    until(lambda: holding_session(registry).attached, "for the holder to resume")


def let_wait(worker: Worker, registry: Path, name: str = "arm") -> None:
    """Let a worker wait for a name that nobody else waits for; return when it does."""
    worker.tell("resolve", name, wait=60)
    with RegistryClient(registry, autostart=False) as client:
        until(lambda: client.get(name).waiting == 1, "for the waiter to wait")


def kinds_of(registry: Path, name: str = "arm") -> list[str]:
    """List the kinds of what happened to a name."""
    with RegistryClient(registry, autostart=False) as client:
        return [event.kind for event in client.history(name)]
