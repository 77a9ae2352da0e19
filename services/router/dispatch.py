"""Places requests on workers and sees them through: the next candidate when one refuses, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable

from relevo.core.block_hash import BlockHash, hash_blocks, root_hash
from relevo.core.errors import Cancelled, DeadlineExceeded, Exhausted, InvalidRequest, RelevoError, Unavailable
from services.pb import messages_pb2, worker_pb2
from services.router.attempt import Attempt, DirectAttempt, Event, Job
from services.router.connection import WorkerConnection
from services.router.fleet import Fleet
from services.router.generation import EndEvent, ServedModel, TokensEvent
from services.router.inbox import Inbox
from services.router.placement import CostModel, Placement, WorkerView, place
from services.router.request_stream import DECODE, PREFILL, RequestInbox, WorkerKind
from services.router.split import SplitAttempt

logger = logging.getLogger(__name__)

DEFAULT_RETRY_AFTER_SECONDS = 1.0


class FleetDispatcher:
    """The Dispatcher over a fleet of workers."""

    def __init__(self, fleet: Fleet, eos_token_ids: Iterable[int] = (), costs: CostModel | None = None) -> None:
        self._fleet = fleet
        self._eos_token_ids = frozenset(eos_token_ids)
        self._costs = costs or CostModel()

    def generate(self, request: messages_pb2.GenerationRequest) -> RoutedGeneration:
        """Its deadline starts now, if it has one; nothing else does before the first __anext__."""
        stop_token_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stop_token_ids |= self._eos_token_ids
        return RoutedGeneration(self._fleet, self._costs, request, stop_token_ids)

    def model(self) -> ServedModel | None:
        return self._fleet.model()

    def is_ready(self) -> bool:
        return bool(self._fleet.connected(DECODE))


class Prompt:
    """A prompt and the names of its blocks, which depend on the layout of whoever holds them."""

    def __init__(self, request: messages_pb2.GenerationRequest) -> None:
        self._request = request
        self._hashes: dict[tuple[bytes, int], list[BlockHash]] = {}

    def hashes(self, info: worker_pb2.WorkerInfo) -> list[BlockHash]:
        """Of the full blocks, for this worker; computed once a layout."""
        layout = (info.layout_fingerprint, info.block_size)
        if layout not in self._hashes:
            root = root_hash(info.layout_fingerprint, cache_salt=self._request.cache_salt)
            self._hashes[layout] = hash_blocks(root, self._request.prompt_token_ids, info.block_size)
        return self._hashes[layout]

    @property
    def affinity(self) -> bytes:
        """The first block's name, b"" for prompts shorter than a block."""
        return next((hashes[0] for hashes in self._hashes.values() if hashes), b"")


