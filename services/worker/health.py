"""What a worker's gRPC health says of its engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from services.common.stuck import is_stuck

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Server(Protocol):
    async def set_serving(self, is_serving: bool) -> None: ...


async def tell_health(
    server: Server,
    step_ages: Callable[[], tuple[float, float]],
    stuck_seconds: float,
    look_seconds: float = LOOK_SECONDS,
) -> None:
    """For ever: NOT_SERVING while the engine is stuck, by the rule that routers go by (services/common/stuck.py)."""
    was_stuck = False
    while True:
        age, longest = step_ages()
        stuck = is_stuck(age, longest, stuck_seconds)
        if stuck and not was_stuck:
            logger.error("the engine is stuck: in one step for %.1f s; health says NOT_SERVING", age)
        elif was_stuck and not stuck:
            logger.info("the engine is not stuck any more")
        if stuck != was_stuck:
            await server.set_serving(not stuck)
        was_stuck = stuck
        await asyncio.sleep(look_seconds)
