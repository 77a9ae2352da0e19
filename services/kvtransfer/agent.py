"""Putting an agent together."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass
from functools import partial

from relevo.core.errors import StartupError
from services.common.grpc import Registration, format_address, make_server
from services.common.lifecycle import Process
from services.common.loop_lag import LoopLag
from services.common.security import read_security
from services.common.telemetry import make_registry, serve_metrics
from services.kvtransfer.arena import Arena
from services.kvtransfer.config import KvTransferSettings
from services.kvtransfer.faults import FaultInterceptor, Faults, chaos_registration
from services.kvtransfer.link_metrics import LinkCollector
from services.kvtransfer.link_servicer import KvLinkServicer
from services.kvtransfer.links import Links
from services.kvtransfer.mapping import prepare
from services.kvtransfer.metrics import StoreCollector
from services.kvtransfer.servicer import KvTransferServicer, PullTokens
from services.kvtransfer.store import Store
from services.kvtransfer.tiers.cascade import Tiers
from services.kvtransfer.tiers.factory import open_tiers
from services.kvtransfer.transports import DataServer
from services.kvtransfer.transports.catalog import open_nixl, open_pullers, usable_names
from services.kvtransfer.transports.tcp_server import TcpDataServer, listen
from services.kvtransfer.transports.wire import client_tls, server_tls
from services.pb import kvlink_pb2_grpc, kvtransfer_pb2_grpc

logger = logging.getLogger(__name__)

_ANY_HOST = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Agent:
    address: str  # under which workers and other agents reach it
    store: Store
    tiers: Tiers
    links: Links
    data_server: TcpDataServer
    metrics_port: int | None  # where it was asked for


async def start_agent(settings: KvTransferSettings, process: Process) -> Agent:
    """Start serving; what must end is on the process's stack. Raises StartupError."""
    host = settings.advertise_host or settings.host
    if host in _ANY_HOST:
        raise StartupError(f"--host {settings.host} is no address to be reached at: give --advertise-host as well")
    security = read_security(settings)
    security.check_host(settings.host)
    arena = Arena(settings.arena_dir, settings.kv_arena)
    process.stack.callback(arena.close)
    threading.Thread(target=prepare, args=(arena.view,), name="arena", daemon=True).start()
    store = Store(arena, process.incarnation)
    process.spawn(store.held.run(), "held names")
    tiers = Tiers(store, await open_tiers(settings, store.held))
    for tier in tiers.tiers:
        process.stack.push_async_callback(tier.close)
    store.on_sealed = tiers.offer
    process.spawn(tiers.run(), "tiers")

    tokens = PullTokens()
    listener = listen(settings.host, settings.data_port)
    process.stack.callback(listener.close)
    data_tls = security.tls if settings.data_tls else None
    data_address = format_address(host, listener.getsockname()[1])
    data_server = TcpDataServer(arena, tokens, listener, data_address, server_tls(data_tls))
    process.stack.push_async_callback(data_server.close)
    process.spawn(data_server.run(), "data port")
    transports = usable_names(settings.transports, encrypted=data_tls is not None)
    servers: list[DataServer] = [data_server] if "tcp" in transports else []
    nixl_server = await asyncio.to_thread(open_nixl, transports, arena, f"agent-{process.incarnation}")
    if nixl_server is not None:
        process.stack.push_async_callback(nixl_server.close)
        servers.append(nixl_server)

    faults = Faults() if settings.faults else None
    interceptors = [FaultInterceptor(faults)] if faults is not None else []
    server = make_server([], settings.host, settings.port, security, interceptors=interceptors)
    if faults is not None:
        logger.warning("--faults: whoever reaches this agent may make it fail, and damage its blocks")
        server.register(chaos_registration(faults, store))
    address = format_address(host, server.port)
    links = Links(
        open_pullers(transports, arena, client_tls(data_tls), has_nixl=nixl_server is not None),
        address=address,
        incarnation=process.incarnation,
        floor_bytes_per_second=settings.link_floor,
        security=security,
    )
    data_server.on_sent = partial(links.counters.times.observe_block, "out", "tcp")
    process.spawn(links.run(), "links")
    servicer = KvTransferServicer(store, tiers, tokens, links, address=address, pin_seconds=settings.pin_seconds)
    add = kvtransfer_pb2_grpc.add_KvTransferServicer_to_server
    server.register(Registration(add, servicer, "relevo.v1.KvTransfer"))
    link_servicer = KvLinkServicer(servers, process.incarnation)
    add_link = kvlink_pb2_grpc.add_KvLinkServicer_to_server
    server.register(Registration(add_link, link_servicer, "relevo.v1.KvLink"))
    await server.start()
    process.stack.push_async_callback(server.stop, settings.drain_seconds)
    process.stack.callback(store.held.events.close)  # or watchers would hold the server up

    metrics_port = None
    if settings.metrics_port is not None:
        registry = make_registry()
        registry.register(StoreCollector(store, tiers.tiers))
        lag = LoopLag()
        registry.register(lag.metric)
        process.spawn(lag.run(), "loop lag")
        registry.register(LinkCollector(links, link_servicer, data_server))
        metrics_port, stop_metrics = serve_metrics(registry, settings.host, settings.metrics_port)
        process.stack.callback(stop_metrics)
    return Agent(address, store, tiers, links, data_server, metrics_port)
