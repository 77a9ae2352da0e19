"""uvicorn inside our own process life: our socket, our signals, our logs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from relevo.core.errors import StartupError
from services.common.lifecycle import Process


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket. Who connects before the server runs waits. Raises StartupError if it cannot be had.

    shared: other processes of this user may listen there as well; the kernel deals connections out among them
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
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


async def start_http(app: Any, listener: socket.socket, process: Process, drain_seconds: float) -> None:
    """Serve the ASGI app; returns when it does. At shutdown: no new connection, drain_seconds for the answers begun."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(drain_seconds),
    )
    server = _Server(config)
    task = process.spawn(server.serve(sockets=[listener]), "http")
    process.stack.push_async_callback(_stop, server, task)
    await server.listening.wait()


async def _stop(server: _Server, task: asyncio.Task[None]) -> None:
    server.should_exit = True
    await asyncio.wait((task,))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()
