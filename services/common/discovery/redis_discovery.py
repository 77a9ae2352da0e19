"""Workers that have a lease in Redis.

A message says only *that* something has changed; what, is read: one round trip. Besides, the leases are read every
third of their TTL, in case a message was lost and to see whose lease has ended. So with a TTL of 10 s a router asks
once in 3 s, and a worker renews as often, however many requests there are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from services.common.discovery import IsAlive, Members
from services.common.discovery.board import Board
from services.common.discovery.fleet_redis import TROUBLES, FleetRedis, Member, News

logger = logging.getLogger(__name__)

_GATHER_SECONDS = 0.02  # for what comes together, as when a fleet starts: one reading is enough
_MIN_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 2.0


class RedisDiscovery:
    """A worker is there until it says that it leaves, or until its lease has ended by our own clock.

    One that is missing before that was not taken out, but lost: Redis was flushed, or came back empty. It will write
    itself in again. While Redis is gone no lease ends, and when it is back each starts anew: a worker need not have
    renewed it sooner than we look. One that is known to be alive stays even then: it may be its way to Redis that is
    broken.

    trouble: why Redis cannot be asked; "" if it can
    """

    def __init__(self, redis: FleetRedis, ttl_seconds: float) -> None:
        """ttl_seconds: as workers have it, or longer"""
        self.trouble = ""
        self._redis = redis
        self._ttl_seconds = ttl_seconds
        self._board = Board()
        self._leases: dict[str, float] = {}  # member's JSON → when it ends, in time.monotonic()'s seconds
        self._left: set[str] = set()  # members that said so, since the last reading
        self._nonsense: set[str] = set()  # what is no member, and was complained of

    def watch(self, role: str) -> AsyncIterator[Members]:
        return self._board.watch(role)

    async def run(self, is_alive: IsAlive) -> None:
        """Until cancelled."""
        backoff_seconds = _MIN_BACKOFF_SECONDS
        while True:
            began = time.monotonic()
            try:
                await self._follow(is_alive)
            except TROUBLES as error:
                self._note_trouble(str(error) or type(error).__name__)
            if time.monotonic() - began > _MAX_BACKOFF_SECONDS:
                backoff_seconds = _MIN_BACKOFF_SECONDS
            await asyncio.sleep(backoff_seconds)
            backoff_seconds = min(2 * backoff_seconds, _MAX_BACKOFF_SECONDS)

    async def _follow(self, is_alive: IsAlive) -> None:
        """One connection's life. Raises TROUBLES."""
        news = await self._redis.subscribe()
        try:
            now = time.monotonic()
            self._leases = {text: max(end, now + self._ttl_seconds) for text, end in self._leases.items()}
            while True:
                await self._read(is_alive)
                if self.trouble:
                    logger.info("Redis at %s is back", self._redis.place)
                    self.trouble = ""
                await self._wait(news)
        finally:
            await news.close()

    async def _read(self, is_alive: IsAlive) -> None:
        now = time.monotonic()
        leases = {text: now + left_seconds for text, left_seconds in await self._redis.members()}
        taken = {member.address for text in leases if (member := self._parse(text)) is not None}

        def is_lost(text: str, end: float) -> bool:
            """Rather than gone."""
            member = self._parse(text)
            if member is None or member.address in taken or text in self._left:
                return False
            return end > now or is_alive(member.address)

        lost = {text: end for text, end in self._leases.items() if text not in leases and is_lost(text, end)}
        self._left.clear()
        self._leases = lost | leases
        self._nonsense &= leases.keys()
        members: dict[str, dict[str, str]] = {}
        # Of two at one address the one with the later lease counts: the other is dead, and renews no more.
        for text, _ in sorted(self._leases.items(), key=lambda item: item[1]):
            if (found := self._parse(text)) is not None:
                members.setdefault(found.role, {})[found.address] = found.incarnation
        self._board.write(members)

    def _parse(self, text: str) -> Member | None:
        try:
            return Member.from_json(text)
        except ValueError as error:
            if text not in self._nonsense:
                self._nonsense.add(text)
                logger.warning("Redis at %s: %s: ignored", self._redis.place, error)
            return None

    async def _wait(self, news: News) -> None:
        """Until there is reason to read again."""
        text = await news.wait(self._ttl_seconds / 3)
        if text is None:
            return
        await asyncio.sleep(_GATHER_SECONDS)
        while text is not None:
            if text:
                self._left.add(text)
            text = await news.wait(0.0)

    def _note_trouble(self, reason: str) -> None:
        if not self.trouble:  # once, and not at every attempt
            logger.warning(
                "Redis at %s is gone: serving goes on with the %d workers that are known: %s",
                self._redis.place,
                self._board.num_members,
                reason,
            )
        self.trouble = f"Redis at {self._redis.place} is gone, and new workers are not found: {reason}"
