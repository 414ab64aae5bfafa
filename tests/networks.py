"""A network of its own for tests: a lab and its hosts in network namespaces, each host joined to the lab by one cable.

A cable is a pair of veth devices that can be cut: then nothing arrives any more, and nobody is told. The addresses are
of TEST-NET-1 (RFC 5737), in namespaces that lead nowhere else. Unix sockets are reached from anywhere.
"""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import pytest

from helpers import DaemonProcess
from labs import LabProcess
from namespaces import Namespace


@lru_cache(maxsize=1)
def _why_not() -> str | None:
    """Say what this machine lacks; None: nothing."""
    if os.geteuid() != 0:
        return "needs root: unshare --net"
    try:
        made = "ip link set lo up && ip link add name left type veth peer name right"
        done = subprocess.run(["unshare", "--net", "sh", "-c", made], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "needs unshare (util-linux)"
    return f"network namespaces with veth do not work here: {done.stderr.strip()}" if done.returncode else None


def need_networks() -> None:
    """Skip the test, with what is missing, where no network can be made."""
    why = _why_not()
    if why:
        pytest.skip(why)


class NetNamespace(Namespace):
    """A network namespace with nothing in it but its own loopback: what is started within `entered()` is in it, and the
    sockets that are made there."""

    kind = "net"
    unshare = ["unshare", "--net"]

    def __enter__(self) -> NetNamespace:
        super().__enter__()
        self.run("ip", "link", "set", "lo", "up")
        return self


class ReachableLab(LabProcess):
    """A lab that listens on all addresses that there are where it is started; with tokens."""

    def __init__(self, folder: Path, tokens: dict[str, str]) -> None:
        file = folder / "tokens"
        file.write_text("".join(f"{host} {token}\n" for host, token in tokens.items()))
        super().__init__(folder, "--token-file", str(file))

    def command(self) -> list[str]:
        return [part.replace("127.0.0.1:", "0.0.0.0:") for part in super().command()]

    def _port(self, start: int) -> str | None:
        self.check_alive()
        found = re.search(r"serving on 0\.0\.0\.0 port (\d+)", self.log[start:])
        return found[1] if found else None


class NetworkedDaemon(DaemonProcess):
    """A daemon in a namespace, known to the lab by a name with a token."""

    def __init__(self, folder: Path, namespace: NetNamespace, name: str, token: str, url: str) -> None:
        folder.mkdir()
        super().__init__(folder / "registry.json")
        file = folder / "lab.token"
        file.write_text(f"{name} {token}\n")
        file.chmod(0o600)
        given = {"LAB_URL": url, "LAB_TOKEN_FILE": str(file), "EXPORT": "false"}
        self.extra_env = {f"MADSCI_REGISTRYD_{key}": value for key, value in given.items()}
        self.namespace = namespace

    def spawn(self) -> None:
        with self.namespace.entered():
            super().spawn()


class LabNetwork:
    """A lab and its hosts, by name, with the cables between them. A context manager; all run from the beginning."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self.folder = folder
        self.hosts: dict[str, NetworkedDaemon] = {}
        self._names = hosts
        self._stack = ExitStack()

    def __enter__(self) -> LabNetwork:
        with ExitStack() as stack:
            self._centre = stack.enter_context(NetNamespace())
            tokens = {name: f"token-of-{name}-0123456789" for name in self._names}
            lab = ReachableLab(self.folder, tokens)
            with self._centre.entered():
                stack.enter_context(lab)
            for number, name in enumerate(self._names):
                namespace = stack.enter_context(NetNamespace())
                address = self._join(namespace, name, number)
                url = f"http://{address}:{lab.port}"
                daemon = NetworkedDaemon(self.folder / name, namespace, name, tokens[name], url)
                self.hosts[name] = daemon
                stack.enter_context(daemon)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _join(self, namespace: NetNamespace, name: str, number: int) -> str:
        """Lay a cable from the lab to a host; return the lab's address at its end."""
        ours, theirs = f"192.0.2.{4 * number + 1}", f"192.0.2.{4 * number + 2}"
        device = f"to-{name}"
        self._centre.run(
            "ip", "link", "add", "name", device, "type", "veth", "peer", "name", "lab", "netns", str(namespace.pid)
        )
        for where, end, address in ((self._centre, device, ours), (namespace, "lab", theirs)):
            where.run("ip", "address", "add", f"{address}/30", "dev", end)
            where.run("ip", "link", "set", end, "up")
        return ours

    def cut(self, name: str) -> None:
        """Cut a host's cable."""
        self._centre.run("ip", "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Mend it."""
        self._centre.run("ip", "link", "set", f"to-{name}", "up")
