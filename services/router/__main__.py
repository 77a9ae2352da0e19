"""python -m services.router"""

from __future__ import annotations

import asyncio
import gc
import sys
from contextlib import suppress
from ssl import SSLContext

from prometheus_client import CollectorRegistry

from relevo import __version__
from relevo.allocator import give_back_memory
from relevo.core.errors import InvalidRequest, StartupError
from relevo.model_files import GenerationDefaults, ModelFiles, generation_defaults, resolve_model
from relevo.tokenizer import Tokenizer
from services.common.grpc import make_server
from services.common.lifecycle import Process, run_service
from services.common.loop_lag import LoopLag
from services.common.security import read_security
from services.common.telemetry import make_registry, serve_metrics
from services.router.admission import AdmissionLimits
from services.router.config import RouterSettings
from services.router.dispatch import FleetDispatcher
from services.router.finding import make_discovery
from services.router.fleet import Fleet
from services.router.fleet_metrics import FleetCollector
from services.router.http.app import EdgeConfig, create_app
from services.router.http.connection import ConnectionLimits
from services.router.http.keys import KeyRing, plain_keys, read_keys_file
from services.router.http.limits import Limiter
from services.router.http.live import LiveView
from services.router.http.server import HttpOptions, bind, load_tls, start_http
from services.router.servicer import registration
from services.router.tracing import Tracer, tracing_config


async def serve(settings: RouterSettings, process: Process) -> None:
    """Ports first, so that a taken one is said at once; then the model's files; then the workers."""
    security = read_security(settings)
    security.check_host(settings.host)
    keys = _read_keys(settings)
    tls = load_tls(settings.http_tls_cert, settings.http_tls_key)
    listener = bind(settings.http_host, settings.http_port, shared=settings.http_shared)
    process.stack.callback(listener.close)
    fleet = Fleet(
        make_discovery(settings, process.stack),
        security=security,
        silence_seconds=settings.silence_seconds,
        stuck_seconds=settings.stuck_seconds,
    )
    server = make_server([registration(fleet)], settings.host, settings.port, security)
    registry = make_registry()
    registry.register(FleetCollector(fleet, asyncio.get_running_loop()))
    lag = LoopLag()
    registry.register(lag.metric)
    process.spawn(lag.run(), "loop lag")
    if settings.metrics_port is not None:
        _, stop_metrics = serve_metrics(registry, settings.host, settings.metrics_port)
        process.stack.callback(stop_metrics)

    files, tokenizer, defaults = await asyncio.to_thread(_load, settings.model)
    edge = EdgeConfig(
        served_model_names=tuple(settings.served_model_name) or (files.name,),
        version=__version__,
        keys=keys,
        salt_by_api_key=settings.salt_by_api_key,
        cors_origins=tuple(settings.cors_origin),
        max_body_bytes=settings.max_body_bytes,
        admission=AdmissionLimits(
            max_running=settings.max_running,
            max_queued=settings.max_queued,
            queue_seconds=settings.queue_seconds,
            absent_seconds=settings.absent_seconds,
        ),
    )
    dispatcher = FleetDispatcher(fleet, defaults.eos_token_ids, registry=registry)
    live = LiveView(lag)
    app = create_app(
        edge,
        tokenizer,
        defaults,
        dispatcher,
        registry=registry,
        limiter=_open_limiter(settings, keys, process),
        live=live,
        tracer=_open_tracer(settings, process, registry),
    )
    process.spawn(live.run(process.stopping), "live view")

    process.spawn(fleet.run(), "fleet")
    await server.start()
    process.stack.push_async_callback(server.stop, settings.drain_seconds)
    if not settings.http_shared:
        await start_http(app, listener, process, _http_options(settings, tls), registry)
    if settings.discovery == "static":
        await fleet.wait_connected()  # others come and go: /health tells whether there are enough
    if settings.http_shared:  # others answer meanwhile
        await start_http(app, listener, process, _http_options(settings, tls), registry)
    host, port = listener.getsockname()[:2]
    scheme = "http" if tls is None else "https"
    process.ready(address=server.address, http=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
    await asyncio.to_thread(_warm_up, tokenizer)  # only now: the workers had more use for the cores
    gc.collect()
    give_back_memory()
    gc.freeze()  # what is there now stays, and need not be looked through again and again


def _read_keys(settings: RouterSettings) -> KeyRing | None:
    """None: open to everybody. Raises StartupError."""
    if settings.api_key is None and settings.api_keys_file is None:
        return None
    keys = plain_keys(settings.api_key.get_secret_value()) if settings.api_key is not None else []
    if settings.api_keys_file is not None:
        keys += read_keys_file(settings.api_keys_file)
    return KeyRing(keys)


def _open_limiter(settings: RouterSettings, keys: KeyRing | None, process: Process) -> Limiter | None:
    """In Redis, if there is one and something to count; None: each router counts by itself. Raises StartupError."""
    if settings.redis_url is None or keys is None or not any(key.is_limited for key in keys.keys):
        return None
    try:
        from services.router.http.limits_redis import RedisLimiter  # an extra: not everybody has it
    except ImportError as error:
        raise StartupError("--redis-url needs the package redis: pip install 'relevo[redis]'") from error
    limiter = RedisLimiter(settings.redis_url.get_secret_value(), settings.fleet_name)
    process.stack.push_async_callback(limiter.close)
    process.spawn(limiter.run(), "limits")
    return limiter


def _open_tracer(settings: RouterSettings, process: Process, registry: CollectorRegistry) -> Tracer | None:
    """None: there is no collector. Raises StartupError."""
    try:
        config = tracing_config(settings.otlp_endpoint, settings.trace_ratio, settings.trace_slow_ms)
    except ValueError as error:
        raise StartupError(str(error)) from None
    if config.endpoint is None:
        return None
    from services.router.trace_export import SpanQueue  # half a second and 20 MB, for those who want it

    queue = SpanQueue(config.endpoint)
    process.stack.push_async_callback(asyncio.to_thread, queue.close)
    return Tracer(config, queue, registry)


def _http_options(settings: RouterSettings, tls: SSLContext | None) -> HttpOptions:
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        max_head_bytes=settings.max_head_bytes,
        head_seconds=settings.head_seconds,
        body_seconds=settings.body_seconds,
        write_seconds=settings.write_seconds,
    )
    return HttpOptions(
        limits=limits,
        tls=tls,
        keep_alive_seconds=settings.keep_alive_seconds,
        drain_seconds=settings.drain_seconds,
    )


def _load(model: str | None) -> tuple[ModelFiles, Tokenizer | None, GenerationDefaults]:
    files = resolve_model(model, weights=False)
    tokenizer = Tokenizer.from_files(files, apart=True)
    return files, tokenizer, generation_defaults(files)


def _warm_up(tokenizer: Tokenizer | None) -> None:
    """The first chat loads what renders templates, for half a second: not on the event loop."""
    if tokenizer is not None and tokenizer.chat_template is not None:
        with suppress(InvalidRequest):  # a template that wants other messages than these
            tokenizer.render_chat([{"role": "user", "content": "warm-up"}])


def main() -> None:
    sys.exit(run_service("router", RouterSettings, serve))


if __name__ == "__main__":
    main()
