"""A worker at run time: the engine, who listens to its steps, and who may still come in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Exhausted, RelevoError, Unavailable
from relevo.core.request import Request
from relevo.engine.spec_decode.stats import SpecDecodeStats
from relevo.engine.step_result import StepResult
from services.common.block_events import BlockEvents
from services.pb.messages_pb2 import Load
from services.worker.config import WorkerSettings
from services.worker.copying import Copier
from services.worker.direct_kv import DirectKV
from services.worker.messages import load_to_pb
from services.worker.ports import Admitted, EnginePort, EngineThreadPort, Event, Listener, MakeEngineThread
from services.worker.transfers import Transfers

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_SECONDS = 60.0


class Stream(Protocol):
    """An open session, as shutdown sees it."""

    def cancel_all(self, error: RelevoError | None = None) -> None: ...
    def finish(self) -> None: ...


class Worker:
    """Routes each step's results to the requests they belong to, and counts what is in progress.

    Belongs to one loop. run() must be running, start() called, before requests come.

    direct_kv: blocks' way from cache to cache, if that is wanted
    on_stored: called with the names that a step has put into the pool
    step_began_at, step_ended_at: of the step whose results are being told, on the clock of time.monotonic
    """

    def __init__(self, settings: WorkerSettings, engine: EnginePort, make_thread: MakeEngineThread) -> None:
        self.settings = settings
        self.engine = engine
        self.thread: EngineThreadPort = make_thread(engine, self._on_step)
        self.copier = Copier()
        self.transfers = Transfers()
        self.direct_kv: DirectKV | None = None
        self.on_stored: Callable[[Sequence[BlockHash]], None] | None = None
        self.load = Load(num_free_blocks=engine.info.num_blocks)
        self.block_events = BlockEvents(self._load_now)
        self.num_registered = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0  # of requests that have ended
        self.step_began_at = self.step_ended_at = 0.0
        self._listeners: dict[str, Listener] = {}
        self._waiting: set[str] = set()  # of _listeners: those that have no blocks yet
        self._sessions: set[Stream] = set()
        self._session_numbers = count(1)
        self.speculation = SpecDecodeStats()
        self._draining = False
        self._engine_is_dead = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Owns the requests' tasks: until it is cancelled, and they with it."""
        async with self._tasks:
            await asyncio.get_running_loop().create_future()

    def open_direct_kv(self, name: str) -> DirectKV:
        """See DirectKV; before registrations are made. Raises StartupError."""
        memory = self.engine.kv_cache.memory
        self.direct_kv = DirectKV(memory, self.transfers, name, self.spawn, lambda: self.num_requests > 0)
        return self.direct_kv

    async def watch_engine(self) -> None:
        """Raises what the engine's thread died of; returns when it was stopped."""
        try:
            await self.thread.wait()
        except Exception:
            self._engine_is_dead = True
            raise

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a request's coroutine. It answers for its own errors: one that escapes takes the worker down."""
        return self._tasks.create_task(coroutine, name=name)

    # --- Requests -------------------------------------------------------------------------------------------------

    def check_admission(self) -> None:
        """Raises what a new request is refused with: Unavailable when draining, Exhausted when the queue is full."""
        if self._draining:
            raise Unavailable("the worker is shutting down")
        if len(self._waiting) >= self.settings.max_num_waiting:
            raise Exhausted(
                f"{len(self._waiting)} requests are waiting already, the limit of --max-num-waiting",
                self._retry_after_seconds(),
            )

    def register(self, request_id: str, listener: Listener) -> None:
        """A request begins: it counts as waiting until a step gives it blocks."""
        assert request_id not in self._listeners
        self._listeners[request_id] = listener
        self._waiting.add(request_id)
        self.num_registered += 1
        self._idle.clear()

    def unregister(self, request_id: str) -> None:
        """A request is over: nothing of it is left on the engine."""
        self._listeners.pop(request_id, None)
        self._waiting.discard(request_id)
        if not self._listeners:
            self._idle.set()

    def count_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Of a request that has ended: how much of it was there, or has come."""
        self.num_prompt_tokens += num_tokens
        self.num_cached_tokens += num_cached_tokens

    def submit(self, request: Request) -> None:
        assert request.request_id in self._listeners
        self.thread.submit(request)

    @property
    def num_requests(self) -> int:
        return len(self._listeners)

    # --- Streams and shutdown -------------------------------------------------------------------------------------

    def next_session_name(self) -> str:
        return f"s{next(self._session_numbers)}"

    @contextmanager
    def session(self, stream: Stream) -> Iterator[None]:
        self._sessions.add(stream)
        try:
            yield
        finally:
            self._sessions.discard(stream)

    def begin_drain(self) -> None:
        """Refuse what is new, and tell routers at once, so that they don't even ask."""
        self._draining = True
        self.load.draining = True
        self.block_events.tell_load()

    async def drain(self, seconds: float) -> None:
        """Refuse what is new, let what runs end within `seconds`, cancel the rest, and end the streams."""
        self.begin_drain()
        if self._engine_is_dead:
            return  # nothing can end any more; the streams break when the server stops, and their routers go elsewhere
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests did not end within %.0f s: cancelled", self.num_requests, seconds)
            for stream in list(self._sessions):
                # Unavailable: a router takes them elsewhere.
                stream.cancel_all(Unavailable("the worker is shutting down"))
            await self._idle.wait()  # a step and a copy; lifecycle's watchdog bounds it
        for stream in list(self._sessions):
            stream.finish()
        self.block_events.close()

    # --- Steps ----------------------------------------------------------------------------------------------------

    def _on_step(self, result: StepResult) -> None:
        self.step_began_at, self.step_ended_at = result.began_at, result.ended_at
        self.load = load_to_pb(result.load, self.transfers.bytes_per_second)
        self.speculation = result.load.speculation or self.speculation
        self.load.draining = self._draining
        if result.removed or result.stored:
            self.block_events.apply(result.removed, result.stored)
        if result.stored and self.on_stored is not None:
            self.on_stored(result.stored)
        for request_id in result.admitted:
            self._tell(Admitted(request_id))
        # In the order of a request's life: its last step computes, samples and ends.
        for events in (
            result.reserved,
            result.chunks,
            result.computed,
            result.prompt_logprobs,
            result.tokens,
            result.beams,
            result.ended,
        ):
            for event in events:
                self._tell(event)

    def _load_now(self) -> Load:
        """With what changes while no step ends."""
        load = Load()
        load.CopyFrom(self.load)
        load.step_age_seconds, load.longest_step_seconds = self.thread.step_ages()
        return load

    def _tell(self, event: Event) -> None:
        self._waiting.discard(event.request_id)
        listener = self._listeners.get(event.request_id)
        if listener is None:
            return
        try:
            listener.on_event(event)
        except Exception:  # a bug in one request must not stop the others: this one ends with INTERNAL
            logger.exception("request %s failed", event.request_id)
            listener.cancel(RelevoError("internal error of the worker"))

    def _retry_after_seconds(self) -> float:
        """When the queue will have moved: how long what waits takes to compute, by the rates measured so far."""
        load = self.load
        if load.prefill_tokens_per_second > 0:
            seconds = load.num_waiting_tokens / load.prefill_tokens_per_second
        else:
            seconds = load.step_seconds * len(self._waiting)
        return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)
