"""What the tests of the classic API share: managers that are put away, and a node as MADSci writes it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import environment
from madsci_registry import IdentityResolver, LocalRegistryManager, LockManager

ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER_ULID = "01BX5ZZKBKACTAV9WEVGEMMVRZ"


class Classic:
    """Makes managers and resolvers of one registry; a context manager that closes what they connect by."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry
        self._made: list[LocalRegistryManager] = []

    def __enter__(self) -> Classic:
        return self

    def __exit__(self, *_: object) -> None:
        for manager in self._made:
            manager._client.close()

    def manager(self, lock_manager: LockManager | None = None, registry: Path | None = None) -> LocalRegistryManager:
        """Make one more manager, of a holder of its own unless told otherwise."""
        self._made.append(LocalRegistryManager(registry or self.registry, lock_manager))
        return self._made[-1]

    def resolver(self, lab_url: str | None = None, manager: LocalRegistryManager | None = None) -> IdentityResolver:
        """Make one more resolver."""
        return IdentityResolver(lab_url, manager or self.manager())


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """Return all warnings that were logged."""
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


# How MADSci 0.8 starts a node (abstract_node_module) and a manager (manager_base): only a RegistryLockError is fatal.
NODE = """
import atexit, os, sys, time, weakref
{before}
from madsci_registry.identity_resolver import IdentityResolver
from madsci_registry.lock_manager import RegistryLockError

class Node:
    def __init__(self, name, retry_timeout, lab_url=None):
        self.name, self.id, self.resolver = name, "random", None
        try:
            self.resolver = IdentityResolver(lab_url=lab_url)
            {then}
            result = self.resolver.resolve_with_info(
                name=name, component_type="node", metadata={{"module_name": "arm"}}, retry_timeout=retry_timeout
            )
            self.id = result.id
            me = weakref.ref(self)
            atexit.register(lambda: me() is not None and me().close())
        except RegistryLockError:
            raise
        except Exception as error:
            print("went on after", repr(error), flush=True)

    def close(self):
        if self.resolver is not None:
            self.resolver.release(self.name)

    def __del__(self):
        try:
            self.close()
        except Exception as error:
            print("close raised", repr(error), flush=True)

began = time.monotonic()
try:
    node = Node("arm", float(sys.argv[1]), *sys.argv[2:])
except RegistryLockError as error:
    print(error.code, f"{{time.monotonic() - began:.1f}}", flush=True)
    raise
print(node.id, flush=True)
{after}
"""


@contextmanager
def node(
    *arguments: str, registry: Path, before: str = "", then: str = "", after: str = "sys.stdin.read()", **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Run NODE with warnings as errors: retry_timeout and lab_url as arguments; stdin, stdout and stderr are pipes."""
    pipe: Any = subprocess.PIPE
    program = NODE.format(before=before, then=then, after=after)
    command = [sys.executable, "-X", "dev", "-c", program, *arguments]
    env = environment(**{"MADSCI_REGISTRY_PATH": str(registry), "MADSCI_REGISTRY_AUTOSTART": "0", **env})
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()
