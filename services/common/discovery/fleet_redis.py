"""A fleet's leases in Redis. Needs the extra `relevo[redis]`.

    relevo:fleet:NAME         sorted set: a member's JSON → the end of its lease, in ms of Redis's own clock
    relevo:fleet:NAME:news    channel: the set has changed; the message is the member that has left, or nothing

Every call is one round trip, and one script: nobody sees a half of what it does, and only Redis's clock counts. Whoever
comes by removes the leases that have ended and tells the others, so that all routers drop a dead worker together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from relevo.core.errors import StartupError

TROUBLES = (RedisError, OSError, TimeoutError)
"""What calls raise when Redis is not there, is slow or does not want us."""

CALL_SECONDS = 2.0  # for one round trip, and for connecting
_KEEP_MS = 86_400_000  # a fleet of which nothing is left is forgotten after a day

_REMOVE_ENDED = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local changes = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
"""
# A Redis that is full refuses what adds, but not in a script that has begun to write: the removal comes first.
_RENEW = (
    _REMOVE_ENDED
    + """
changes = changes + redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if changes > 0 then redis.call('PUBLISH', ARGV[1], '') end
"""
)
_LEAVE = """
if redis.call('ZREM', KEYS[1], ARGV[2]) > 0 then redis.call('PUBLISH', ARGV[1], ARGV[2]) end
"""
_LIST = (
    _REMOVE_ENDED
    + """
if changes > 0 then redis.call('PUBLISH', ARGV[1], '') end
local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 2, #found, 2 do found[i] = found[i] - now end
return found
"""
)


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as it is found. address: host:port, as routers reach it."""

    role: str
    address: str
    incarnation: str
    worker_id: str

    def to_json(self) -> str:
        """The same for equal members."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Member:
        """Raises ValueError for what was not written by to_json()."""
        try:
            values = json.loads(text)
            return Member(**{name: str(values[name]) for name in Member.__dataclass_fields__})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{text[:200]!r} describes no worker") from error


class FleetRedis:
    """One process's connections to the leases of one fleet. Close it.

    place: host:port of Redis, without its password
    """

    def __init__(self, url: str, fleet: str) -> None:
        """Connects later. Raises StartupError if the URL is none."""
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(  # its types leave open what is awaitable
                url,
                decode_responses=True,
                encoding_errors="replace",  # of what is not ours, and is ignored
                socket_timeout=CALL_SECONDS,
                socket_connect_timeout=CALL_SECONDS,
                retry=Retry(NoBackoff(), 0),  # who calls tries again
            )
        except ValueError as error:
            raise StartupError(f"--redis-url: {error}; redis://HOST:PORT/0 is right") from error
        known = self._redis.connection_pool.connection_kwargs
        self.place = str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")
        self._key = f"relevo:fleet:{fleet}"
        self._channel = f"{self._key}:news"
        self._renew = self._redis.register_script(_RENEW)
        self._leave = self._redis.register_script(_LEAVE)
        self._list = self._redis.register_script(_LIST)

    async def renew(self, member: Member, ttl_seconds: float) -> None:
        """A lease from now on. A member that had none is announced. Raises TROUBLES."""
        ttl_ms = max(1, round(1000 * ttl_seconds))
        await self._renew(keys=[self._key], args=[self._channel, ttl_ms, member.to_json(), _KEEP_MS])

    async def leave(self, member: Member) -> None:
        """Its lease ends, and everybody is told. Raises TROUBLES."""
        await self._leave(keys=[self._key], args=[self._channel, member.to_json()])

    async def members(self) -> list[tuple[str, float]]:
        """Members' JSON, and how many seconds are left of their leases. Raises TROUBLES."""
        found: Sequence[Any] = await self._list(keys=[self._key], args=[self._channel])
        return [(text, int(left_ms) / 1000) for text, left_ms in zip(found[::2], found[1::2], strict=True)]

    async def subscribe(self) -> News:
        """From when this returns, no change is missed. Raises TROUBLES."""
        pubsub = self._redis.pubsub()
        try:
            await pubsub.subscribe(self._channel)
            await pubsub.get_message(timeout=CALL_SECONDS)  # the confirmation
        except BaseException:
            await pubsub.aclose()
            raise
        return News(pubsub)

    async def close(self) -> None:
        await self._redis.aclose(close_connection_pool=True)


class News:
    """A subscription. Close it."""

    def __init__(self, pubsub: Any) -> None:
        self._pubsub = pubsub

    async def wait(self, timeout_seconds: float) -> str | None:
        """The next message: the member that has left, or "". None: there was none for so long. Raises TROUBLES."""
        message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_seconds)
        return None if message is None else str(message["data"])

    async def close(self) -> None:
        await self._pubsub.aclose()
