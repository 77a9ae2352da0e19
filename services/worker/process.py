"""A worker process from start to end; the two drivers bring their service along."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from relevo.core.errors import RelevoError, StartupError, Unavailable
from relevo.engine.config import EngineInfo
from relevo.engine.engine import Engine
from relevo.engine.engine_thread import EngineThread
from services.common.grpc import Registration, make_server
from services.common.lifecycle import Process
from services.common.loop_lag import LoopLag
from services.common.security import is_loopback, read_security
from services.common.telemetry import make_registry, serve_metrics
from services.kvtransfer.client import KvAgentClient
from services.pb import worker_pb2, worker_pb2_grpc
from services.worker.config import WorkerSettings
from services.worker.health import tell_health
from services.worker.metrics import WorkerCollector
from services.worker.servicer import WorkerServicer
from services.worker.sign_in import check_sign_in, sign_in
from services.worker.worker import Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTACH_INTERVAL_SECONDS = 0.2
STOP_GRACE_SECONDS = 1.0  # for streams to end by themselves after a drain has ended their requests


async def serve_worker(
    settings: WorkerSettings,
    process: Process,
    role: worker_pb2.Role.ValueType,
    make_registration: Callable[[Worker, KvAgentClient | None], Registration],
) -> None:
    """Load, attach, listen, report ready. What is started is stopped in reverse order at shutdown."""
    security = read_security(settings)
    security.check_host(settings.host)
    check_sign_in(settings)
    # Before minutes of loading: a port that is taken shows at once.
    server = make_server([], settings.host, settings.port, security)
    worker_id = settings.worker_id or _default_id(process.role, settings.host, server.port)
    engine = await _load_engine(settings)
    info = engine.info
    agent = None
    agent_address = ""
    if settings.kv_agent:
        agent = KvAgentClient(settings.kv_agent, worker_id, process.incarnation, security, engine.kv_cache.pin)
        process.stack.push_async_callback(agent.close)
        agent_address = await _attach(agent, info, settings.attach_timeout_seconds)

    worker = Worker(settings, engine, EngineThread)
    process.stack.callback(worker.copier.close)
    if settings.direct_kv:
        direct_kv = worker.open_direct_kv(f"{worker_id}-{process.incarnation}")
        process.stack.push_async_callback(direct_kv.close)
    worker.thread.start()
    process.stack.push_async_callback(worker.thread.stop)
    process.spawn(worker.watch_engine(), "engine")
    process.spawn(worker.run(), "requests")

    worker_info = worker_pb2.WorkerInfo(
        worker_id=worker_id,
        incarnation=process.incarnation,
        role=role,
        model=settings.served_model_name or info.model_name,
        layout_fingerprint=info.fingerprint,
        block_size=info.block_size,
        block_bytes=info.block_bytes,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        agent_address=agent_address,
        max_num_seqs=info.max_num_seqs,
    )
    identity = Registration(
        worker_pb2_grpc.add_WorkerServicer_to_server,
        WorkerServicer(worker_info, worker.block_events),
        "relevo.v1.Worker",
    )
    server.register(make_registration(worker, agent))
    server.register(identity)
    await server.start()
    process.spawn(tell_health(server, worker.thread.step_ages, settings.stuck_seconds), "health")
    process.stack.push_async_callback(server.stop, STOP_GRACE_SECONDS)
    process.stack.push_async_callback(worker.drain, settings.drain_seconds)
    process.stack.push_async_callback(server.drain)
    if settings.metrics_port is not None:
        registry = make_registry()
        registry.register(WorkerCollector(worker))
        lag = LoopLag()
        registry.register(lag.metric)
        process.spawn(lag.run(), "loop lag")
        _, stop_metrics = serve_metrics(registry, settings.host, settings.metrics_port)
        process.stack.callback(stop_metrics)
    if settings.discovery == "redis":
        sign_in(settings, process, worker_info, server.address)
    process.stack.callback(worker.begin_drain)  # before anything that waits: routers place nothing here from then on
    process.ready(address=server.address, id=worker_id)


def _default_id(role: str, host: str, port: int) -> str:
    """Of another worker's on this host differs the port, of a replica's in a container of its own the host's name."""
    return f"{role}-{port}" if is_loopback(host) else f"{role}-{socket.gethostname()}-{port}"


async def _load_engine(settings: WorkerSettings) -> Engine:
    config = settings.engine_config()
    logger.info("loading %s", config.model or "the demo model")
    started = time.monotonic()
    engine = await _in_daemon_thread(lambda: Engine(config))
    gc.freeze()
    gc.enable()
    info = engine.info
    logger.info(
        "loaded %s in %.1f s: %d blocks of %d tokens, context of %d tokens",
        info.model_name,
        time.monotonic() - started,
        info.num_blocks,
        info.block_size,
        info.max_model_len,
    )
    return engine


async def _attach(agent: KvAgentClient, info: EngineInfo, timeout_seconds: float) -> str:
    """Map the agent's arena; the address under which other agents reach it. The agent may be starting at this moment.

    Raises StartupError when it is not there in time, or cut for other blocks.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                try:
                    mapping = await agent.attach(info.fingerprint, info.block_bytes)
                except Unavailable as error:
                    logger.debug("waiting for the KV agent: %s", error.message)
                    await asyncio.sleep(ATTACH_INTERVAL_SECONDS)
                else:
                    return mapping.agent_address
    except TimeoutError:
        raise StartupError(
            f"--kv-agent {agent.address}: nobody answers there after {timeout_seconds:g} s; start it with "
            "python -m services.kvtransfer"
        ) from None
    except RelevoError as error:
        raise StartupError(f"--kv-agent {agent.address}: {error.message}") from error


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """As asyncio.to_thread, but a shutdown meanwhile need not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a T when there is no error

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            logger.debug("loaded after the loop had ended")

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future
