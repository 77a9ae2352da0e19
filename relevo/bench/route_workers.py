"""Modelled workers for the replay: the engine's Scheduler and BlockPool, and a clock instead of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relevo.bench.route_trace import BLOCK_TOKENS, TraceRequest
from relevo.core.block_hash import BlockHash
from relevo.core.block_pool import BlockPool
from relevo.core.placement import WorkerView
from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import SchedulerConfig, SchedulerOutput
from relevo.core.scheduler import Scheduler
from relevo.core.worker_load import WorkerLoad

_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
_FINGERPRINT = bytes(32)
_UNLIMITED = 1 << 30

Schedule = Callable[[float, Callable[[float], None]], None]
"""Call something at a time; it is given that time. Seconds of virtual time."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the modelled worker says of itself, as in protos/services/pb/messages.proto."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    step_seconds_per_request: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a step takes: its prompt tokens at prefill_tokens_per_second, and, if it samples for running answers,
    step_seconds and step_seconds_per_request for each of them."""

    prefill_tokens_per_second: float
    step_seconds: float = 0.0
    step_seconds_per_request: float = 0.0

    def of(self, output: SchedulerOutput) -> float:
        num_answers = sum(1 for entry in output.scheduled if entry.num_scheduled_tokens == 1)
        num_prompt_tokens = output.num_scheduled_tokens - num_answers
        seconds = num_prompt_tokens / self.prefill_tokens_per_second
        if num_answers:
            seconds += self.step_seconds + self.step_seconds_per_request * num_answers
        return seconds


class ModelledWorker:
    """Steps whenever it has work. At a step's end, as from a real worker, what it stores and removes goes to
    `on_blocks`, and to `on_token` the requests that have their first or second token, or their last."""

    def __init__(
        self,
        address: str,
        schedule: Schedule,
        pool: BlockPool,
        speed: Speed,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        admits_all: bool,
    ) -> None:
        """admits_all: it takes any number of requests; that it serves max_num_seqs at a time is its queue's affair."""
        self.address = address
        self._admits_all = admits_all
        self.speed = speed
        self.num_requests = 0  # in flight at the router: until the last token of the answer
        self.scheduler = Scheduler(SchedulerConfig(max_num_seqs, max_num_batched_tokens, BLOCK_TOKENS), pool)
        self.load = WorkerLoad(self.report())
        self.on_blocks: Callable[[str, Sequence[BlockHash], Sequence[BlockHash]], None] = _ignore_blocks
        self.on_token: Callable[[Request, float], None] = _ignore_token
        self.on_reserved: Callable[[Request, float], None] = _ignore_token
        self._schedule = schedule
        self._is_stepping = False
        self._has_news = False  # a report is made when it is read

    def submit(self, request: Request, now: float) -> None:
        self.scheduler.add(request)
        self.wake(now)

    def wake(self, now: float) -> None:
        if self._is_stepping:
            return
        output = self.scheduler.schedule()
        for request in output.reserved:
            self.on_reserved(request, now)
        if not output.scheduled:
            self._tell_blocks()
            self._has_news = True
            return
        self._is_stepping = True
        self._schedule(now + self.speed.of(output), lambda end: self._end_step(output, end))

    def report(self) -> Report:
        scheduler = self.scheduler
        unfinished = [*scheduler.running, *scheduler.waiting, *scheduler.waiting_for_kv.values()]
        return Report(
            num_running=len(scheduler.running) + len(scheduler.waiting_for_kv),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=sum([request.num_uncomputed_tokens for request in unfinished]),
            num_free_blocks=scheduler.pool.num_free_blocks,
            prefill_tokens_per_second=self.speed.prefill_tokens_per_second,
            step_seconds=self.speed.step_seconds,
            step_seconds_per_request=self.speed.step_seconds_per_request,
        )

    def view(self, hashes: Sequence[BlockHash], num_cached_blocks: int, now: float, block_bytes: int) -> WorkerView:
        """As services/router makes it, from the report after the last step."""
        if self._has_news:
            self._has_news = False
            self.load.reported(self.report(), now)
        report = self.load.report
        return WorkerView(
            address=self.address,
            fingerprint=_FINGERPRINT,
            block_size=BLOCK_TOKENS,
            block_bytes=block_bytes,
            has_agent=True,
            max_num_seqs=_UNLIMITED if self._admits_all else self.scheduler.config.max_num_seqs,
            num_requests=self.load.num_requests,
            num_waiting_tokens=self.load.num_waiting_tokens(now),
            num_free_blocks=report.num_free_blocks,
            prefill_tokens_per_second=report.prefill_tokens_per_second,
            step_seconds=report.step_seconds,
            step_seconds_per_request=report.step_seconds_per_request,
            num_cached_blocks=max(num_cached_blocks, self.load.num_expected_blocks(hashes)),
        )

    def _end_step(self, output: SchedulerOutput, now: float) -> None:
        self._is_stepping = False
        sampling = [entry.request for entry in output.scheduled if entry.samples]
        # A request's name is its every token, so that no two answers have a block in common.
        self.scheduler.update(output, {request.request_id: request.token_ids[:1] for request in sampling})
        self._tell_blocks()
        for request in sampling:
            if request.num_output_tokens <= 2 or request.finish_reason is not None:
                self.on_token(request, now)
        self._has_news = True
        self.wake(now)

    def _tell_blocks(self) -> None:
        stored, removed = self.scheduler.pool.drain_events()
        if stored or removed:
            self.on_blocks(self.address, stored, removed)


def make_request(index: int, traced: TraceRequest, *, max_tokens: int, await_kv: bool = False) -> Request:
    """index: its place in the trace, and its name."""
    return Request(
        request_id=str(index),
        token_ids=[index] * traced.num_prompt_tokens,
        num_prompt_tokens=traced.num_prompt_tokens,
        sampling=_SAMPLING,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        root_hash=b"",
        block_size=BLOCK_TOKENS,
        await_kv=await_kv,
        _block_hashes=list(traced.hashes),
    )


def _ignore_blocks(address: str, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> None:
    pass


def _ignore_token(request: Request, now: float) -> None:
    pass
