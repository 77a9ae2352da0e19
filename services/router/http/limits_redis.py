"""API keys' limits counted in Redis, for all routers of a fleet together. Needs the extra `relevo[redis]`.

    relevo:limits:FLEET:KEY:rate       hash: what is left of the burst, and when it was so, in ms of Redis's own clock
    relevo:limits:FLEET:KEY:running    sorted set: a request's permit → the end of its lease

A permit is a lease that its router renews, so that a router that dies gives its requests' places back. Where Redis is
not there or slow, each router counts by itself for a while: a limit is worth less than an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from relevo.core.errors import StartupError
from services.router.http.keys import ApiKey
from services.router.http.limits import LocalLimiter, MeanSeconds, Permit, too_fast, too_many_at_once

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
CALL_SECONDS = 0.25  # for one round trip, and for connecting: requests wait for it
RETRY_SECONDS = 5.0  # after Redis has failed
MAX_CONNECTIONS = 16

_TROUBLES = (RedisError, OSError, TimeoutError)

_ACQUIRE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local rate, burst, concurrency = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if concurrency > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if redis.call('ZCARD', KEYS[2]) >= concurrency then return {'full', '0'} end
end
if rate > 0 then
  local state = redis.call('HMGET', KEYS[1], 'level', 'at')
  local level = tonumber(state[1]) or burst
  level = math.min(burst, level + math.max(0, now - (tonumber(state[2]) or now)) * rate / 1000)
  if level < 1 then return {'fast', tostring((1 - level) / rate)} end
  redis.call('HSET', KEYS[1], 'level', tostring(level - 1), 'at', string.format('%.3f', now))
  redis.call('PEXPIRE', KEYS[1], math.ceil(1000 * burst / rate) + 1000)
end
if concurrency > 0 then
  redis.call('ZADD', KEYS[2], now + ARGV[5], ARGV[4])
  redis.call('PEXPIRE', KEYS[2], ARGV[5])
end
return {'ok', '0'}
"""
_RENEW = """
local time = redis.call('TIME')
local ends = time[1] * 1000 + time[2] / 1000 + ARGV[1]
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""


@dataclass(slots=True, eq=False)
class _RedisPermit:
    limiter: RedisLimiter
    key: ApiKey
    name: str
    began: float = field(default_factory=time.monotonic)

    async def release(self) -> None:
        await self.limiter.release(self)


class RedisLimiter:
    """One router's. `run` it, and close it."""

    def __init__(self, url: str, fleet: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        """Connects later. Raises StartupError if the URL is none."""
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=CALL_SECONDS,
                socket_timeout=CALL_SECONDS,
                socket_connect_timeout=CALL_SECONDS,
                decode_responses=True,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise StartupError(f"--redis-url: {error}; redis://HOST:PORT/0 is right") from error
        self._redis: Any = redis.asyncio.Redis.from_pool(pool)  # its types leave open what is awaitable
        self._prefix = f"relevo:limits:{fleet}"
        self._lease_seconds = lease_seconds
        self._acquire = self._redis.register_script(_ACQUIRE)
        self._renew = self._redis.register_script(_RENEW)
        self._local = LocalLimiter()
        self._permits: set[_RedisPermit] = set()
        self._mean_seconds: dict[str, MeanSeconds] = {}  # by the key's name: of those with limits
        self._retry_at = 0.0  # until then nobody asks Redis

    async def acquire(self, key: ApiKey) -> Permit:
        """Raises Exhausted."""
        if time.monotonic() < self._retry_at:
            return await self._local.acquire(key)
        permit = _RedisPermit(self, key, uuid.uuid4().hex)
        lease_ms = round(1e3 * self._lease_seconds)
        try:
            answer, seconds = await self._acquire(
                keys=[f"{self._prefix}:{key.name}:rate", self._running(key)],
                args=[key.rps or 0, key.burst, key.concurrency or 0, permit.name, lease_ms],
            )
        except _TROUBLES as error:
            self._give_up_for_a_while(error)
            return await self._local.acquire(key)
        if answer == "fast":
            raise too_fast(key, float(seconds))
        mean = self._mean_seconds.setdefault(key.name, MeanSeconds())
        if answer == "full":
            assert key.concurrency is not None
            raise too_many_at_once(key, mean.seconds / key.concurrency)
        if key.concurrency is not None:
            self._permits.add(permit)
        return permit

    async def release(self, permit: _RedisPermit) -> None:
        """If Redis does not hear of it, the lease ends."""
        self._mean_seconds[permit.key.name].observe(time.monotonic() - permit.began)
        if permit not in self._permits:
            return
        self._permits.remove(permit)
        try:
            await self._redis.zrem(self._running(permit.key), permit.name)
        except _TROUBLES as error:
            self._give_up_for_a_while(error)

    async def run(self) -> None:
        """Renews leases; never returns."""
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            by_key: dict[str, list[str]] = {}
            for permit in self._permits:
                by_key.setdefault(self._running(permit.key), []).append(permit.name)
            try:
                for name, permits in by_key.items():
                    await self._renew(keys=[name], args=[round(1e3 * self._lease_seconds), *permits])
            except _TROUBLES as error:
                self._give_up_for_a_while(error)

    async def close(self) -> None:
        await self._redis.aclose(close_connection_pool=True)

    def _running(self, key: ApiKey) -> str:
        return f"{self._prefix}:{key.name}:running"

    def _give_up_for_a_while(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._retry_at:
            logger.warning("Redis failed: this router counts API keys' requests by itself: %s", type(error).__name__)
        self._retry_at = now + RETRY_SECONDS
