"""The edge behind a real uvicorn on a free port, in the test's own loop; the demo model's tokenizer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from relevo.model_files import GenerationDefaults, generation_defaults, resolve_model
from relevo.tokenizer import Tokenizer
from services.router.admission import AdmissionLimits
from services.router.http.app import EdgeConfig, create_app
from services.router.http.connection import watch_connections
from services.router.http.keys import KeyRing, plain_keys
from services.router.http.limits import Limiter
from services.router.http.live import LiveView
from services.router.http.server import HttpOptions, make_server
from tests.router.http.fakes import FakeDispatcher

NAME = "demo-model"
MAX_BODY_BYTES = 1 << 20
NO_QUEUE = AdmissionLimits(max_queued=0)  # what the fake fleet refuses is refused


@dataclass(frozen=True)
class Served:
    """An edge's app and what is around it."""

    app: ASGIApp
    dispatcher: FakeDispatcher
    registry: CollectorRegistry


@dataclass(frozen=True)
class Edge:
    """A running edge.

    http: knows its address, and no key
    registry: the app's figures; connection_registry: those of connections
    connections: that are open
    """

    port: int
    dispatcher: FakeDispatcher
    http: httpx.AsyncClient
    registry: CollectorRegistry
    connections: Collection[object]
    connection_registry: CollectorRegistry

    def num_cut(self, reason: str) -> int:
        """Connections that the server ended for this reason."""
        return int(
            self.connection_registry.get_sample_value("relevo_http_connections_cut_total", {"reason": reason}) or 0
        )

    @asynccontextmanager
    async def openai(self, api_key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
        http_client = openai.DefaultAsyncHttpxClient(verify=False)  # no TLS here: spares loading certificates
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=api_key,
            max_retries=0,
            timeout=20,
            http_client=http_client,
        ) as client:
            yield client


def make_served(
    tokenizer: Tokenizer | None,
    defaults: GenerationDefaults,
    api_key: str | None = None,
    *,
    keys: KeyRing | None = None,
    salt_by_api_key: bool = False,
    cors_origins: tuple[str, ...] = (),
    admission: AdmissionLimits = NO_QUEUE,
    limiter: Limiter | None = None,
    live: LiveView | None = None,
) -> Served:
    """api_key: plain ones, or keys."""
    dispatcher = FakeDispatcher()
    registry = CollectorRegistry()
    config = EdgeConfig(
        served_model_names=(NAME, "alias"),
        version="1.2.3",
        keys=keys if api_key is None else KeyRing(plain_keys(api_key)),
        salt_by_api_key=salt_by_api_key,
        cors_origins=cors_origins,
        admission=admission,
        max_body_bytes=MAX_BODY_BYTES,
    )
    app = create_app(config, tokenizer, defaults, dispatcher, registry=registry, limiter=limiter, live=live)
    return Served(app, dispatcher, registry)


@asynccontextmanager
async def running(served: Served, options: HttpOptions | None = None) -> AsyncIterator[Edge]:
    """Behind our uvicorn without its main loop."""
    # With its protocol named: only then does asyncio turn Nagle's algorithm off, which makes answers 40 ms late.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        options = options or HttpOptions()
        connections = CollectorRegistry()
        server = make_server(served.app, options, connections)
        opened = server.server_state.connections
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[listener])
        watch = asyncio.create_task(watch_connections(opened, options.limits))
        port = listener.getsockname()[1]
        url = f"http{'' if options.tls is None else 's'}://127.0.0.1:{port}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=20, verify=False) as client:
                yield Edge(
                    port, served.dispatcher, client, served.registry, server.server_state.connections, connections
                )
        finally:
            watch.cancel()
            await asyncio.wait([watch])
            await server.shutdown(sockets=[listener])


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_files(resolve_model(None))
    assert found is not None
    return found


@pytest.fixture(scope="session")
def defaults() -> GenerationDefaults:
    return generation_defaults(resolve_model(None))


@pytest.fixture(scope="session")
def shared(tokenizer: Tokenizer, defaults: GenerationDefaults) -> Served:
    return make_served(tokenizer, defaults)


@pytest.fixture
async def edge(shared: Served) -> AsyncIterator[Edge]:
    """One app for all tests; its metrics go on counting."""
    shared.dispatcher.reset()
    async with running(shared) as edge:
        yield edge


@pytest.fixture
async def fresh_edge(tokenizer: Tokenizer, defaults: GenerationDefaults) -> AsyncIterator[Edge]:
    """Its metrics begin at zero."""
    async with running(make_served(tokenizer, defaults)) as edge:
        yield edge
