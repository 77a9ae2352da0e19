"""Work in threads that never outlives who asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run_to_its_end(executor: Executor, work: Callable[[], T]) -> T:
    """Run `work` in a thread. A caller that is cancelled leaves only when the thread is through with it.

    So whoever cancels a task and has awaited it knows that nobody touches the task's blocks any more.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError:
                continue  # once more: the answer stays the same, and the first one is raised below
        if not future.cancelled():
            future.exception()  # seen; the caller is gone
        raise
