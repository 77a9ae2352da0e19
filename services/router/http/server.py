"""uvicorn inside our own process life: our socket, our signals, our logs, our limits on clients."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry

from relevo.core.errors import StartupError
from services.common.lifecycle import Process
from services.router.http.connection import ConnectionLimits, ConnectionMetrics, limited_protocol, watch_connections

_TLS_HANDSHAKE_SECONDS = 10.0
_TLS_SHUTDOWN_SECONDS = 5.0
_BACKLOG = 2048


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """tls: None = plain HTTP. keep_alive_seconds: between two requests. drain_seconds: at shutdown, for answers"""

    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    tls: ssl.SSLContext | None = None
    keep_alive_seconds: float = 30.0
    drain_seconds: float = 10.0


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket. Who connects before the server runs waits. Raises StartupError if it cannot be had.

    shared: other processes of this user may listen there as well; the kernel deals connections out among those that
    listen. So this one does not yet: who connects is served at once by one that is ready.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            if not shared:
                listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --http-host or --http-port"
        ) from error
    listener.setblocking(False)
    return listener


def load_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """None: neither was given. Raises StartupError naming the flag."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise StartupError("--http-tls-cert and --http-tls-key belong together: give both, or neither")
    for flag, path in (("--http-tls-cert", cert), ("--http-tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise StartupError(f"{flag} {path}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password="")  # else it would ask for one at the terminal
    except (ssl.SSLError, ValueError) as error:
        raise StartupError(
            f"--http-tls-cert {cert} and --http-tls-key {key} are no certificate and its key, in PEM, without a"
            f" passphrase: {error}"
        ) from error
    return context


async def start_http(
    app: Any, listener: socket.socket, process: Process, options: HttpOptions, registry: CollectorRegistry
) -> None:
    """Serve the ASGI app; returns when it does. At shutdown: no new connection, drain_seconds for the answers begun.

    registry: gets the figures of connections
    """
    server = make_server(app, options, registry)
    process.spawn(watch_connections(server.server_state.connections, options.limits), "connections")
    task = process.spawn(server.serve(sockets=[listener]), "http")
    process.stack.push_async_callback(_stop, server, task)
    await server.listening.wait()


def make_server(app: Any, options: HttpOptions, registry: CollectorRegistry) -> HttpServer:
    config = uvicorn.Config(
        app,
        http=limited_protocol(options.limits, ConnectionMetrics(registry)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=options.keep_alive_seconds,  # type: ignore[arg-type]  # call_later takes fractions
        timeout_graceful_shutdown=math.ceil(options.drain_seconds),
    )
    return HttpServer(config, options.tls)


async def _stop(server: HttpServer, task: asyncio.Task[None]) -> None:
    server.should_exit = True
    await asyncio.wait((task,))


class HttpServer(uvicorn.Server):
    """tls: uvicorn would read its files itself, and give a client a minute for the handshake."""

    def __init__(self, config: uvicorn.Config, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._tls = tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, without its ways of getting sockets."""
        assert sockets is not None
        loop = asyncio.get_running_loop()
        handshake: dict[str, Any] = {}
        if self._tls is not None:
            handshake = {
                "ssl": self._tls,
                "ssl_handshake_timeout": _TLS_HANDSHAKE_SECONDS,
                "ssl_shutdown_timeout": _TLS_SHUTDOWN_SECONDS,
            }
        self.servers = [
            await loop.create_server(self._make_protocol, sock=listener, backlog=_BACKLOG, **handshake)
            for listener in sockets
        ]
        self.started = True
        self.listening.set()

    def _make_protocol(self) -> asyncio.Protocol:
        protocol_class: Any = self.config.http_protocol_class
        made: asyncio.Protocol = protocol_class(config=self.config, server_state=self.server_state, app_state={})
        return made
