"""A generation that waits in front of the fleet, as admission.py lets it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relevo.core.errors import Cancelled, DeadlineExceeded, Exhausted, RelevoError, Unavailable
from services.pb import messages_pb2
from services.router.fair_queue import Entry
from services.router.generation import EndEvent, TokensEvent
from services.router.timeline import Timeline

if TYPE_CHECKING:
    from services.router.admission import Admission


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands in the queue. priority: the lowest is first. weight: of its client, beside others'"""

    client: str = ""
    priority: int = 0
    weight: float = 1.0


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
        refusal: RelevoError | None = None
        if not admission.is_full:
            admission.num_running += 1
            self._is_running = True
            try:
                event = await self._start()
            except (Exhausted, Unavailable) as error:
                refusal = error
                self._leave()
                if not admission.may_wait(error, time.monotonic()):
                    raise
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

    async def _begin_queued(self, refusal: RelevoError | None) -> TokensEvent | EndEvent:
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
                except (Exhausted, Unavailable) as error:
                    if (self._is_accepted and isinstance(error, Exhausted)) or not admission.may_wait(error, queued_at):
                        raise
                    self._inner = None
                    self._is_accepted = False
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
        """For its turn. Raises DeadlineExceeded; Exhausted or Unavailable if it takes too long or the place is lost."""
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
