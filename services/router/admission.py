"""The gate in front of dispatch: as long as the fleet has room everything goes through; then there is a queue.

The fleet is full when as many requests run as may (max_running), or when no worker took a request on. From then on
newcomers queue. Only the first of the queue tries, and the next as soon as a worker has accepted it: so that nobody
overtakes, and workers are not asked a thousand times for what they don't have. After a refusal the next try waits for a
running request to end, or for a while: other routers' requests end too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from relevo.core.errors import Cancelled, DeadlineExceeded, Exhausted
from services.pb import messages_pb2
from services.router.backlog import Backlog
from services.router.fair_queue import Entry, FairQueue
from services.router.generation import Dispatcher, EndEvent, TokensEvent
from services.router.timeline import Timeline

_TRY_SECONDS = 0.5  # a worker that has not said yes or no by then, to the first of the queue, holds nobody else up
_MIN_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 1.0
_QUEUE_TIME_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """max_running: at the workers, from this router; None = until they refuse. queue_seconds: the longest wait"""

    max_running: int | None = None
    max_queued: int = 256
    queue_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands in the queue. priority: the lowest is first. weight: of its client, beside others'"""

    client: str = ""
    priority: int = 0
    weight: float = 1.0


class AdmissionMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.queued = Gauge("relevo_num_requests_waiting", "Requests in the router's queue.", registry=registry)
        self.refused = Counter(
            "relevo_requests_refused",
            "Choices that got no place in the queue (`full`), lost it to others (`displaced`), or waited `too_long`",
            ("reason",),
            registry=registry,
        )
        self.queue_time = Histogram(
            "relevo_request_queue_time_seconds",
            "Time in the router's queue; 0 where there was room.",
            buckets=_QUEUE_TIME_BUCKETS,
            registry=registry,
        )


