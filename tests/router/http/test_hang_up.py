"""Clients that leave, and clients that do not read. Plain sockets, as a browser's closed tab looks from here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from relevo.tokenizer import Tokenizer
from services.pb import messages_pb2
from services.router.generation import TokensEvent
from tests.router.http.conftest import Edge
from tests.router.http.fakes import HANG, FakeGeneration, Step

LIMIT_SECONDS = 0.1
NUM_FLOOD_EVENTS = 10_000  # 20 MB of text and more: more than the sockets' buffers take


@asynccontextmanager
async def posted(
    edge: Edge, body: dict[str, Any], headers: str = ""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """headers: whole lines, with their ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, limit=1 << 12)
    raw = orjson.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.002)


async def begun(edge: Edge, num_generations: int) -> list[FakeGeneration]:
    await until(lambda: len(edge.dispatcher.generations) == num_generations)
    async with asyncio.timeout(5):
        for generation in edge.dispatcher.generations:
            await generation.has_begun.wait()
    return edge.dispatcher.generations


async def assert_closed_at_once(generations: list[FakeGeneration], since: float) -> None:
    async with asyncio.timeout(5):
        for generation in generations:
            await generation.closed.wait()
    assert max(generation.closed_at for generation in generations) - since < LIMIT_SECONDS


@pytest.mark.parametrize("way", ["close", "abort"])
@pytest.mark.parametrize("n", [1, 4])
async def test_hanging_up_in_the_middle_of_a_stream_closes_everything(edge: Edge, n: int, way: str) -> None:
    edge.dispatcher.script = lambda request: [TokensEvent([300]), 0.02, TokensEvent([301]), HANG]
    async with posted(edge, {"prompt": "a", "stream": True, "n": n}) as (reader, writer):
        await reader.readuntil(b"data: ")
        since = time.perf_counter()
        if way == "close":
            writer.close()
        else:
            writer.transport.abort()
        await assert_closed_at_once(await begun(edge, n), since)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_hanging_up_before_the_first_token_closes_everything(edge: Edge, n: int, stream: bool) -> None:
    edge.dispatcher.script = lambda request: [HANG]
    async with posted(edge, {"prompt": "a", "stream": stream, "n": n}) as (_, writer):
        generations = await begun(edge, n)
        since = time.perf_counter()
        writer.transport.abort()
        await assert_closed_at_once(generations, since)


async def test_who_left_is_counted_as_499(fresh_edge: Edge) -> None:
    edge = fresh_edge
    edge.dispatcher.script = lambda request: [TokensEvent([300]), HANG]
    async with posted(edge, {"prompt": "a", "stream": True}) as (reader, _):
        await reader.readuntil(b"data: ")
    labels = {"endpoint": "/v1/completions", "status": "499"}
    await until(lambda: edge.registry.get_sample_value("relevo_http_requests_total", labels) == 1.0)
    assert edge.registry.get_sample_value("relevo_num_requests_running") == 0


async def test_a_slow_reader_stops_its_own_request_only(edge: Edge, tokenizer: Tokenizer) -> None:
    """Its generation is not pulled on when socket and server buffers are full; its neighbour's is, to the end."""

    longest = max(range(300, 4000), key=lambda token_id: len(tokenizer.token_text(token_id)))

    def flood(request: messages_pb2.GenerationRequest) -> Iterator[Step]:
        for _ in range(NUM_FLOOD_EVENTS if request.prompt_token_ids[0] == 5 else 1):
            yield TokensEvent([longest] * 200)
            yield 0.0
        yield HANG

    edge.dispatcher.script = flood
    async with posted(edge, {"prompt": [5], "stream": True}) as (_, slow_writer):
        [slow] = await begun(edge, 1)
        before = -1
        async with asyncio.timeout(10):
            while slow.num_pulled != before:
                before = slow.num_pulled
                await asyncio.sleep(0.1)
        assert 0 < slow.num_pulled < 200 * NUM_FLOOD_EVENTS
        async with posted(edge, {"prompt": [6], "stream": True}) as (reader, _):
            async with asyncio.timeout(5):
                await reader.readuntil(b"data: ")
        assert not slow.closed.is_set()
        since = time.perf_counter()
        slow_writer.transport.abort()
        await assert_closed_at_once([slow], since)


async def test_a_body_that_never_comes_whole_starts_nothing(fresh_edge: Edge) -> None:
    edge = fresh_edge
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()
    labels = {"endpoint": "/v1/completions", "status": "499"}
    await until(lambda: edge.registry.get_sample_value("relevo_http_requests_total", labels) == 1.0)
    assert not edge.dispatcher.generations