class RoutedGeneration:
    """A request on its way. It owns no task: workers' updates come into its inbox, and whoever iterates works them off.

    placement: why the workers are those they are; None before the start
    """

    def __init__(
        self,
        fleet: Fleet,
        costs: CostModel,
        request: messages_pb2.GenerationRequest,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.placement: Placement | None = None
        self._fleet = fleet
        self._costs = costs
        self._request = request
        self._stop_token_ids = stop_token_ids
        self._prompt = Prompt(request)
        self._inbox: RequestInbox = Inbox()
        self._attempt: Attempt | None = None
        self._refusals: dict[str, RelevoError] = {}  # decode workers' addresses → why not there
        self._events: deque[Event] = deque()  # bounded by what one take() gives
        self._has_tokens = False  # some are in the events, or were: from then on no other worker can take over
        self._failure: RelevoError | None = None  # to be raised after the events
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + request.timeout_ms / 1000 if request.timeout_ms else None
        self._timer = self._loop.call_at(self._deadline, self._expire) if self._deadline is not None else None

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

    async def aclose(self) -> None:
        """Cancels the request at every stage if it has not ended; an iteration in progress raises Cancelled."""
        self._events.clear()
        self._inbox.fail(Cancelled("the client has left"))
        self._finish(None)

    async def _advance(self) -> None:
        """Work off what workers have said; waits until they say something."""
        attempt = self._attempt or self._choose()
        try:
            if self._attempt is None:
                self._attempt = attempt
                attempt.start()
            for call, update in await self._inbox.take():
                for event in attempt.handle(call, update):
                    self._append(event)
                if self._is_over:
                    return
        except (Exhausted, Unavailable) as error:
            if self._has_tokens:
                raise
            self._refuse(error)

    def _choose(self) -> Attempt:
        """The cheapest candidate that has not refused. Raises Exhausted or Unavailable if there is none."""
        self._check()
        decode_views = self._views(DECODE)
        placement = place(
            len(self._request.prompt_token_ids),
            self._views(PREFILL),
            decode_views,
            costs=self._costs,
            affinity=self._prompt.affinity,
        )
        if placement is None:
            raise self._nobody_left()
        self.placement = placement
        best = placement.best
        logger.debug("placed: %s", best, extra={"request_id": self._request.request_id})
        job = Job(self._request, self._inbox, self._time_left_ms, self._stop_token_ids)
        decode = self._fleet.worker(DECODE, best.decode)
        if best.prefill is None:
            return DirectAttempt(job, decode, best.num_uncached_tokens)
        return SplitAttempt(job, decode, self._fleet.worker(PREFILL, best.prefill), best.num_uncached_tokens)

    def _views(self, kind: WorkerKind) -> list[WorkerView]:
        return [self._view(worker) for worker in self._fleet.connected(kind) if worker.address not in self._refusals]

    def _view(self, worker: WorkerConnection) -> WorkerView:
        assert worker.info is not None
        return worker.view(self._fleet.index.num_cached_blocks(worker.address, self._prompt.hashes(worker.info)))

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
        """Not there; the next attempt goes elsewhere."""
        assert self._attempt is not None
        assert self.placement is not None
        address = self.placement.best.decode
        logger.info(
            "decode worker %s is out: %s", address, error.message, extra={"request_id": self._request.request_id}
        )
        self._refusals[address] = error
        self._attempt.cancel()
        self._attempt = None
        self._inbox = Inbox()  # what the old attempt left in the old one is of no interest

    def _nobody_left(self) -> RelevoError:
        full = [error for error in self._refusals.values() if isinstance(error, Exhausted)]
        if full:
            waits = [error.retry_after_seconds for error in full if error.retry_after_seconds > 0]
            return Exhausted(f"no worker has room: {full[-1].message}", min(waits, default=DEFAULT_RETRY_AFTER_SECONDS))
        reasons = "; ".join(error.message for error in self._refusals.values())
        return Unavailable(f"no decode worker can serve this: {reasons or 'none is connected'}")

    def _append(self, event: Event) -> None:
        if isinstance(event, EndEvent):
            self._events.append(event)
            self._finish(None)
            return
        self._has_tokens = True
        last = self._events[-1] if self._events else None
        if isinstance(last, TokensEvent):  # the reader is behind: several steps become one event
            event = TokensEvent(
                [*last.token_ids, *event.token_ids], [*last.logprobs, *event.logprobs], event.num_cached_tokens
            )
            self._events.pop()
        self._events.append(event)

    def _finish(self, failure: RelevoError | None) -> None:
        """Nothing more comes from workers; `failure` is raised after the events that are there already."""
        self._is_over = True
        self._failure = failure
        if self._timer is not None:
            self._timer.cancel()
        if self._attempt is not None:
            self._attempt.cancel()

    def _expire(self) -> None:
        """Frees everything at once, whether or not somebody is reading."""
        error = DeadlineExceeded(f"not done within {self._request.timeout_ms} ms")
        self._inbox.fail(error)
        self._finish(error)

    def _time_left_ms(self) -> int:
        if self._deadline is None:
            return 0
        return max(1, round(1000 * (self._deadline - self._loop.time())))
