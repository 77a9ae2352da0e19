"""A loop that is kept busy shows."""

from __future__ import annotations

import asyncio
import time

from services.common.loop_lag import INTERVAL_SECONDS, LoopLag


async def test_blocked_loop_is_late() -> None:
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    time.sleep(INTERVAL_SECONDS + 0.2)  # noqa: ASYNC251  # what must not happen in a loop
    await asyncio.sleep(0.01)
    task.cancel()
    [family] = lag.metric.collect()
    total = next(sample.value for sample in family.samples if sample.name.endswith("_sum"))
    assert 0.19 < total < 5
