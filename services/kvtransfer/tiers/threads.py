"""Waiting for threads that touch blocks: whoever is cancelled leaves only when they are through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def in_thread(executor: Executor | None, *works: Callable[[], T]) -> list[T]:
    """Run all at once (executor: None = the loop's); their results.

    When this returns or raises, CancelledError included, no thread is at it any more: nobody touches the blocks.
    """
    loop = asyncio.get_running_loop()
    futures = [loop.run_in_executor(executor, work) for work in works]
    await _until_done(futures)
    return [future.result() for future in futures]


async def _until_done(futures: Sequence[asyncio.Future[T]]) -> None:
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as error:
            cancelled = error  # the first or a later one: the answer stays the same
    if cancelled is not None:
        for future in futures:
            if not future.cancelled():
                future.exception()  # seen; the caller is gone
        raise cancelled
