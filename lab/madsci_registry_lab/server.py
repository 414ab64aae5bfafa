"""The lab registry as a process: uvicorn on one socket, ended by SIGTERM or when the store has failed."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import uvicorn

from madsci_registry_lab.connection import CONNECTIONS_MAX, Connection
from madsci_registry_lab.faults import BAD_CONFIGURATION, IN_USE, IO_ERROR, Fault
from madsci_registry_lab.registry import LabRegistry
from madsci_registry_lab.settings import Settings

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)

OTHER_FILES = 64
"""That the program has open besides connections."""
IDLE_S = 75
"""How long a connection may be idle: a host speaks each 5 s, and shall not meet a connection that is just closed."""
GRACE_S = 5
"""How long requests may take to end when the program does."""


class _Server(uvicorn.Server):
    """Uvicorn, which ends the requests that wait before it waits for them, and looks after the store."""

    def __init__(self, config: uvicorn.Config, registry: LabRegistry) -> None:
        super().__init__(config)
        self._registry = registry

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at a signal, with status 0; uvicorn would die of it in the end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:
            host, port = sockets[0].getsockname()[:2]
            log.info("serving on %s port %s", host, port)

    async def on_tick(self, counter: int) -> bool:
        if self.should_exit or self._registry.failed:
            self._registry.feed.end()
        return await super().on_tick(counter) or bool(self._registry.failed)


def serve(settings: Settings) -> int:
    """Serve until told to stop; return the exit status.

    Raises:
        Fault: it cannot begin.
    """
    _log_to_stderr(settings.log_level)
    with (
        closing(_listen(*settings.address)) as listener,
        closing(LabRegistry(settings.store, etcd=settings.etcd, token_file=settings.token_file)) as registry,
    ):
        return _run(settings, listener, registry)


def _run(settings: Settings, listener: socket.socket, registry: LabRegistry) -> int:
    config = uvicorn.Config(
        registry.app(only_loopback=settings.token_file is None),
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=min(CONNECTIONS_MAX, _files_max() - OTHER_FILES),
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=IDLE_S,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise Fault(BAD_CONFIGURATION, f"tls_cert or tls_key cannot be used: {error}") from None
    asyncio.run(_Server(config, registry).serve(sockets=[listener]))
    return IO_ERROR if registry.failed else 0


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the store is opened: who cannot listen changes nothing."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol said, asyncio sends small answers at once; else each would wait 40 ms for an ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise Fault(IN_USE, f"listen: {host} port {port}: {error.strerror}") from None


def _files_max() -> int:
    """Have as many files open as the system lets this program; return how many that is."""
    if sys.platform == "win32":
        return CONNECTIONS_MAX + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def _log_to_stderr(level: str) -> None:
    """Log lines, without what requests hold: no URL, no header; and no line for each request that is none."""
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s level=%(levelname)s at=%(name)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
