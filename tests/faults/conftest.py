"""One process for each module that forks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.grpc import make_channel, make_server
from tests.faults.held import held
from tests.faults.stack import MODEL
from tests.faults.zygote import Zygote, running_zygote
from tests.support.tiny_models import TinyModels


@pytest.fixture(scope="session")
def grpc_in_use() -> None:
    """What gRPC opens at its first use and keeps is open already."""

    async def use() -> None:
        server = make_server([], "127.0.0.1", 0)
        await server.start()
        async with make_channel(server.address) as channel:
            await channel.channel_ready()
        await server.stop(0)

    asyncio.run(use())


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_open(grpc_in_use: None) -> Iterator[None]:
    """No thread and no file descriptor more than before the module's tests; what others close takes a moment."""
    before = held()
    yield
    deadline = time.monotonic() + 10
    while not (now := held()).is_within(before):
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def values_of_fixtures_are_forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """pytest keeps them for a little longer than they live, an arena for one."""
    yield
    request.node.funcargs.clear()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with running_zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path(MODEL)
