"""Three members of etcd in network namespaces of their own, whose cables can be cut. For tests as root."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

from etcd import Cluster, Member
from helpers import PATIENCE_S
from networks import NetNamespace


class _CabledMember(Member):
    """A member in a network namespace."""

    def __init__(self, name: str, folder: Path, address: str, options: list[str]) -> None:
        super().__init__(name, folder, f"http://{address}:2379", f"http://{address}:2380", options)
        self.address = address
        self.namespace = NetNamespace()

    def start(self) -> None:
        with self.namespace.entered():
            super().start()


class CabledCluster(Cluster):
    """Three members, each in a network namespace of its own, joined by a switch in the one that the main thread is in:
    that must be one of the test's, too. A context manager. (The addresses are of TEST-NET-1.)"""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3)
        self._stack = ExitStack()
        addresses = [f"192.0.2.{n + 2}" for n in range(3)]
        cluster = ",".join(f"m{n}=http://{address}:2380" for n, address in enumerate(addresses))
        given = ["--initial-cluster", cluster, "--initial-cluster-token", folder.name]
        self._cabled = [_CabledMember(f"m{n}", folder, address, given) for n, address in enumerate(addresses)]
        self.members = [*self._cabled]

    def __enter__(self) -> CabledCluster:
        with ExitStack() as stack:
            _run("ip", "link", "add", "name", "switch", "type", "bridge")
            _run("ip", "address", "add", "192.0.2.1/24", "dev", "switch")
            _run("ip", "link", "set", "switch", "up")
            for member in self._cabled:
                stack.enter_context(member.namespace)
                self._join(member)
            stack.callback(self.kill)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _join(self, member: _CabledMember) -> None:
        device, pid = f"to-{member.name}", str(member.namespace.pid)
        _run("ip", "link", "add", "name", device, "type", "veth", "peer", "name", "lab", "netns", pid)
        _run("ip", "link", "set", device, "master", "switch")
        _run("ip", "link", "set", device, "up")
        member.namespace.run("ip", "address", "add", f"{member.address}/24", "dev", "lab")
        member.namespace.run("ip", "link", "set", "lab", "up")

    def cut(self, member: Member) -> None:
        """Cut a member's cable: what is sent is lost, and nobody is told."""
        _run("ip", "link", "set", f"to-{member.name}", "down")

    def join_again(self, member: Member) -> None:
        """Mend it."""
        _run("ip", "link", "set", f"to-{member.name}", "up")


def _run(*command: str) -> None:
    """Run a command in the namespace of this thread."""
    subprocess.run(command, check=True, timeout=PATIENCE_S, capture_output=True)
