"""A request on its way through the fleet: the next candidate when one refuses, deadlines, cancellation, migration."""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from relevo.core.errors import Cancelled, DeadlineExceeded, Exhausted, InvalidRequest, RelevoError, Unavailable
from relevo.core.placement import Placement
from relevo.core.request import FinishReason
from relevo.core.worker_load import PromptWork
from services.pb import messages_pb2
from services.router.attempt import Attempt, DirectAttempt, Event, Job
from services.router.generation import EndEvent, TokensEvent
from services.router.inbox import Inbox
from services.router.planner import Planner
from services.router.prompt import Prompt
from services.router.request_stream import DECODE, PREFILL, RequestInbox
from services.router.route_log import Route, RouteRecord
from services.router.split import SplitAttempt
from services.router.timeline import Timeline

logger = logging.getLogger(__name__)

DEFAULT_RETRY_AFTER_SECONDS = 1.0
MIGRATION_SECONDS = 20.0  # how long a request that has begun waits for a worker to go on with: one may be starting anew


class RoutedGeneration:
    """A request on its way. It owns no task: workers' updates come into its inbox, and whoever iterates works them off.

    A decode worker that is lost is replaced by another at any time: from the tokens that there are, the request goes on
    there as if it had always been there, and finds what blocks of it an agent has.

    placement: why the workers are those they are; None before the start
    """

    def __init__(
        self,
        planner: Planner,
        request: messages_pb2.GenerationRequest,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.placement: Placement | None = None
        self.on_accepted: Callable[[], None] | None = None
        self.record = RouteRecord(request.request_id, len(request.prompt_token_ids))
        self._planner = planner
        self._fleet = planner.fleet
        self._placed_at = 0.0
        self._request = request
        self._stop_token_ids = stop_token_ids
        self._prompt = Prompt(request)
        self._inbox: RequestInbox = Inbox()
        self._attempt: Attempt | None = None
        self._incarnation = ""  # of the decode worker that it was placed on last
        self._refusals: dict[str, RelevoError] = {}  # decode workers' incarnations → why not there
        self._events: deque[Event] = deque()  # bounded by what one take() gives
        self._output = array("I")  # all tokens so far: they are in the events, or were; a list takes nine times as much
        self._num_cached_tokens: int | None = None  # of the prompt, as the first worker that gave tokens said
        self._is_migrated = False
        self._failure: RelevoError | None = None  # to be raised after the events
        self._is_over = False
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + request.timeout_ms / 1000 if request.timeout_ms else None
        self._timer = self._loop.call_at(self._deadline, self._expire) if self._deadline is not None else None

    @property
    def timeline(self) -> Timeline:
        return self.record.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline) -> None:
        self.record.timeline = timeline

    def __aiter__(self) -> RoutedGeneration:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if self._is_over:
                raise StopAsyncIteration
            try:
                await self._advance()
            except RelevoError as error:
                self._finish(error)
        return self._events.popleft()

    def explain(self, max_candidates: int | None = None) -> Mapping[str, Any] | None:
        return self.record.explain(max_candidates) if self.record.routes else None

    async def aclose(self) -> None:
        """Cancels the request at every stage if it has not ended; an iteration in progress raises Cancelled."""
        self._events.clear()
        self._inbox.fail(Cancelled("the client has left"))
        self._finish(None)

    async def _advance(self) -> None:
        """Work off what workers have said; waits until they say something."""
        attempt = self._attempt or await self._choose()
        try:
            if self._attempt is None:
                self._attempt = attempt
                attempt.start()
            for call, update in await self._inbox.take():
                for event in attempt.handle(call, update):
                    self._append(event)
                if self.on_accepted is not None:  # decode speaks first, and has not refused
                    accepted, self.on_accepted = self.on_accepted, None
                    accepted()
                if self._is_over:
                    return
        except (Exhausted, Unavailable) as error:
            self._refuse(error)

    async def _choose(self) -> Attempt:
        """The cheapest candidate that has not refused. Raises Exhausted or Unavailable if there is none."""
        self._check()
        num_tokens = len(self._request.prompt_token_ids)
        began_at = time.perf_counter()
        placement = await self._place()
        best = placement.best
        self._note_placement(placement, began_at)
        logger.debug("placed: %s", best, extra={"request_id": self._request.request_id})
        job = Job(self._request, self._inbox, self._time_left_ms, self._stop_token_ids, self.record.timeline)
        decode = self._fleet.worker(DECODE, best.decode)
        assert decode.info is not None
        self._incarnation = decode.info.incarnation
        work = PromptWork(num_tokens, best.num_uncached_tokens, self._prompt.hashes(decode.info))
        if best.prefill is None:
            return DirectAttempt(job, decode, work, best.source)
        source = (best.source, best.num_source_blocks) if best.source is not None else None
        return SplitAttempt(job, decode, self._fleet.worker(PREFILL, best.prefill), work, source)

    async def _place(self) -> Placement:
        """Raises Exhausted or Unavailable if nobody is there; a request that has begun waits a while for somebody."""
        num_tokens = len(self._request.prompt_token_ids)
        patience = self._loop.time() + MIGRATION_SECONDS
        while True:
            news = self._fleet.news
            placement = await self._planner.place(
                self._prompt,
                num_tokens,
                self._refusals,
                self._loop.time(),
                split=not self._request.sampling.num_beams,
                whole=self._request.sampling.HasField("prompt_logprobs"),
            )
            if self._is_over:  # the client left, or the time did, while the prompt was hashed
                await self._inbox.take()
            if placement is not None:
                return placement
            if not self._output or self._loop.time() >= patience:
                raise self._nobody_left()
            await _first_of(news, self._over, timeout_seconds=patience - self._loop.time())

    def _check(self) -> None:
        """The edge has looked already; what comes here wrong all the same must not reach a worker."""
        num_tokens = len(self._request.prompt_token_ids)
        model = self._fleet.model()
        if not num_tokens:
            raise InvalidRequest("the prompt is empty: it must have at least one token", "prompt")
        if model is not None and num_tokens >= model.max_model_len:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens; prompt and answer together may have {model.max_model_len}",
                "prompt",
            )

    def _refuse(self, error: RelevoError) -> None:
        """Not there, or no longer; the next attempt goes elsewhere, with the tokens that there are."""
        assert self._attempt is not None
        assert self.placement is not None
        address = self.placement.best.decode
        level = logging.WARNING if self._output else logging.INFO
        logger.log(
            level,
            "decode worker %s is out after %d tokens: %s",
            address,
            len(self._output),
            error.message,
            extra={"request_id": self._request.request_id},
        )
        self._refusals[self._incarnation] = error
        self.record.routes[-1].refused = error.message
        self._attempt.cancel()
        self._attempt = None
        self._inbox = Inbox()  # what the old attempt left in the old one is of no interest
        if len(self._output) > self._request.num_output_tokens:
            self._migrate()

    def _migrate(self) -> None:
        """The tokens that there are become part of what the next worker is given; it may be that none is missing."""
        self._is_migrated = True
        model = self._fleet.model()
        num_tokens = self.record.num_prompt_tokens + len(self._output)
        if self._output[-1] in self._stop_token_ids:
            self._append(EndEvent(FinishReason.STOP))
        elif len(self._output) >= self._request.sampling.max_tokens or (model and num_tokens >= model.max_model_len):
            self._append(EndEvent(FinishReason.LENGTH))
        else:
            self._request = _continued(self._request, self._output[self._request.num_output_tokens :])
            self._prompt = Prompt(self._request)

    def _nobody_left(self) -> RelevoError:
        full = [error for error in self._refusals.values() if isinstance(error, Exhausted)]
        if full:
            waits = [error.retry_after_seconds for error in full if error.retry_after_seconds > 0]
            return Exhausted(f"no worker has room: {full[-1].message}", min(waits, default=DEFAULT_RETRY_AFTER_SECONDS))
        reasons = "; ".join(error.message for error in self._refusals.values()) or self._fleet.complaints(DECODE)
        return Unavailable(f"no decode worker can serve this: {reasons or 'none is connected'}")

    def _append(self, event: Event) -> None:
        if self._is_migrated:  # the prompt is not what this worker was given
            event = replace(event, num_cached_tokens=self._num_cached_tokens or 0)
        if isinstance(event, EndEvent):
            if not self._is_migrated:
                self._note_cached(event.num_cached_tokens)
            self._events.append(event)
            self.record.note_end(event.finish_reason.value)
            self._finish(None)
            return
        if not self._output:
            self._note_first_token()
        self._output.extend(event.token_ids)
        self.record.note_tokens(len(self._output))
        self.record.timeline.count(len(event.token_ids))
        self._num_cached_tokens = event.num_cached_tokens
        last = self._events[-1] if self._events else None
        if isinstance(last, TokensEvent):  # the reader is behind: several steps become one event
            event = TokensEvent(
                [*last.token_ids, *event.token_ids],
                [*last.logprobs, *event.logprobs],
                event.num_cached_tokens,
                last.prompt_logprobs,
            )
            self._events.pop()
        self._events.append(event)

    def _note_placement(self, placement: Placement, began_at: float) -> None:
        self.placement = placement
        self.record.timeline.mark(
            "place",
            began_at,
            terms=placement.best,
            candidates=placement.num_candidates,
        )
        self._placed_at = self._loop.time()
        if not self.record.routes:
            self._planner.log.add(self.record)
        best = placement.best
        passed_over = self._fleet.passed_over()
        self.record.routes.append(Route(placement, best.ttft_ms, best.num_cached_tokens, passed_over=passed_over))

    def _note_first_token(self) -> None:
        route = self.record.routes[-1]
        route.actual_ttft_ms = 1000 * (self._loop.time() - self._placed_at)
        self._planner.predictions.observe_ttft(route)

    def _note_cached(self, num_cached_tokens: int) -> None:
        route = self.record.routes[-1]
        route.actual_cached_tokens = num_cached_tokens
        self._planner.predictions.observe_cached(route, self.record.num_prompt_tokens)

    def _finish(self, failure: RelevoError | None) -> None:
        """Nothing more comes from workers; `failure` is raised after the events that are there already."""
        self._is_over = True
        if failure is not None:
            self.record.timeline.error = type(failure).__name__
        self._over.set()
        self._failure = failure
        self.record.note_end(failure.message if failure is not None else "closed")
        if self._timer is not None:
            self._timer.cancel()
        if self._attempt is not None:
            attempt, self._attempt = self._attempt, None  # it knows us: together we would be garbage that only gc finds
            attempt.cancel()

    def _expire(self) -> None:
        """Frees everything at once, whether or not somebody is reading."""
        error = DeadlineExceeded(f"not done within {self._request.timeout_ms} ms")
        self._inbox.fail(error)
        self._finish(error)

    def _time_left_ms(self) -> int:
        if self._deadline is None:
            return 0
        return max(1, round(1000 * (self._deadline - self._loop.time())))


async def _first_of(*events: asyncio.Event, timeout_seconds: float) -> None:
    """Until one of them is set, or the time is over."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def _continued(request: messages_pb2.GenerationRequest, token_ids: Sequence[int]) -> messages_pb2.GenerationRequest:
    """The request as it goes on elsewhere after these tokens."""
    continued = messages_pb2.GenerationRequest()
    continued.CopyFrom(request)
    continued.prompt_token_ids.extend(token_ids)
    continued.num_output_tokens += len(token_ids)
    continued.sampling.ClearField("prompt_logprobs")  # they came before the first token
    return continued
