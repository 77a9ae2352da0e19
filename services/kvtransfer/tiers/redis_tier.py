"""The tier in Redis: shared by all agents that use the same server, bounded by an expiry and by what each has written.

Needs the extra `relevo[redis]`. Every call has a deadline; one that fails or is late stops the tier for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError

from relevo.core.block_hash import HASH_BYTES, BlockHash
from relevo.core.errors import StartupError
from services.kvtransfer.tiers import SealedBlock, TierCounters
from services.kvtransfer.tiers.breaker import Breaker
from services.kvtransfer.tiers.record import HEADER_BYTES, is_intact, pack_header, verified_checksum
from services.kvtransfer.tiers.threads import in_thread

logger = logging.getLogger(__name__)

KEY_PREFIX = b"relevo:kv1:"
_LOOKUP_SECONDS = 0.25  # what an announcement may wait for it
_TRANSFER_SECONDS = 2.0  # of some blocks, a few MiB
_CLEAR_SECONDS = 30.0
_KEYS_AT_ONCE = 1024
_MAX_CONNECTIONS = 4  # lookups, reads, writes; more wait for one, within their deadlines


class RedisTier:
    """url: redis://, rediss:// (TLS) or unix://. max_bytes: of blocks written by this agent and not expired."""

    name = "redis"

    def __init__(self, url: str, max_bytes: int, ttl_seconds: int, retry_seconds: float) -> None:
        """Connects later. Raises StartupError if the URL is none."""
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=_TRANSFER_SECONDS,
                socket_connect_timeout=_LOOKUP_SECONDS,
                retry=Retry(NoBackoff(), 0),  # the breaker is what tries again
            )
        except ValueError as error:
            raise StartupError(f"--kv-redis: {error}; redis://HOST:PORT/0 is right") from error
        self._redis: Any = redis.asyncio.Redis(connection_pool=pool)  # its types leave open what is awaitable
        known = pool.connection_kwargs
        self.place = str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")
        self.max_bytes = max_bytes
        self.counters = TierCounters()
        self.reading = Breaker(f"Redis tier {self.place}", retry_seconds)
        self.writing = Breaker(f"writing to Redis tier {self.place}", retry_seconds)
        self.num_bytes = 0
        self._ttl_seconds = ttl_seconds
        self._written: OrderedDict[BlockHash, tuple[int, float]] = OrderedDict()  # → bytes, its end; oldest first

    @property
    def num_blocks(self) -> int:
        """Written by this agent, and not expired."""
        return len(self._written)

    async def run(self) -> None:
        """Nothing to do in the background: Redis expires keys by itself."""

    async def holds(self, names: Sequence[BlockHash], block_bytes: int) -> set[BlockHash]:
        found: set[BlockHash] = set()
        if self.reading.is_open:
            return found
        with self._guarded("a lookup", _LOOKUP_SECONDS):
            async with asyncio.timeout(_LOOKUP_SECONDS):
                for start in range(0, len(names), _KEYS_AT_ONCE):
                    part = names[start : start + _KEYS_AT_ONCE]
                    pipeline = self._redis.pipeline(transaction=False)
                    for name in part:
                        pipeline.exists(KEY_PREFIX + name)
                    replies = await pipeline.execute()
                    found |= {name for name, reply in zip(part, replies, strict=True) if reply}
                    if not all(replies):
                        break  # of use is what has no gap before it
        return found

    async def read(self, blocks: Sequence[tuple[BlockHash, memoryview]]) -> list[int | None]:
        values: list[bytes | None] = [None] * len(blocks)
        if self.reading.is_open:
            return [None] * len(blocks)
        with self._guarded("a read", _TRANSFER_SECONDS):
            async with asyncio.timeout(_TRANSFER_SECONDS):
                pipeline = self._redis.pipeline(transaction=False)
                for name, _ in blocks:
                    pipeline.getex(KEY_PREFIX + name, ex=self._ttl_seconds)
                values = await pipeline.execute()
        [checksums] = await in_thread(None, partial(_unpack_all, blocks, values))
        damaged = [
            name
            for (name, _), value, checksum in zip(blocks, values, checksums, strict=True)
            if value is not None and checksum is None
        ]
        self.counters.hits += len([checksum for checksum in checksums if checksum is not None])
        self.counters.damaged += len(damaged)
        if damaged:
            logger.warning("%s: removed %d values, damaged or not ours", self.place, len(damaged))
            await self._delete(damaged)
        return checksums

    async def write(self, blocks: Sequence[SealedBlock]) -> list[BlockHash]:
        [values] = await in_thread(None, partial(_pack_all, blocks))
        damaged = [block.name for block, value in zip(blocks, values, strict=True) if value is None]
        good = {block.name: value for block, value in zip(blocks, values, strict=True) if value is not None}
        num_bytes = sum(map(len, good.values()))
        if num_bytes > self.max_bytes:
            self.counters.dropped["too_large"] += len(good)
            return damaged
        await self._make_room(num_bytes)
        stored = False
        with self._guarded("a write", _TRANSFER_SECONDS):
            async with asyncio.timeout(_TRANSFER_SECONDS):
                pipeline = self._redis.pipeline(transaction=False)
                for name, value in good.items():
                    pipeline.set(KEY_PREFIX + name, value, ex=self._ttl_seconds)
                await pipeline.execute()
                stored = True
        if not stored:
            self.counters.dropped["failed"] += len(good)
            return damaged
        self.writing.succeeded()
        ends = time.monotonic() + self._ttl_seconds
        for name, value in good.items():
            self._discard(name)
            self._written[name] = len(value), ends
            self.num_bytes += len(value)
        self.counters.stored += len(good)
        return damaged

    async def list_blocks(self, limit: int) -> list[tuple[BlockHash, int]]:
        """Everybody's, in no order."""
        blocks: list[tuple[BlockHash, int]] = []
        with self._guarded("a listing", _TRANSFER_SECONDS):
            async with asyncio.timeout(_TRANSFER_SECONDS):
                async for key in self._redis.scan_iter(match=KEY_PREFIX + b"*", count=_KEYS_AT_ONCE):
                    if len(blocks) >= limit:
                        break
                    name = key[len(KEY_PREFIX) :]
                    if len(name) == HASH_BYTES:
                        blocks.append((name, max(0, await self._redis.strlen(key) - HEADER_BYTES)))
        return blocks

    async def clear(self) -> int:
        """Everybody's."""
        num_blocks = 0
        with self._guarded("clearing", _CLEAR_SECONDS):
            async with asyncio.timeout(_CLEAR_SECONDS):
                keys: list[bytes] = []
                async for key in self._redis.scan_iter(match=KEY_PREFIX + b"*", count=_KEYS_AT_ONCE):
                    keys.append(key)
                    if len(keys) >= _KEYS_AT_ONCE:
                        num_blocks += await self._redis.unlink(*keys)
                        keys.clear()
                if keys:
                    num_blocks += await self._redis.unlink(*keys)
                self._written.clear()
                self.num_bytes = 0
        return num_blocks

    async def close(self) -> None:
        await self._redis.aclose(close_connection_pool=True)

    @contextmanager
    def _guarded(self, what: str, seconds: float) -> Iterator[None]:
        """A failure inside trips a breaker, and is over with that."""
        try:
            yield
        except OutOfMemoryError:
            self.writing.trip("Redis is full: raise its maxmemory, or set maxmemory-policy allkeys-lru")
        except TimeoutError:
            self.reading.trip(f"{what} took longer than {seconds:g} s")
        except (RedisError, OSError) as error:
            self.reading.trip(f"{what} failed: {error or type(error).__name__}")
        else:
            self.reading.succeeded()

    async def _make_room(self, num_bytes: int) -> None:
        """Forget what has expired, then remove our oldest."""
        now = time.monotonic()
        oldest: list[BlockHash] = []
        for name, (size, ends) in list(self._written.items()):
            if ends > now and self.num_bytes + num_bytes <= self.max_bytes:
                break
            if ends > now:
                oldest.append(name)
            del self._written[name]
            self.num_bytes -= size
        if oldest:
            self.counters.evicted += len(oldest)
            await self._delete(oldest)

    async def _delete(self, names: Sequence[BlockHash]) -> None:
        with self._guarded("removing", _TRANSFER_SECONDS):
            async with asyncio.timeout(_TRANSFER_SECONDS):
                await self._redis.unlink(*(KEY_PREFIX + name for name in names))
        for name in names:
            self._discard(name)

    def _discard(self, name: BlockHash) -> None:
        size, _ = self._written.pop(name, (0, 0.0))
        self.num_bytes -= size


def _pack_all(blocks: Sequence[SealedBlock]) -> list[bytes | None]:
    """Values to store; None for blocks that are not what was sealed."""
    return [
        pack_header(block.name, len(block.block), block.checksum) + block.block
        if is_intact(block.block, block.checksum)
        else None
        for block in blocks
    ]


def _unpack_all(blocks: Sequence[tuple[BlockHash, memoryview]], values: Sequence[bytes | None]) -> list[int | None]:
    """Copies each value's block into its memory; the checksums of the good ones."""
    checksums: list[int | None] = []
    for (name, into), value in zip(blocks, values, strict=True):
        checksum = None
        if value is not None and len(value) == HEADER_BYTES + len(into):
            view = memoryview(value)
            into[:] = view[HEADER_BYTES:]
            checksum = verified_checksum(view[:HEADER_BYTES], name, into)
        checksums.append(checksum)
    return checksums
