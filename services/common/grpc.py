"""gRPC servers and channels, all with the same options."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from relevo.core.errors import StartupError
from services.common.errors import ErrorInterceptor
from services.common.security import NO_SECURITY, Security
from services.common.token_channel import TokenChannel

MAX_MESSAGE_BYTES = 1 << 20

# A peer that is cut off or hangs is noticed after keepalive_time + keepalive_timeout. gRPC answers pings from its own
# threads, so a process that is merely busy is not taken for dead.
_KEEPALIVE: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 4000),
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.ping_timeout_ms", 4000),  # else one lost ping of gRPC's own keeps a dead peer alive for a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_LIMITS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_OPTIONS = [
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a coin toss between two servers
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
]
_CHANNEL_OPTIONS = [
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Registration:
    """A servicer and where it goes.

    Registration(kvtransfer_pb2_grpc.add_KvTransferServicer_to_server, servicer, "relevo.v1.KvTransfer")
    """

    add: Callable[[Any, Any], None]
    servicer: object
    name: str  # full name, as grpcurl and the health service know it


class GrpcServer:
    """A bound server: port taken, not started. Health is SERVING from start() to drain(), but for set_serving."""

    def __init__(self, server: grpc.aio.Server, address: str) -> None:
        self.address = address
        self._server = server
        self._names: list[str] = []
        self._is_draining = False
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def register(self, registration: Registration) -> None:
        """Add a servicer; before start()."""
        registration.add(registration.servicer, self._server)
        self._names.append(registration.name)

    async def start(self) -> None:
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Tell health watchers that this server is leaving; calls are still served."""
        self._is_draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def set_serving(self, is_serving: bool) -> None:
        """Tell health watchers whether calls get anywhere. Changes nothing once drain() was called."""
        if not self._is_draining:
            status = health_pb2.HealthCheckResponse
            await self._set_health(status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, wait up to grace_seconds for those in progress, then cancel them."""
        await self.drain()
        await self._server.stop(grace_seconds)

    async def _set_health(self, status: Any) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)


def make_server(
    registrations: Sequence[Registration],
    host: str,
    port: int,
    security: Security = NO_SECURITY,
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> GrpcServer:
    """A server with health (service "" and each name) and reflection, bound to host:port (0: any that is free).

    interceptors: more of them, inside those that translate errors and keep strangers out

    Raises StartupError if the port cannot be had. Must be called inside the event loop that will run it.
    """
    _check_free(host, port)
    everyone = (ErrorInterceptor(), *security.interceptors(), *interceptors)
    server = grpc.aio.server(interceptors=everyone, options=_SERVER_OPTIONS)
    credentials = security.server_credentials()
    try:
        if credentials is None:
            bound = server.add_insecure_port(format_address(host, port))
        else:
            bound = server.add_secure_port(format_address(host, port), credentials)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    result = GrpcServer(server, format_address(host, bound))
    for registration in registrations:
        result.register(registration)
    return result


def make_channel(address: str, security: Security = NO_SECURITY) -> grpc.aio.Channel:
    """A channel to host:port. Reconnects by itself, at most a second apart. Close it.

    A token of `security` goes with each call.
    """
    credentials = security.channel_credentials()
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
    return TokenChannel(channel, security.metadata) if security.metadata else channel


class _Cancellable(Protocol):
    def cancel(self) -> bool: ...


C = TypeVar("C", bound=_Cancellable)


@contextmanager
def cancelling(call: C) -> Iterator[C]:
    """Ends the call when the block is left. Leaving an `async for` over a call does not."""
    try:
        yield call
    finally:
        call.cancel()


def format_address(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _check_free(host: str, port: int) -> None:
    """Say clearly why an address cannot be had; gRPC itself would only log lines of its own."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
