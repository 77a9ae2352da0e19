"""Replays a trace in virtual time over modelled workers, through the router's placement and the engine's scheduler."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from relevo.bench.route_figures import RequestTimes, summarize
from relevo.bench.route_policies import POLICIES, Policy, make_policy
from relevo.bench.route_trace import BLOCK_TOKENS, TraceRequest
from relevo.bench.route_workers import ModelledWorker, Speed, make_request
from relevo.bench.statistics import Slo
from relevo.core.block_hash import BlockHash
from relevo.core.block_pool import BlockPool
from relevo.core.errors import StartupError
from relevo.core.placement import CostModel, place
from relevo.core.prefix_index import PrefixIndex
from relevo.core.request import Request
from relevo.core.worker_load import PromptWork

ALL_POLICIES = (*POLICIES, "relevo", "oracle")
COST_POLICIES = frozenset({"relevo", "oracle"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteBenchConfig:
    """The modelled fleet.

    num_decode: 0 = answers are not modelled; for policies that count requests, one is in flight until its last token,
    answer_seconds_per_token after one another
    pool_blocks, decode_pool_blocks: of BLOCK_TOKENS tokens
    step_seconds, step_seconds_per_request: of a decode worker's step without prompts
    """

    num_prefill: int = 4
    num_decode: int = 0
    prefill_tokens_per_second: float = 15_000.0
    pool_blocks: int = 5_000
    decode_pool_blocks: int = 5_000
    decode_prefill_tokens_per_second: float = 15_000.0
    step_seconds: float = 0.02
    step_seconds_per_request: float = 0.0005
    answer_seconds_per_token: float = 0.03
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 8_192
    bytes_per_token: int = 131_072
    bandwidth_bytes_per_second: float = 10e9
    slo: Slo = field(default_factory=Slo)
    seed: int = 0


def bench_route(config: RouteBenchConfig, trace: Sequence[TraceRequest], policy: str) -> dict[str, Any]:
    """The figures of one policy. Raises StartupError if the fleet cannot serve the trace."""
    if config.num_prefill + config.num_decode < 1:
        raise StartupError("there are neither prefill nor decode workers: give at least one with --prefill or --decode")
    longest = max(request.num_prompt_tokens + request.num_output_tokens for request in trace)
    pools = [config.pool_blocks] * config.num_prefill + [config.decode_pool_blocks] * config.num_decode
    smallest_pool = min(pools)
    if -(-longest // BLOCK_TOKENS) > smallest_pool:
        raise StartupError(f"a pool of {smallest_pool} blocks does not hold a request of {longest} tokens")
    replay = _Replay(config, trace, policy)
    replay.run()
    return summarize(trace, replay.times, config.slo, with_answers=config.num_decode > 0)


class _Replay:
    """Virtual time: a heap of things to be called. Of things due at once the first scheduled is called first."""

    def __init__(self, config: RouteBenchConfig, trace: Sequence[TraceRequest], policy: str) -> None:
        self.times = [RequestTimes() for _ in trace]
        self._config = config
        self._trace = trace
        self._policy = policy
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_scheduled = 0
        self._index = PrefixIndex()
        # Where answers are not modelled nobody is slowed down by a prompt.
        self._costs = replace(
            CostModel(bandwidth_bytes_per_second=config.bandwidth_bytes_per_second),
            slowdown_weight=1.0 if config.num_decode else 0.0,
        )
        infinite = 1 + sum(-(-(r.num_prompt_tokens + r.num_output_tokens) // BLOCK_TOKENS) for r in trace)
        shared = BlockPool(infinite) if policy == "oracle" else None
        self._prefill = [
            self._make_worker(
                f"prefill-{number}",
                shared or BlockPool(config.pool_blocks),
                Speed(config.prefill_tokens_per_second),
                max_num_seqs=1,  # first in, first out
                admits_all=True,
            )
            for number in range(config.num_prefill)
        ]
        self._decode = [
            self._make_worker(
                f"decode-{number}",
                BlockPool(infinite if policy == "oracle" else config.decode_pool_blocks),
                Speed(config.decode_prefill_tokens_per_second, config.step_seconds, config.step_seconds_per_request),
                max_num_seqs=config.max_num_seqs,
                admits_all=False,
            )
            for number in range(config.num_decode)
        ]
        self._workers = {worker.address: worker for worker in [*self._prefill, *self._decode]}
        for worker in self._workers.values():
            worker.on_token = self._on_prefill_token if worker in self._prefill else self._on_decode_token
            worker.on_reserved = self._on_reserved
            worker.on_blocks = self._on_blocks
        self._pickers: dict[str, Policy] = {}
        if policy not in COST_POLICIES:
            for pool in (self._prefill, self._decode):
                if pool:
                    self._pickers[pool[0].address] = make_policy(policy, len(pool), config.seed)
        self._decode_of: dict[int, ModelledWorker] = {}

    def run(self) -> None:
        for index, traced in enumerate(self._trace):
            self._schedule(traced.arrival, lambda now, index=index: self._arrive(index, now))  # type: ignore[misc]
        while self._heap:
            now, _, call = heapq.heappop(self._heap)
            call(now)

    def _schedule(self, at: float, call: Callable[[float], None]) -> None:
        self._num_scheduled += 1
        heapq.heappush(self._heap, (at, self._num_scheduled, call))

    def _make_worker(
        self, address: str, pool: BlockPool, speed: Speed, *, max_num_seqs: int, admits_all: bool
    ) -> ModelledWorker:
        return ModelledWorker(
            address,
            self._schedule,
            pool,
            speed,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(self._config.max_num_batched_tokens, max_num_seqs),
            admits_all=admits_all,
        )

    def _arrive(self, index: int, now: float) -> None:
        if self._policy in COST_POLICIES:
            prefill, decode, work = self._place(index, now)
        else:
            prefill, decode = (self._pick(pool, index) for pool in (self._prefill, self._decode))
            work = PromptWork(self._trace[index].num_prompt_tokens, self._trace[index].num_prompt_tokens)
        if decode is None:
            assert prefill is not None
            self.times[index].prefill = prefill.address
            prefill.num_requests += 1
            prefill.load.sent(index, work, now)
            self._send(prefill, index, now)
            return
        self._decode_of[index] = decode
        decode.num_requests += 1
        if prefill is not None and not self._trace[index].hashes:
            prefill = None  # there is no block to send
        if prefill is not None:
            self.times[index].prefill = prefill.address
            prefill.num_requests += 1
            prefill.load.sent(index, work, now)  # planned: those that come now must know of it
            work = replace(work, num_uncached_tokens=0, hashes=())
        decode.load.sent(index, work, now)
        num_tokens = self._trace[index].num_output_tokens
        decode.submit(make_request(index, self._trace[index], max_tokens=num_tokens, await_kv=prefill is not None), now)

    def _pick(self, pool: list[ModelledWorker], index: int) -> ModelledWorker | None:
        return pool[self._pickers[pool[0].address].pick(self._trace[index], pool)] if pool else None

    def _place(self, index: int, now: float) -> tuple[ModelledWorker | None, ModelledWorker | None, PromptWork]:
        traced = self._trace[index]
        known = self._index.lookup(traced.hashes)
        block_bytes = BLOCK_TOKENS * self._config.bytes_per_token

        def views(pool: list[ModelledWorker]) -> list[Any]:
            return [worker.view(traced.hashes, known.get(worker.address, 0), now, block_bytes) for worker in pool]

        # Without decode workers, prefill workers are where a prompt is computed, and its answer is not looked at.
        pools = ([], self._prefill) if not self._decode else (self._prefill, self._decode)
        placement = place(
            traced.num_prompt_tokens,
            views(pools[0]),
            views(pools[1]),
            costs=self._costs,
            affinity=traced.hashes[0] if traced.hashes else b"",
        )
        assert placement is not None
        best = placement.best
        self.times[index].predicted_ttft = best.ttft_ms / 1000
        work = PromptWork(traced.num_prompt_tokens, best.num_uncached_tokens, traced.hashes)
        chosen = self._workers[best.decode]
        if not self._decode:
            return chosen, None, work
        return self._workers[best.prefill] if best.prefill else None, chosen, work

    def _send(self, prefill: ModelledWorker, index: int, now: float) -> None:
        prefill.submit(make_request(index, self._trace[index], max_tokens=1), now)

    def _on_reserved(self, request: Request, now: float) -> None:
        """Decode has room, and only now prefill is asked, as the router does it."""
        index = int(request.request_id)
        prefill = self._workers[self.times[index].prefill or ""]
        if request.num_computed_tokens == len(self._trace[index].hashes) * BLOCK_TOKENS:  # all of it was there
            self.times[index].prefill = None
            prefill.num_requests -= 1
            prefill.load.ended(index, now)
            self._schedule(now, lambda now: self._resume(index, [], now))
            return
        self._send(prefill, index, now)

    def _on_prefill_token(self, request: Request, now: float) -> None:
        index = int(request.request_id)
        traced, times = self._trace[index], self.times[index]
        times.first_token = now
        times.num_cached_tokens = request.num_cached_tokens
        prefill = self._workers[times.prefill or ""]
        prefill.load.ended(index, now)
        if not self._decode:
            times.end = now
            answered = now + self._config.answer_seconds_per_token * (traced.num_output_tokens - 1)
            self._schedule(answered, lambda _: self._answered(prefill))
            return
        prefill.num_requests -= 1
        self._schedule(now + self._transfer_seconds(index, request), lambda now: self._resume(index, [index], now))

    def _transfer_seconds(self, index: int, request: Request) -> float:
        """What is left when the prompt is computed, for its blocks travel as they are."""
        decode = self._decode_of[index]
        there = decode.scheduler.waiting_for_kv[request.request_id].num_computed_tokens
        missing = len(self._trace[index].hashes) * BLOCK_TOKENS - there
        seconds = missing * self._config.bytes_per_token / self._config.bandwidth_bytes_per_second
        computed = request.num_prompt_tokens - request.num_cached_tokens
        return max(0.0, seconds - computed / self._config.prefill_tokens_per_second)

    def _resume(self, index: int, token_ids: list[int], now: float) -> None:
        decode = self._decode_of[index]
        if token_ids and self._trace[index].num_output_tokens == 1:
            decode.scheduler.abort(str(index))  # prefill's token was the last
            self._end(index, decode, now)
        else:
            decode.scheduler.resume(str(index), len(self._trace[index].hashes) * BLOCK_TOKENS, token_ids)
        decode.wake(now)

    def _on_decode_token(self, request: Request, now: float) -> None:
        index = int(request.request_id)
        times = self.times[index]
        decode = self._decode_of[index]
        decode.load.computed(index, now)
        if times.first_token is None:
            times.first_token = now
            times.num_cached_tokens = request.num_cached_tokens
        if request.finish_reason is not None:
            self._end(index, decode, now)

    def _end(self, index: int, decode: ModelledWorker, now: float) -> None:
        self.times[index].end = now
        decode.load.ended(index, now)
        self._answered(decode)

    def _answered(self, worker: ModelledWorker) -> None:
        worker.num_requests -= 1

    def _on_blocks(self, address: str, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> None:
        if self._policy not in COST_POLICIES:
            return
        # The oracle's prefill workers have one pool, and what one has stored all can use.
        shares = self._policy == "oracle" and address.startswith("prefill")
        for holder in (worker.address for worker in self._prefill) if shares else (address,):
            self._index.remove(holder, removed)
            self._index.store(holder, stored)
