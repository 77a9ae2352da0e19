"""The gate in front of dispatch: as long as the fleet has room everything goes through; then there is a queue.

The fleet is full when as many requests run as may (max_running), or when no worker took a request on. From then on
newcomers queue. Only the first of the queue tries, and the next as soon as a worker has accepted it: so that nobody
overtakes, and workers are not asked a thousand times for what they don't have. After a refusal the next try waits for a
running request to end, or for a while: other routers' requests end too.

A fleet without a decode worker that could take anything on is like a full one, but for a shorter time (absent_seconds).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from relevo.core.errors import Exhausted, RelevoError, Unavailable
from services.pb import messages_pb2
from services.router.admitted import AdmittedGeneration, Standing
from services.router.backlog import Backlog
from services.router.fair_queue import Entry, FairQueue
from services.router.generation import Dispatcher
from services.router.timeline import Timeline

_TRY_SECONDS = 0.5  # a worker that has not said yes or no by then, to the first of the queue, holds nobody else up
_MIN_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 1.0
_MAX_ABSENT_PAUSE_SECONDS = 0.25  # while there is no worker: looking costs no worker anything
_QUEUE_TIME_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """max_running: at the workers, from this router; None = until they refuse. queue_seconds: the longest wait

    absent_seconds: the longest wait for a decode worker where none is that can take requests on; 0: not at all
    """

    max_running: int | None = None
    max_queued: int = 256
    queue_seconds: float = 30.0
    absent_seconds: float = 0.0


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
        self._absent_since: float | None = None  # there was no worker, when somebody tried, since; None: there was

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

    def may_wait(self, refusal: RelevoError, queued_at: float) -> bool:
        """Whether a request goes (back) to the queue after it. queued_at: when it first did, on time.monotonic."""
        if isinstance(refusal, Exhausted):
            self._absent_since = None
            return True
        now = time.monotonic()
        if self._absent_since is None:
            self._absent_since = now
        return now - max(queued_at, self._absent_since) < self.limits.absent_seconds

    def enqueue(self, generation: AdmittedGeneration, refusal: RelevoError | None) -> Entry[AdmittedGeneration]:
        """A place in the queue. refusal: why it was not taken on. Raises Exhausted if there is none for it."""
        if isinstance(refusal, Exhausted):
            self._backlog.hint(refusal.retry_after_seconds)
        if refusal is not None:
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
            self._absent_since = None
            self._backlog.admitted()
            self._pause_seconds = _MIN_PAUSE_SECONDS
            self._queue.serve(entry)
            self._stop_trying(entry)

    def refused(self, entry: Entry[AdmittedGeneration]) -> None:
        """No worker had room, or none was there. It keeps its place."""
        self._wait_a_while()
        longest = _MAX_PAUSE_SECONDS if self._absent_since is None else _MAX_ABSENT_PAUSE_SECONDS
        self._pause_seconds = min(longest, 2 * self._pause_seconds)
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

    def overdue(self) -> RelevoError:
        self.metrics.refused.labels("too_long").inc()
        seconds = self.limits.queue_seconds
        if self._absent_since is not None:
            return Unavailable(f"there was no decode worker for {seconds:g} s: {self.dispatcher.complaint()}")
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
            self._absent_since = None
        self.try_next()

    def _wait_a_while(self) -> None:
        if self._pause is None:
            self._pause = asyncio.get_running_loop().call_later(self._pause_seconds, self._go_on)

    def _go_on(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self.try_next()
