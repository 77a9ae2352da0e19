"""Limits of API keys that several routers count together, in a real Redis; and without it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

pytest.importorskip("redis", reason="the extra relevo[redis] is not installed")

from relevo.core.errors import Exhausted, StartupError
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.router.http import limits_redis
from services.router.http.keys import ApiKey, KeyRing
from services.router.http.limits_redis import RedisLimiter
from tests.router.http.conftest import make_served, running
from tests.support.redis_server import RedisServer, running_redis

Open = Callable[..., RedisLimiter]
DIGEST = hashlib.sha256(b"secret").digest()
RATE = ApiKey("rate", DIGEST, rps=0.1, burst=2)
TWO_AT_ONCE = ApiKey("two", DIGEST, concurrency=2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def open_limiter(server: RedisServer) -> AsyncIterator[Open]:
    """A router's: running, as in its process."""
    async with AsyncExitStack() as stack:

        def open_limiter(lease_seconds: float = 30.0) -> RedisLimiter:
            limiter = RedisLimiter(server.url, "test", lease_seconds=lease_seconds)
            stack.push_async_callback(limiter.close)
            task = asyncio.create_task(limiter.run())
            stack.push_async_callback(asyncio.wait, [task])
            stack.callback(task.cancel)
            return limiter

        yield open_limiter


async def test_a_rate_is_of_all_routers_together(open_limiter: Open) -> None:
    one, two = open_limiter(), open_limiter()
    for limiter in (one, two):
        await (await limiter.acquire(RATE)).release()
    for limiter in (one, two):
        with pytest.raises(Exhausted) as caught:
            await limiter.acquire(RATE)
        assert 9 < caught.value.retry_after_seconds <= 10
    await two.acquire(ApiKey("other", DIGEST, rps=0.1))


async def test_concurrency_is_of_all_routers_together_and_given_back(open_limiter: Open) -> None:
    one, two = open_limiter(), open_limiter()
    first = await one.acquire(TWO_AT_ONCE)
    await two.acquire(TWO_AT_ONCE)
    for limiter in (one, two):
        with pytest.raises(Exhausted, match="2 requests at the same time"):
            await limiter.acquire(TWO_AT_ONCE)
    await first.release()
    await first.release()
    await two.acquire(TWO_AT_ONCE)
    with pytest.raises(Exhausted):
        await one.acquire(TWO_AT_ONCE)


async def test_a_router_that_dies_gives_its_places_back_and_one_that_lives_keeps_them(
    server: RedisServer, open_limiter: Open
) -> None:
    living = open_limiter(lease_seconds=0.6)
    dead = RedisLimiter(server.url, "test", lease_seconds=0.3)  # nobody runs it
    await living.acquire(TWO_AT_ONCE)
    await dead.acquire(TWO_AT_ONCE)
    await dead.close()
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(10):
        while True:
            try:
                await living.acquire(TWO_AT_ONCE)
                break
            except Exhausted:
                await asyncio.sleep(0.05)
    while asyncio.get_running_loop().time() < began + 1.5:  # several leases of the living one
        with pytest.raises(Exhausted):
            await living.acquire(TWO_AT_ONCE)
        await asyncio.sleep(0.05)


async def test_without_redis_each_router_counts_by_itself(
    server: RedisServer, open_limiter: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Gone, or there and silent; and when it is back it counts again. A permit of before is no trouble."""
    monkeypatch.setattr(limits_redis, "RETRY_SECONDS", 0.2)
    one, two = open_limiter(), open_limiter()
    old = await one.acquire(TWO_AT_ONCE)
    server.freeze()
    for limiter in (one, two):
        for _ in range(2):
            await limiter.acquire(TWO_AT_ONCE)
        with pytest.raises(Exhausted):
            await limiter.acquire(TWO_AT_ONCE)
    server.thaw()
    server.stop()
    await old.release()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(warnings) <= 6
    assert "counts API keys' requests by itself" in warnings[0]
    server.start()
    async with asyncio.timeout(10):
        while not server.client.keys("relevo:limits:test:rate:*"):
            await one.acquire(ApiKey("rate", DIGEST, rps=1000, burst=1000))
            await asyncio.sleep(0.02)


async def test_bad_url_is_refused() -> None:
    with pytest.raises(StartupError, match="--redis-url"):
        RedisLimiter("localhost:6379", "test")


async def test_over_http_and_two_routers(
    tokenizer: Tokenizer, defaults: GenerationDefaults, open_limiter: Open
) -> None:
    keys = KeyRing([RATE])
    statuses = []
    for _ in range(2):
        served = make_served(tokenizer, defaults, keys=keys, limiter=open_limiter())
        async with running(served) as edge:
            for _ in range(2):
                body = {"prompt": "a", "max_tokens": 1}
                reply = await edge.http.post("/v1/completions", json=body, headers={"authorization": "Bearer secret"})
                statuses.append(reply.status_code)
    assert statuses == [200, 200, 429, 429]
    assert 1 <= int(reply.headers["retry-after"]) <= 10
