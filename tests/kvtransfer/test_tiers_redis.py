"""The Redis tier against a real server, and against none, a slow one and a full one."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from relevo.core.errors import StartupError

pytest.importorskip("redis", reason="the extra relevo[redis] is not installed")

from services.kvtransfer.tiers import redis_tier
from services.kvtransfer.tiers.record import HEADER_BYTES
from services.kvtransfer.tiers.redis_tier import KEY_PREFIX, RedisTier
from tests.support.redis_server import RedisServer, running_redis

from .blocks import BLOCK_BYTES, block_data, fetch_all, names, publish_all, sealed, until, until_unused
from .conftest import Connect, StartAgent

NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
VALUE_BYTES = HEADER_BYTES + BLOCK_BYTES

OpenTier = Callable[..., Awaitable[RedisTier]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def open_tier() -> AsyncIterator[OpenTier]:
    async with AsyncExitStack() as stack:

        async def open_tier(url: str, **options: Any) -> RedisTier:
            full: dict[str, Any] = {"max_bytes": 1 << 30, "ttl_seconds": 60, "retry_seconds": 0.05} | options
            tier = RedisTier(url, **full)
            stack.push_async_callback(tier.close)
            return tier

        yield open_tier


async def read(tier: RedisTier, *labels: object) -> list[bool]:
    into = [memoryview(bytearray(BLOCK_BYTES)) for _ in labels]
    checksums = await tier.read(list(zip(names(*labels), into, strict=True)))
    for label, view, checksum in zip(labels, into, checksums, strict=True):
        if checksum is not None:
            assert bytes(view) == block_data(label)
            assert checksum == sealed(label).checksum
    return [checksum is not None for checksum in checksums]


async def write(tier: RedisTier, *labels: object) -> None:
    assert await tier.write([sealed(label) for label in labels]) == []


def key(label: object) -> bytes:
    return KEY_PREFIX + names(label)[0]


async def test_what_one_agent_wrote_another_reads(server: RedisServer, open_tier: OpenTier) -> None:
    writer, reader = await open_tier(server.url), await open_tier(server.url)
    await write(writer, "a", "b")
    assert await reader.holds(names("a", "b", "x"), BLOCK_BYTES) == set(names("a", "b"))
    assert await read(reader, "a", "x", "b") == [True, False, True]
    assert (writer.num_blocks, writer.num_bytes, reader.counters.hits) == (2, 2 * VALUE_BYTES, 2)
    assert 0 < server.client.ttl(key("a")) <= 60


async def test_who_reads_a_block_prolongs_its_life(server: RedisServer, open_tier: OpenTier) -> None:
    await write(await open_tier(server.url, ttl_seconds=5), "a")
    assert await read(await open_tier(server.url, ttl_seconds=500), "a") == [True]
    assert server.client.ttl(key("a")) > 400


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign", "another"])
async def test_damaged_value_is_dropped_and_never_served(server: RedisServer, open_tier: OpenTier, damage: str) -> None:
    tier = await open_tier(server.url)
    await write(tier, "a", "b")
    value = server.client.get(key("a"))
    wrong = {
        "flip": value[:-1] + bytes([value[-1] ^ 1]),
        "truncate": value[:-1],
        "foreign": b"hello",
        "another": server.client.get(key("b")),
    }[damage]
    server.client.set(key("a"), wrong)
    assert await read(tier, "a", "b") == [False, True]
    assert (tier.counters.damaged, server.client.exists(key("a")), tier.num_blocks) == (1, 0, 1)
    assert not tier.reading.trouble


async def test_oldest_go_when_the_bound_is_reached(server: RedisServer, open_tier: OpenTier) -> None:
    tier = await open_tier(server.url, max_bytes=3 * VALUE_BYTES)
    for label in "abcde":
        await write(tier, label)
    assert [server.client.exists(key(label)) for label in "abcde"] == [0, 0, 1, 1, 1]
    assert (tier.num_blocks, tier.num_bytes, tier.counters.evicted) == (3, 3 * VALUE_BYTES, 2)
    await write(tier, *"fghi")
    assert tier.counters.dropped["too_large"] == 4


async def test_expired_blocks_are_forgotten(server: RedisServer, open_tier: OpenTier) -> None:
    tier = await open_tier(server.url, ttl_seconds=1)
    await write(tier, "a")
    await until(lambda: not server.client.exists(key("a")))
    assert await tier.holds(names("a"), BLOCK_BYTES) == set()
    assert await read(tier, "a") == [False]
    await write(tier, "b")
    assert tier.num_blocks == 1


async def test_listing_and_clearing_see_everybodys_blocks(server: RedisServer, open_tier: OpenTier) -> None:
    await write(await open_tier(server.url), "a", "b")
    tier = await open_tier(server.url)
    server.client.set("not-ours", "x")
    assert sorted(await tier.list_blocks(10)) == sorted((name, BLOCK_BYTES) for name in names("a", "b"))
    assert len(await tier.list_blocks(1)) == 1
    assert await tier.clear() == 2
    assert server.client.keys() == [b"not-ours"]


async def test_full_redis_stops_writing_and_goes_on_reading(
    server: RedisServer, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = await open_tier(server.url)
    await write(tier, "a")
    server.client.config_set("maxmemory", 1)
    await write(tier, "b")
    assert "Redis is full" in tier.writing.trouble
    assert await read(tier, "a") == [True]
    server.client.config_set("maxmemory", 0)
    await until(lambda: not tier.writing.is_open)
    await write(tier, "b")
    assert not tier.writing.trouble
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1


async def test_redis_that_is_not_there_stops_the_tier_with_one_warning(
    open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        tier = await open_tier(f"redis://:secret@127.0.0.1:{nobody.getsockname()[1]}/0", retry_seconds=0.02)
        for _ in range(3):
            assert await tier.holds(names("a"), BLOCK_BYTES) == set()
            assert tier.reading.is_open
            assert await read(tier, "a") == [False]
            await until(lambda: not tier.reading.is_open)
        await write(tier, "a")
    assert tier.counters.dropped["failed"] == 1
    [warning] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "stopped: a lookup failed" in warning
    assert "secret" not in warning + tier.place


async def test_slow_redis_is_not_waited_for(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections and never answers."""
    monkeypatch.setattr(redis_tier, "_LOOKUP_SECONDS", 0.1)
    monkeypatch.setattr(redis_tier, "_TRANSFER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        tier = await open_tier(f"redis://127.0.0.1:{mute.getsockname()[1]}/0", retry_seconds=60)
        began = time.monotonic()
        assert await tier.holds(names("a"), BLOCK_BYTES) == set()
        assert await tier.holds(names("a"), BLOCK_BYTES) == set()
        await write(tier, "a")
        assert time.monotonic() - began < 2
    assert tier.reading.is_open
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


async def test_bad_url_is_refused(open_tier: OpenTier) -> None:
    with pytest.raises(StartupError, match="--kv-redis"):
        await open_tier("localhost:6379")


async def test_agents_share_blocks_by_redis(
    server: RedisServer, start: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    """Nothing else is between the two; the one with a directory keeps there what it has loaded."""
    one = await start(kv_redis=server.url)
    two = await start(kv_redis=server.url, kv_disk=tmp_path / "kv")
    [tier] = one.tiers.tiers
    disk, below = two.tiers.tiers
    await publish_all(await connect(one.address), "a", "b")
    await until(lambda: tier.counters.stored == 2)
    client = await connect(two.address)
    assert await fetch_all(client, "a", "x", "b") == {1: NOT_FOUND, 2: NOT_FOUND}
    assert await fetch_all(client, "a", "b") == {}
    await until(lambda: disk.counters.stored == 2)
    assert (below.counters.hits, below.counters.stored) == (2, 0)
    await until_unused(two)
    two.store.table.clear()
    assert await fetch_all(client, "a", "b") == {}
    assert (disk.counters.hits, below.counters.hits) == (2, 2), "the nearer one is asked first"


async def test_dead_redis_is_not_the_agents_trouble(start: StartAgent, connect: Connect) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        agent = await start(kv_redis=f"redis://127.0.0.1:{nobody.getsockname()[1]}/0")
        client = await connect(agent.address)
        await publish_all(client, "a", "b")
        assert await fetch_all(client, "a", "x", "b") == {1: NOT_FOUND}
        [tier] = agent.tiers.tiers
        await until(lambda: tier.counters.dropped.total() == 2)
        assert tier.reading.trouble
        await asyncio.sleep(0)
