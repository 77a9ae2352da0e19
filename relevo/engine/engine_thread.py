"""The one thread that owns the device, and its asyncio face."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from relevo.core.block_hash import BlockHash
from relevo.core.request import Request
from relevo.engine.engine import Engine
from relevo.engine.shortage import SERVING_ADVICE, explain_shortage
from relevo.engine.step_result import StepResult

logger = logging.getLogger(__name__)

Command = Callable[[Engine], None]

_MEMORY = 0.98  # with each step, of the longest one: some hundred steps are remembered


class EngineThread:
    """Steps an engine in a thread of its own. Commands go in through a queue and take effect before the next step;
    results come out in one call a step, in the loop that called start().

    The queue is unbounded: whoever submits bounds the requests in flight, and each has a handful of commands.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepResult], None]) -> None:
        self.engine = engine
        self._on_step = on_step
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        # Of time.monotonic(); None while it waits for a command. Written by the thread, read by anybody.
        self._step_began_at: float | None = None
        self._longest_step_seconds = 0.0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread.start()

    async def stop(self) -> None:
        """After the step that runs now. Requests that have not ended stay without an end: end them before."""
        self._commands.put(None)
        with contextlib.suppress(Exception):  # it was logged where it happened; wait() raises it
            await self.wait()
        await asyncio.to_thread(self._thread.join)

    async def wait(self) -> None:
        """Until the thread has ended; raises what it died of."""
        assert self._ended is not None, "not started"
        await asyncio.shield(self._ended)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def step_ages(self) -> tuple[float, float]:
        """Seconds that the step in progress takes already, commands before it included, 0 if there is none; and that
        the longest took, which is forgotten by and by. Any thread.
        """
        began_at = self._step_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at, self._longest_step_seconds

    def submit(self, request: Request) -> None:
        self._commands.put(lambda engine: engine.submit(request))

    def resume(self, request_id: str, num_computed_tokens: int, token_ids: list[int]) -> None:
        self._commands.put(lambda engine: engine.resume(request_id, num_computed_tokens, token_ids))

    def abort(self, request_id: str) -> None:
        self._commands.put(lambda engine: engine.abort(request_id))

    def release(self, request_id: str) -> None:
        self._commands.put(lambda engine: engine.release(request_id))

    async def pin(self, names: Sequence[BlockHash]) -> dict[BlockHash, int]:
        """See Engine.pin; the blocks are held when this returns. Cancelled: then none is, when it raises."""
        assert self._loop is not None and self._ended is not None
        pinned: asyncio.Future[dict[BlockHash, int]] = self._loop.create_future()
        self._commands.put(lambda engine: self._tell(_settle, pinned, engine.pin(names)))
        try:
            return await asyncio.shield(pinned)
        except asyncio.CancelledError:
            await asyncio.wait((pinned, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if pinned.done():
                self.unpin(list(pinned.result().values()))
            raise

    def unpin(self, block_ids: Sequence[int]) -> None:
        self._commands.put(lambda engine: engine.unpin(block_ids))

    def call(self, command: Command) -> None:
        """Run this between two steps; for audits."""
        self._commands.put(command)

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except BaseException as error:
            logger.exception("the engine thread died")
            self._tell(self._end, error)
            return
        self._tell(self._end, None)

    def _step_until_stopped(self) -> None:
        idle = False
        load = self.engine.load()
        device = self.engine.kv_cache.storage.device
        while True:
            commands = self._drain(wait=idle)
            began_at = self._step_began_at = time.monotonic()
            for command in commands:
                if command is None:
                    return
                command(self.engine)
            with explain_shortage(device, "a step", SERVING_ADVICE):
                result = self.engine.step()
            seconds = time.monotonic() - began_at
            self._longest_step_seconds = max(seconds, _MEMORY * self._longest_step_seconds)
            # Nothing was computed: only a command can change that, or what the engine is busy with.
            idle = result.num_scheduled_tokens == 0 and not self.engine.is_busy
            # A release changes nothing but the load, and whoever places requests by it must hear of that too.
            if not result.is_empty or result.load != load:
                self._tell(self._on_step, result)
            load = result.load
            self._step_began_at = None

    def _drain(self, *, wait: bool) -> list[Command | None]:
        commands = [self._commands.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        return commands

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *args)

    def _end(self, error: BaseException | None) -> None:
        assert self._ended is not None
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # retrieved, even if nobody waits


def _settle(future: asyncio.Future[dict[BlockHash, int]], found: dict[BlockHash, int]) -> None:
    future.set_result(found)
