"""python -m services.router"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

from relevo import __version__
from relevo.core.errors import InvalidRequest
from relevo.model_files import GenerationDefaults, ModelFiles, generation_defaults, resolve_model
from relevo.tokenizer import Tokenizer
from services.common.grpc import make_server
from services.common.lifecycle import Process, run_service
from services.common.loop_lag import LoopLag
from services.common.security import read_security
from services.common.telemetry import make_registry, serve_metrics
from services.router.config import RouterSettings
from services.router.dispatch import FleetDispatcher
from services.router.finding import make_discovery
from services.router.fleet import Fleet
from services.router.fleet_metrics import FleetCollector
from services.router.http.app import EdgeConfig, create_app
from services.router.http.server import bind, start_http
from services.router.servicer import registration


async def serve(settings: RouterSettings, process: Process) -> None:
    """Ports first, so that a taken one is said at once; then the model's files; then the workers."""
    security = read_security(settings)
    security.check_host(settings.host)
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
        api_key=settings.api_key.get_secret_value() if settings.api_key is not None else None,
        salt_by_api_key=settings.salt_by_api_key,
        max_body_bytes=settings.max_body_bytes,
    )
    dispatcher = FleetDispatcher(fleet, defaults.eos_token_ids, registry=registry)
    app = create_app(edge, tokenizer, defaults, dispatcher, registry=registry)

    process.spawn(fleet.run(), "fleet")
    await server.start()
    process.stack.push_async_callback(server.stop, settings.drain_seconds)
    await start_http(app, listener, process, settings.drain_seconds)
    if settings.discovery == "static":
        await fleet.wait_connected()  # others come and go: /health tells whether there are enough
    host, port = listener.getsockname()[:2]
    process.ready(address=server.address, http=f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await asyncio.to_thread(_warm_up, tokenizer)  # only now: the workers had more use for the cores


def _load(model: str | None) -> tuple[ModelFiles, Tokenizer | None, GenerationDefaults]:
    files = resolve_model(model, weights=False)
    tokenizer = Tokenizer.from_files(files)
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
