"""A KV agent in this process."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from services.common.lifecycle import Process
from services.kvtransfer.agent import Agent, start_agent
from services.kvtransfer.config import KvTransferSettings

TIMEOUT_SECONDS = 10.0


@asynccontextmanager
async def running_agent(arena_dir: Path, num_blocks: int = 64, **options: Any) -> AsyncIterator[Agent]:
    """A KV agent in this process; at the end nothing may be in use at it, and its slots must add up."""
    settings = KvTransferSettings(
        port=0, kv_arena=num_blocks * mmap.PAGESIZE, arena_dir=arena_dir, drain_seconds=0.0, pin_seconds=5.0, **options
    )
    async with AsyncExitStack() as stack:
        agent = await start_agent(settings, Process("kvtransfer", settings, stack))
        yield agent
        await until(lambda: is_unused(agent))


def is_unused(agent: Agent) -> bool:
    agent.store.check()
    audit = agent.store.table.audit()
    assert audit.num_free + audit.num_granted + audit.num_sealed == audit.num_slots
    return not (audit.num_granted or audit.num_pinned or audit.num_leases or audit.num_readers)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until this is so. Fails if it does not come."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110  # looked at from outside, where there is no event for it
            await asyncio.sleep(0.001)
