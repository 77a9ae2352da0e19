"""Copies between the engine's blocks and the agent's arena, in threads, never outliving who asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

BLOCKS_PER_COPY = 16  # in one call: also what a cancelled request still waits for


class Copier:
    """A few threads that copy blocks. Copies and checksums release the GIL: steps and the loop go on meanwhile."""

    def __init__(self, num_threads: int = 2) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="copier")

    async def run(self, copy: Callable[[], T]) -> T:
        """Run `copy` in a thread. A caller that is cancelled leaves only when the thread is through with it.

        So whoever cancels a task and has awaited it knows that nobody touches the task's blocks any more.
        """
        future = asyncio.get_running_loop().run_in_executor(self._executor, copy)
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

    def close(self) -> None:
        self._executor.shutdown(wait=True)
