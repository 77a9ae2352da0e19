"""A worker's own entry among the leases in Redis."""

from __future__ import annotations

import asyncio
import logging

from services.common.discovery.fleet_redis import CALL_SECONDS, TROUBLES, FleetRedis, Member

logger = logging.getLogger(__name__)

_RENEWALS = 3  # in a TTL: two may fail before the lease ends
_RETRY_SECONDS = 1.0


class Lease:
    """Renewed as long as run() runs. Without Redis the worker serves on, and comes back to the list by itself."""

    def __init__(self, redis: FleetRedis, member: Member, ttl_seconds: float) -> None:
        self._redis = redis
        self._member = member
        self._ttl_seconds = ttl_seconds
        self._is_in_trouble = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            pause_seconds = self._ttl_seconds / _RENEWALS
            try:
                await self._redis.renew(self._member, self._ttl_seconds)
            except TROUBLES as error:
                pause_seconds = min(pause_seconds, _RETRY_SECONDS)
                if not self._is_in_trouble:  # once, and not at every attempt
                    self._is_in_trouble = True
                    reason = str(error) or type(error).__name__
                    logger.warning("Redis at %s: routers cannot find this worker there: %s", self._redis.place, reason)
            else:
                if self._is_in_trouble:
                    self._is_in_trouble = False
                    logger.info("Redis at %s: routers find this worker there again", self._redis.place)
            await asyncio.sleep(pause_seconds)

    async def leave(self) -> None:
        """Out of the list, now. Not while run() runs, which would put it in again."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._redis.leave(self._member)
        except TROUBLES as error:
            reason = str(error) or type(error).__name__
            logger.warning(
                "Redis at %s: this worker stays in the list for up to %g s: %s",
                self._redis.place,
                self._ttl_seconds,
                reason,
            )
