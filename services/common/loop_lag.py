"""How late the event loop is: the time between when something was due and when it ran."""

from __future__ import annotations

import asyncio
from collections import deque

from prometheus_client import Histogram

INTERVAL_SECONDS = 0.1
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class LoopLag:
    """metric: for a registry. run() belongs into the loop that is looked at."""

    def __init__(self) -> None:
        self.metric = Histogram(
            "relevo_event_loop_lag_seconds",
            "How late the event loop was with a timer, ten times a second",
            buckets=_BUCKETS,
            registry=None,
        )
        self._recent: deque[float] = deque([0.0], maxlen=round(1 / INTERVAL_SECONDS))

    @property
    def worst_seconds(self) -> float:
        """Of the last second."""
        return max(self._recent)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL_SECONDS
            await asyncio.sleep(INTERVAL_SECONDS)
            lag_seconds = max(0.0, loop.time() - due)
            self._recent.append(lag_seconds)
            self.metric.observe(lag_seconds)