class Admission:
    """One router's gate. It owns no task: who waits does it, and a timer wakes the first after a pause."""

    def __init__(self, dispatcher: Dispatcher, limits: AdmissionLimits, registry: CollectorRegistry) -> None:
        self.dispatcher = dispatcher
        self.limits = limits
        self.metrics = AdmissionMetrics(registry)
        self.num_running = 0
        self._queue: FairQueue[AdmittedGeneration] = FairQueue(limits.max_queued)
        self._backlog = Backlog(time.monotonic)
        self._trying: Entry[AdmittedGeneration] | None = None
        self._try_timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._pause_seconds = _MIN_PAUSE_SECONDS

    def generate(
        self, request: messages_pb2.GenerationRequest, standing: Standing, timeline: Timeline | None = None
    ) -> AdmittedGeneration:
        """Nothing happens before the first `__anext__`, but the request's deadline runs from now."""
        return AdmittedGeneration(self, request, standing, Timeline() if timeline is None else timeline)

    @property
    def is_full(self) -> bool:
        """As far as is known: whether a newcomer has to queue."""
        if self._queue:
            return True
        return self.limits.max_running is not None and self.num_running >= self.limits.max_running

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    # --- Of an AdmittedGeneration ---------------------------------------------------------------------------------

    def enqueue(self, generation: AdmittedGeneration, refusal: Exhausted | None) -> Entry[AdmittedGeneration]:
        """A place in the queue. refusal: what the workers have said to it. Raises Exhausted if there is none for it."""
        if refusal is not None:
            self._backlog.hint(refusal.retry_after_seconds)
            self._wait_a_while()
        request, standing = generation.request, generation.standing
        entry, displaced = self._queue.push(
            generation,
            standing.client,
            priority=standing.priority,
            weight=standing.weight,
            cost=len(request.prompt_token_ids) + request.sampling.max_tokens,
            keep=self._trying,
        )
        if displaced is not None:
            displaced.item.lose_place(self._full("displaced"))
        if entry is None:
            raise self._full("full")
        self._backlog.queued()
        self.metrics.queued.set(len(self._queue))
        self.try_next()
        return entry

    def try_next(self) -> None:
        """Let the first try, if there may be room for it and nobody tries already."""
        if self._trying is not None or self._pause is not None:
            return
        if self.limits.max_running is not None and self.num_running >= self.limits.max_running:
            return
        entry = self._queue.peek()
        if entry is not None:
            self._trying = entry
            loop = asyncio.get_running_loop()
            self._try_timer = loop.call_later(_TRY_SECONDS, entry.item.count_as_running, entry)
            entry.item.take_turn()

    def accepted(self, entry: Entry[AdmittedGeneration]) -> None:
        """A worker has taken it on, or takes its time to say whether it does. Twice is harmless."""
        if entry.is_queued:
            self.num_running += 1
            self._backlog.admitted()
            self._pause_seconds = _MIN_PAUSE_SECONDS
            self._queue.serve(entry)
            self._stop_trying(entry)

    def refused(self, entry: Entry[AdmittedGeneration]) -> None:
        """No worker had room. It keeps its place."""
        self._wait_a_while()
        self._pause_seconds = min(_MAX_PAUSE_SECONDS, 2 * self._pause_seconds)
        self._stop_trying(entry)

    def withdraw(self, entry: Entry[AdmittedGeneration]) -> None:
        """It waits no longer. Twice, or after accepted(), is harmless."""
        if entry.is_queued:
            self._queue.remove(entry)
            self._stop_trying(entry)

    def ended(self) -> None:
        """One that ran runs no longer."""
        self.num_running -= 1
        if self._queue:
            self._go_on()

    def overdue(self) -> Exhausted:
        self.metrics.refused.labels("too_long").inc()
        seconds = self.limits.queue_seconds
        return Exhausted(f"no worker had room for {seconds:g} s", self._backlog.wait_seconds(len(self._queue)))

    def _full(self, reason: str) -> Exhausted:
        self.metrics.refused.labels(reason).inc()
        what = "others went first, and " if reason == "displaced" else ""
        return Exhausted(
            f"no worker has room; {what}{self.limits.max_queued} requests are waiting already",
            self._backlog.wait_seconds(len(self._queue)),
        )

    def _stop_trying(self, entry: Entry[AdmittedGeneration]) -> None:
        self.metrics.queued.set(len(self._queue))
        if self._trying is entry:
            self._trying = None
            assert self._try_timer is not None
            self._try_timer.cancel()
        if not self._queue:
            self._backlog.emptied()
        self.try_next()

    def _wait_a_while(self) -> None:
        if self._pause is None:
            self._pause = asyncio.get_running_loop().call_later(self._pause_seconds, self._go_on)

    def _go_on(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self.try_next()


class AdmittedGeneration:
    """A Generation that begins when there is room for it."""

    def __init__(
        self, admission: Admission, request: messages_pb2.GenerationRequest, standing: Standing, timeline: Timeline
    ) -> None:
        self.request = request
        self.standing = standing
        self.timeline = timeline
        self.on_accepted: Callable[[], None] | None = None
        self._admission = admission
        self._inner = None if admission.is_full else admission.dispatcher.generate(request)
        self._has_begun = False  # its first event is there: from now on it is the inner one alone
        self._is_running = False  # and counted
        self._is_accepted = False
        self._turn: asyncio.Future[None] | None = None
        self._deadline = time.monotonic() + request.timeout_ms / 1e3 if request.timeout_ms else None

    def __aiter__(self) -> AdmittedGeneration:
        return self

    def __anext__(self) -> Coroutine[Any, Any, TokensEvent | EndEvent]:
        if self._has_begun:
            assert self._inner is not None
            return self._inner.__anext__()
        return self._begin()

    def explain(self, max_candidates: int | None = None) -> Mapping[str, Any] | None:
        return None if self._inner is None else self._inner.explain(max_candidates)

    async def aclose(self) -> None:
        self.lose_place(Cancelled("the client has left"))
        self._leave()
        if self._inner is not None:
            await self._inner.aclose()

    def take_turn(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def count_as_running(self, entry: Entry[AdmittedGeneration]) -> None:
        """It leaves the queue for the workers. Twice is harmless."""
        if entry.is_queued:
            self._is_running = True
            self._admission.accepted(entry)

    def lose_place(self, error: Exception) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_exception(error)
            self._turn.exception()  # nobody may be waiting for it just now

    async def _begin(self) -> TokensEvent | EndEvent:
        admission = self._admission
        refusal: Exhausted | None = None
        if not admission.is_full:
            admission.num_running += 1
            self._is_running = True
            try:
                event = await self._start()
            except Exhausted as error:
                refusal = error
                self._leave()
            except BaseException:
                self._leave()
                raise
            else:
                admission.metrics.queue_time.observe(0.0)
                return event
        if self._inner is not None:  # refused, or made when there was room
            await self._inner.aclose()
            self._inner = None
        return await self._begin_queued(refusal)

    async def _begin_queued(self, refusal: Exhausted | None) -> TokensEvent | EndEvent:
        admission = self._admission
        loop = asyncio.get_running_loop()
        self._turn = loop.create_future()
        queued_at = time.monotonic()
        entry = admission.enqueue(self, refusal)
        try:
            while True:
                waits_since = time.perf_counter()
                await self._wait(self._turn, queued_at)
                self.timeline.mark("router.queue", waits_since)
                self._turn = loop.create_future()  # of the next try, if this one is refused
                try:
                    event = await self._start(entry)
                except Exhausted as error:
                    if self._is_accepted:
                        raise
                    self._inner = None
                    if entry.is_queued:
                        admission.refused(entry)
                    else:  # it was counted as running meanwhile
                        self._leave()
                        entry = admission.enqueue(self, error)
                else:
                    self.count_as_running(entry)
                    admission.metrics.queue_time.observe(time.monotonic() - queued_at)
                    return event
        except BaseException:
            self._leave()
            raise
        finally:
            admission.withdraw(entry)

    async def _start(self, entry: Entry[AdmittedGeneration] | None = None) -> TokensEvent | EndEvent:
        """Dispatch it, with what is left of its time. Its first event, which may be long in coming."""
        left = self._seconds_left()
        if left is not None:
            self.request.timeout_ms = max(1, round(1e3 * left))
        if self._inner is None:
            self._inner = self._admission.dispatcher.generate(self.request)
        if entry is not None:
            self._inner.on_accepted = lambda: self._note_accepted(entry)
        self._inner.timeline = self.timeline
        event = await self._inner.__anext__()
        self._has_begun = True
        return event

    async def _wait(self, turn: asyncio.Future[None], queued_at: float) -> None:
        """For its turn. Raises DeadlineExceeded; Exhausted if it takes too long or the place is lost."""
        left = self._seconds_left()
        patience = queued_at + self._admission.limits.queue_seconds - time.monotonic()
        try:
            async with asyncio.timeout(patience if left is None else min(left, patience)):
                await turn
        except TimeoutError:
            if left is not None and left <= patience:
                raise DeadlineExceeded("the time was over before a worker had room") from None
            raise self._admission.overdue() from None

    def _note_accepted(self, entry: Entry[AdmittedGeneration]) -> None:
        self._is_accepted = True
        self.count_as_running(entry)

    def _leave(self) -> None:
        if self._is_running:
            self._is_running = False
            self._admission.ended()

    def _seconds_left(self) -> float | None:
        """Of the request's deadline; None: it has none. Raises DeadlineExceeded."""
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the time was over before a worker had room")
        return left
