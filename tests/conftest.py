"""Fixtures: a registry in a folder of its own, a daemon on it; and the check that nothing of ours is left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

import etcd
from classic import Classic
from forwarding import Forwarding
from helpers import DaemonProcess, FakeClock, Worker, daemons_under, end_daemons_under, environment
from lab_stores import STORES, Stores
from lab_stub import LabStub
from labs import LabProcess
from labs import client as lab_client
from madsci_registry import RegistryClient
from madsci_registry_lab.etcd_access import parse
from madsci_registry_lab.etcd_store import EtcdStore
from madsci_registry_lab.store import LabStore
from raw_client import RawProcess
from real_madsci import real_madsci
from sandbox import Sandbox
from turned_clock import TurnedDaemon


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting of the user reaches a test; what it starts finds our packages; autostart is allowed anywhere."""
    clean = environment(MADSCI_REGISTRY_AUTOSTART="1", HOME=str(tmp_path_factory.mktemp("home")))
    os.environ.clear()
    os.environ.update(clean)


@pytest.fixture(scope="session")
def base_folder() -> Iterator[Path]:
    """A short path (socket addresses are), under which every registry of this run is; no daemon of it survives."""
    folder = Path(tempfile.mkdtemp(prefix="madsci-")).resolve()
    folder.chmod(0o711)  # tests of several users open what lies in it
    yield folder
    left = daemons_under(folder)
    end_daemons_under(folder)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"daemons outlived their tests: {left}"


@pytest.fixture(scope="session")
def installed() -> Iterator[Path]:
    """The folder of the programs in an environment with MADSci and our wheel."""
    with real_madsci() as programs:
        yield programs


@pytest.fixture
def registry_path(base_folder: Path) -> Iterator[Path]:
    """The path of a registry that does not exist yet, in a folder of its own; its daemons end with the test."""
    folder = Path(tempfile.mkdtemp(dir=base_folder))
    yield folder / "registry.json"
    end_daemons_under(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def daemon(registry_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that serves `registry_path`."""
    with DaemonProcess(registry_path) as running:
        yield running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProcess]:
    """A lab that the tests of a module share; each has names of its own."""
    with LabProcess(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture
def http(served: LabProcess) -> Iterator[httpx.Client]:
    """A client of that lab."""
    with lab_client(served.url) as made:
        yield made


@pytest.fixture
def turned(registry_path: Path) -> Iterator[TurnedDaemon]:
    """A daemon whose clock can be turned."""
    daemon = TurnedDaemon(registry_path)
    with daemon:
        yield daemon


@pytest.fixture
def raw(turned: TurnedDaemon) -> Iterator[Callable[[], RawProcess]]:
    """Makes clients that speak by hand, each in a process of its own: `raw()` is one more."""
    with ExitStack() as stack:

        def make() -> RawProcess:
            return stack.enter_context(RawProcess(turned.socket))

        yield make


@pytest.fixture
def workers(registry_path: Path) -> Iterator[Workers]:
    """Makes client processes of the registry: `workers()` is one more."""
    made = Workers(registry_path)
    yield made
    made.end()


@pytest.fixture
def classic(daemon: DaemonProcess) -> Iterator[Classic]:
    """Managers of a registry that is served."""
    with Classic(daemon.registry) as made:
        yield made


@pytest.fixture
def plain(daemon: DaemonProcess) -> Iterator[RegistryClient]:
    """A client that looks on."""
    with RegistryClient(daemon.registry) as client:
        yield client


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A system of its own with a systemd, where one can be booted here."""
    with Sandbox() as booted:
        yield booted


@pytest.fixture
def clock() -> FakeClock:
    """A clock that a test turns."""
    return FakeClock()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Forwarding]:
    """A host whose lab is there and has all."""
    with Forwarding(tmp_path) as forwarding:
        forwarding.keepalive()
        yield forwarding


@pytest.fixture(params=STORES)
def stores(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> Iterator[Stores]:
    """A lab's store that can be opened, closed and set back, of each kind."""
    with STORES[request.param](tmp_path, clock) as made:
        yield made


@pytest.fixture
def store(stores: Stores) -> LabStore:
    """Such a store, open."""
    return stores.open()


@pytest.fixture
def etcd_url() -> str:
    """The setting of a lab that is not there yet, in an etcd that tests share."""
    return etcd.fresh_url()


@pytest.fixture
def replica(etcd_url: str, clock: FakeClock) -> Iterator[Callable[[], EtcdStore]]:
    """Makes replicas of that lab: `replica()` is one more."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(closing(EtcdStore(parse(etcd_url), clock)))


@pytest.fixture
def lab() -> Iterator[LabStub]:
    """A lab registry."""
    with LabStub() as stub:
        yield stub


class Workers:
    """Client processes of one registry, all ended with the test."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry
        self.made: list[Worker] = []

    def __call__(self, **extra_env: str) -> Worker:
        self.made.append(Worker(self.registry, **extra_env))
        return self.made[-1]

    def end(self) -> None:
        for worker in self.made:
            worker.__exit__()
