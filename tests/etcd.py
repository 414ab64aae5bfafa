"""Debian's etcd on 127.0.0.1, one member or three, in a temporary folder; and how it gets here.

It is found on the PATH, or where `python tests/etcd.py` has unpacked Debian's package: into the virtual environment, so
that no service is installed and `make clean` removes it. Where there is neither, tests that need it are skipped.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import httpx

from helpers import PATIENCE_S, until

UNPACKED = Path(sys.prefix) / "etcd"
PACKAGES = ("etcd-server", "etcd-client")
PACKAGE_S = 60.0
"""How long each step to the package may take: where there is no network, the tests that need it are skipped."""
WHY_NOT = "needs etcd: `python tests/etcd.py` unpacks Debian's package (apt-get and dpkg-deb)"
_numbers = itertools.count()
_DIES_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.execve(sys.argv[1], sys.argv[1:], {'GOMAXPROCS': '2', 'ETCD_UNSUPPORTED_ARCH': 'arm64'})"
)


def program(name: str = "etcd") -> str | None:
    """Return the path of `etcd` or `etcdctl`; None: it is not here."""
    return shutil.which(name) or shutil.which(name, path=str(UNPACKED / "usr" / "bin"))


def is_here() -> bool:
    """Tell whether tests can use it."""
    return program("etcd") is not None and program("etcdctl") is not None


def unpack() -> bool:
    """Get Debian's package and unpack it, where it is missing; tell whether etcd is here now."""
    if is_here():
        return True
    if not all(shutil.which(tool) for tool in ("apt-get", "dpkg-deb")):
        return False
    with tempfile.TemporaryDirectory() as folder, suppress(subprocess.TimeoutExpired):
        for before in ([], ["apt-get", "--quiet", "update"]):
            if before:
                subprocess.run(before, check=False, timeout=PACKAGE_S)
            download = ["apt-get", "--quiet", "download", *PACKAGES]
            if subprocess.run(download, cwd=folder, check=False, timeout=PACKAGE_S).returncode == 0:
                break
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(UNPACKED)], check=True)
    return is_here()


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Member:
    """One member; started again, it has the same folder and ports."""

    def __init__(self, name: str, folder: Path, client: str, peer: str, options: list[str]) -> None:
        self.name, self.client, self.peer = name, client, peer
        self.folder = folder
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; do not wait until it serves."""
        found = program()
        assert found
        command = [
            found, "--name", self.name, "--data-dir", str(self.folder / self.name),
            "--listen-client-urls", self.client, "--advertise-client-urls", self.client,
            "--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer,
            "--experimental-watch-progress-notify-interval", "1s", "--logger", "zap", "--log-level", "error",
            *self.options,
        ]  # fmt: skip
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIES_WITH_PARENT, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def signal(self, number: int) -> None:
        """Send it a signal (SIGSTOP, SIGCONT)."""
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL and reap, if it runs."""
        if self._process:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / f"{self.name}.log").read_text()

    def check_alive(self) -> None:
        assert self._process
        assert self._process.poll() is None, f"etcd ended with {self._process.returncode}:\n{self.log[-2000:]}"


class Cluster:
    """Members that are one etcd. A context manager."""

    def __init__(self, folder: Path, size: int = 1, *options: str, tls: Path | None = None) -> None:
        """`tls`: a folder with ca.pem, member.pem, member.key; clients show a certificate of that authority."""
        self.folder = folder
        self._tls = tls
        scheme = "http" if tls is None else "https"
        ports = free_ports(2 * size)
        peers = [f"http://127.0.0.1:{port}" for port in ports[size:]]
        cluster = ",".join(f"m{n}={peer}" for n, peer in enumerate(peers))
        given = ["--initial-cluster", cluster, "--initial-cluster-token", folder.name, *options]
        if tls is not None:
            given += ["--cert-file", f"{tls}/member.pem", "--key-file", f"{tls}/member.key"]
            given += ["--trusted-ca-file", f"{tls}/ca.pem", "--client-cert-auth"]
        self.members = [
            Member(f"m{n}", folder, f"{scheme}://127.0.0.1:{ports[n]}", peers[n], given) for n in range(size)
        ]

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """The setting of a lab that uses it."""
        return "etcd://" + ",".join(member.client.partition("//")[2] for member in self.members)

    def start(self) -> Cluster:
        """Start all members and wait until each serves."""
        for member in self.members:
            member.start()
        for member in self.members:
            self.wait_for(member)
        return self

    def wait_for(self, member: Member) -> None:
        """Wait until a member serves, with a leader."""
        with self.http() as http:
            until(lambda: _is_healthy(http, member), f"for etcd {member.name}:\n{member.log[-2000:]}")

    def http(self) -> httpx.Client:
        """Return what speaks with members."""
        if self._tls is None:
            return httpx.Client(trust_env=False, timeout=2.0)
        import ssl

        context = ssl.create_default_context(cafile=str(self._tls / "ca.pem"))
        context.load_cert_chain(self._tls / "member.pem", self._tls / "member.key")
        return httpx.Client(trust_env=False, timeout=2.0, verify=context)

    def leader(self) -> Member:
        """Wait until there is a leader; return it."""
        found: Member = until(self._leader, "for a leader")
        return found

    def _leader(self) -> Member | None:
        with self.http() as http:
            for member in self.members:
                try:
                    status = http.post(f"{member.client}/v3/maintenance/status", json={}).json()
                except httpx.HTTPError:
                    continue
                if "leader" in status and status["leader"] == status["header"]["member_id"]:
                    return member
        return None

    def kill(self) -> None:
        """SIGKILL all."""
        for member in self.members:
            member.kill()

    def control(self, *arguments: str) -> str:
        """Run etcdctl on the first member; return what it prints."""
        return control(*arguments, "--endpoints", self.members[0].client)


def control(*arguments: str) -> str:
    """Run etcdctl; return what it prints."""
    found = program("etcdctl")
    assert found
    done = subprocess.run(
        [found, *arguments], env={"ETCDCTL_API": "3"}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _is_healthy(http: httpx.Client, member: Member) -> bool:
    member.check_alive()
    try:
        return str(http.get(f"{member.client}/health").json().get("health")) == "true"
    except (httpx.HTTPError, ValueError):
        return False


@functools.cache
def shared() -> Cluster:
    """Return one member that the tests of a process share, each under a prefix of its own."""
    folder = Path(tempfile.mkdtemp(prefix="madsci-etcd-"))
    cluster = Cluster(folder)

    def end() -> None:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return cluster.start()


def fresh_url() -> str:
    """Return the setting of a lab that is not there yet, in that member."""
    return f"{shared().url}/lab-{next(_numbers)}"


def paused(member: Member) -> _Paused:
    """A context in which a member stands still."""
    return _Paused(member)


class _Paused:
    def __init__(self, member: Member) -> None:
        self._member = member

    def __enter__(self) -> None:
        self._member.signal(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        self._member.signal(signal.SIGCONT)


if __name__ == "__main__":
    print(program() if unpack() else f"no etcd here: {WHY_NOT}")
