"""Putting an agent together."""

from __future__ import annotations

from dataclasses import dataclass

from relevo.core.errors import StartupError
from services.common.grpc import Registration, format_address, make_server
from services.common.lifecycle import Process
from services.common.telemetry import make_registry, serve_metrics
from services.kvtransfer.arena import Arena
from services.kvtransfer.config import KvTransferSettings
from services.kvtransfer.metrics import StoreCollector
from services.kvtransfer.servicer import KvTransferServicer, PullTokens
from services.kvtransfer.store import Store
from services.kvtransfer.transports.tcp import TcpDataServer, listen
from services.pb import kvtransfer_pb2_grpc

_ANY_HOST = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Agent:
    address: str  # under which workers and other agents reach it
    store: Store


async def start_agent(settings: KvTransferSettings, process: Process) -> Agent:
    """Start serving; what must end is on the process's stack. Raises StartupError."""
    host = settings.advertise_host or settings.host
    if host in _ANY_HOST:
        raise StartupError(f"--host {settings.host} is no address to be reached at: give --advertise-host as well")
    arena = Arena(settings.arena_dir, settings.kv_arena)
    process.stack.callback(arena.close)
    store = Store(arena, process.incarnation)

    tokens = PullTokens()
    listener = listen(settings.host, settings.data_port)
    process.stack.callback(listener.close)
    data_server = TcpDataServer(arena, tokens, listener, format_address(host, listener.getsockname()[1]))
    process.spawn(data_server.run(), "data port")

    server = make_server([], settings.host, settings.port)
    address = format_address(host, server.port)
    servicer = KvTransferServicer(store, tokens, data_server, address=address, pin_seconds=settings.pin_seconds)
    add = kvtransfer_pb2_grpc.add_KvTransferServicer_to_server
    server.register(Registration(add, servicer, "relevo.v1.KvTransfer"))
    await server.start()
    process.stack.push_async_callback(server.stop, settings.drain_seconds)

    if settings.metrics_port is not None:
        registry = make_registry()
        registry.register(StoreCollector(store))
        _, stop_metrics = serve_metrics(registry, settings.host, settings.metrics_port)
        process.stack.callback(stop_metrics)
    return Agent(address, store)
