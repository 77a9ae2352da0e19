"""Where a request goes: one continuous cost in milliseconds for every candidate, and the cheapest wins (design.md §6).

    ttft(p, d) = wait(p) + fetch(p) + uncached_tokens(p) / prefill_rate(p) + transfer + handover + admit(d)
    ttft(d)    = wait(d) + fetch(d) + uncached_tokens(d) / prefill_rate(d)            + admit(d)
    cost       = ttft + a · (uncached part of ttft) + w · (delay it causes to the requests on d)

A worker that lacks blocks which an agent holds, its own or another host's, can fetch them: it does where the way is
shorter than computing them.

No threshold decides whether to split; the terms do. On an idle pair of equal speed the two differ by `handover` on one
side and by w · (time decode spends on the prompt) on the other: the request that may arrive meanwhile is counted, for
decode's time is what a split exists to protect. With the values below the split wins from 5 ms of prefill on. Each
request running on decode moves that border down (two of them: 1.7 ms), a queue at prefill moves it up, and a prompt
that decode has cached never reaches it.

The router and `relevo bench route` decide with this code, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from statistics import fmean
from zlib import crc32


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What the terms are weighed with, and what is assumed where nothing was measured."""

    # a: keeping prefixes together pays beyond this request. Of 0, 0.5, 1 and 2, on real and synthetic traces, 1 was
    # the best or close to it; 2 is as good under load, and waits too long for a cached prefix where there is none.
    uncached_weight: float = 1.0
    slowdown_weight: float = 1.0  # w: a millisecond of another request's counts as one of ours
    handover_ms: float = 5.0  # two more calls, announcing, the last block's way
    fetch_ms: float = 3.0  # to ask an agent for blocks, whatever their size; from another agent twice
    bandwidth_bytes_per_second: float = 1e9  # between agents, where the receiver has measured none
    prefill_tokens_per_second: float = 2000.0  # when no worker has measured; otherwise the mean of those that have
    step_seconds: float = 0.02  # likewise
    answer_tokens: int = 128  # a typical answer: how long a full decode worker takes to have room again


@dataclass(slots=True, kw_only=True)  # not frozen: that takes twice as long to make, and every decision makes many
class WorkerView:
    """What is known of a worker, about one prompt. Requests and tokens include ours that no report has shown yet.

    num_cached_blocks: leading blocks of the prompt in its pool, or there by the time that it gets to this prompt
    num_agent_blocks: at its agent, agent_address
    num_remote_blocks: at another agent, remote_agent: that which has the most
    prefill_tokens_per_second, step_seconds, transfer_bytes_per_second: 0 = not measured
    step_seconds_per_request: what one more request in the batch adds to a step; 0 = not measured
    """

    address: str
    fingerprint: bytes
    block_size: int
    block_bytes: int
    has_agent: bool
    max_num_seqs: int
    num_requests: int = 0
    num_waiting_tokens: float = 0
    num_free_blocks: int
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    step_seconds_per_request: float = 0.0
    transfer_bytes_per_second: float = 0.0
    num_cached_blocks: int = 0
    agent_address: str = ""
    num_agent_blocks: int = 0
    remote_agent: str = ""
    num_remote_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decode worker, alone or with a prefill worker, and what it would cost. All terms in milliseconds.

    slowdown_ms is of other requests and no part of ttft_ms.
    source: the agent from which the worker that computes takes num_source_blocks leading blocks; None: from none
    """

    decode: str
    prefill: str | None
    source: str | None
    num_source_blocks: int
    wait_ms: float
    fetch_ms: float
    uncached_ms: float
    transfer_ms: float
    handover_ms: float
    admit_ms: float
    slowdown_ms: float
    ttft_ms: float
    cost_ms: float
    num_uncached_tokens: int  # to be computed by the worker that prefills
    num_cached_tokens: int  # there already: at that worker, or at decode if those are more

    @property
    def terms(self) -> Mapping[str, float]:
        """For whoever wants to know why."""
        return {
            "wait_ms": self.wait_ms,
            "fetch_ms": self.fetch_ms,
            "uncached_ms": self.uncached_ms,
            "transfer_ms": self.transfer_ms,
            "handover_ms": self.handover_ms,
            "admit_ms": self.admit_ms,
            "slowdown_ms": self.slowdown_ms,
            "ttft_ms": self.ttft_ms,
            "cost_ms": self.cost_ms,
        }


class Placement:
    """A decision. best: the cheapest candidate; the others are spelled out only when somebody asks."""

    def __init__(self, pairs: Sequence[_Pair], costs: CostModel, affinity: bytes) -> None:
        """pairs: at least one, in any order."""
        self._pairs = pairs
        self._costs = costs
        self._affinity = affinity
        lowest_ms = min([pair.cost_ms for pair in pairs])
        cheapest = [pair for pair in pairs if pair.cost_ms == lowest_ms]
        best = min(cheapest, key=self._order) if len(cheapest) > 1 else cheapest[0]
        self.best = best.explain(costs)

    @property
    def num_candidates(self) -> int:
        return len(self._pairs)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Cheapest first; never empty."""
        return tuple(pair.explain(self._costs) for pair in sorted(self._pairs, key=self._order))

    def _order(self, pair: _Pair) -> tuple[float, int, str, str]:
        decode = pair.decode.worker.address
        prefill = pair.prefill.worker.address if pair.prefill else ""
        tie = crc32(prefill.encode(), crc32(decode.encode(), crc32(self._affinity)))
        return pair.cost_ms, tie, decode, prefill


def place(
    num_prompt_tokens: int,
    prefill_workers: Sequence[WorkerView],
    decode_workers: Sequence[WorkerView],
    *,
    costs: CostModel,
    affinity: bytes = b"",
) -> Placement | None:
    """Weigh every decode worker alone, and every pair that can split; None if there is no decode worker.

    affinity: what equal prompts have in common (the first block's name). Between candidates of equal cost it decides,
    the same way every time and in every router, and spreads unequal prompts evenly (rendezvous hashing).
    """
    if not decode_workers:
        return None
    costs = _assume(prefill_workers, decode_workers, costs)
    prefills = [_Prefill(num_prompt_tokens, worker, costs) for worker in prefill_workers if worker.has_agent]
    pairs: list[_Pair] = []
    for worker in decode_workers:
        decode = _Decode(num_prompt_tokens, worker, costs)
        pairs.append(_Pair(None, decode, decode.direct_cost_ms))
        if decode.num_missing_blocks > 0 and worker.has_agent:
            split_cost_ms, bytes_ms, fingerprint = decode.split_cost_ms, decode.bytes_ms, worker.fingerprint
            for prefill in prefills:
                if prefill.worker.fingerprint == fingerprint:
                    transfer_ms = bytes_ms - prefill.uncached_ms
                    cost_ms = prefill.cost_ms + split_cost_ms + (transfer_ms if transfer_ms > 0 else 0.0)
                    pairs.append(_Pair(prefill, decode, cost_ms))

    return Placement(pairs, costs, affinity)


class _Computing:
    """What it takes a worker to have the prompt's KV: to wait, to fetch and to compute."""

    __slots__ = (
        "fetch_ms",
        "num_cached_tokens",
        "num_source_blocks",
        "num_uncached_tokens",
        "source",
        "uncached_ms",
        "wait_ms",
        "worker",
    )

    def __init__(self, num_prompt_tokens: int, worker: WorkerView, costs: CostModel) -> None:
        self.worker = worker
        self.source: str | None = None
        self.num_source_blocks = 0
        self.fetch_ms = 0.0
        tokens_per_ms = _tokens_per_ms(worker, costs)
        num_blocks = worker.num_cached_blocks
        if worker.num_agent_blocks > num_blocks or worker.num_remote_blocks > num_blocks:
            num_blocks = self._choose_source(tokens_per_ms, costs)
        self.num_cached_tokens = num_blocks * worker.block_size
        # The last token is computed even when its block is cached: its logits are what the first output comes from.
        self.num_uncached_tokens = max(1, num_prompt_tokens - self.num_cached_tokens)
        self.uncached_ms = self.num_uncached_tokens / tokens_per_ms
        self.wait_ms = worker.num_waiting_tokens / tokens_per_ms

    def _choose_source(self, tokens_per_ms: float, costs: CostModel) -> int:
        """The agent that brings blocks sooner than computing them would, if one does; the number of blocks then."""
        worker = self.worker
        in_pool, at_agent = worker.num_cached_blocks, worker.num_agent_blocks
        bandwidth = worker.transfer_bytes_per_second or costs.bandwidth_bytes_per_second
        block_ms = 1000 * worker.block_bytes / bandwidth
        compute_ms = worker.block_size / tokens_per_ms
        best, saved_ms = in_pool, 0.0
        for source, num_blocks, calls in (
            (worker.agent_address, at_agent, 1),
            (worker.remote_agent, worker.num_remote_blocks, 2),
        ):
            fetch_ms = calls * costs.fetch_ms + (num_blocks - in_pool) * block_ms
            if (num_blocks - in_pool) * compute_ms - fetch_ms > saved_ms:
                saved_ms = (num_blocks - in_pool) * compute_ms - fetch_ms
                best, self.source, self.num_source_blocks, self.fetch_ms = num_blocks, source, num_blocks, fetch_ms
        return best


class _Prefill(_Computing):
    """What a prefill worker adds to the cost of all pairs that it is in."""

    __slots__ = ("cost_ms",)

    def __init__(self, num_prompt_tokens: int, worker: WorkerView, costs: CostModel) -> None:
        super().__init__(num_prompt_tokens, worker, costs)
        self.cost_ms = self.wait_ms + self.fetch_ms + (1 + costs.uncached_weight) * self.uncached_ms

    def transfer_ms(self, decode: _Decode) -> float:
        """What is left of the blocks' way when the last one is computed: they travel while the next ones are."""
        return max(0.0, decode.bytes_ms - self.uncached_ms)


class _Decode(_Computing):
    """A decode worker's part of the cost, alone and in pairs."""

    __slots__ = ("admit_ms", "bytes_ms", "direct_cost_ms", "join_ms", "num_missing_blocks", "split_cost_ms")

    def __init__(self, num_prompt_tokens: int, worker: WorkerView, costs: CostModel) -> None:
        super().__init__(num_prompt_tokens, worker, costs)
        self.num_missing_blocks = num_prompt_tokens // worker.block_size - worker.num_cached_blocks
        bandwidth = worker.transfer_bytes_per_second or costs.bandwidth_bytes_per_second
        self.bytes_ms = 1000 * self.num_missing_blocks * worker.block_bytes / bandwidth
        self.join_ms = _join_ms(worker, costs)
        self.admit_ms = _admit_ms(self.num_missing_blocks + 1, worker, costs)
        self.split_cost_ms = costs.handover_ms + self.admit_ms + costs.slowdown_weight * self.join_ms
        self.direct_cost_ms = (
            self.wait_ms
            + self.fetch_ms
            + (1 + costs.uncached_weight) * self.uncached_ms
            + self.admit_ms
            + costs.slowdown_weight * self.direct_slowdown_ms
        )

    @property
    def direct_slowdown_ms(self) -> float:
        """Chunks of this prompt take their part of every step until it is done: all there are that much later, and so
        is the one that may come meanwhile (+ 1)."""
        return self.join_ms + self.uncached_ms * (self.worker.num_requests + 1)


class _Pair:
    """A candidate before anybody asks for its terms. prefill: None = decode does it alone."""

    __slots__ = ("cost_ms", "decode", "prefill")

    def __init__(self, prefill: _Prefill | None, decode: _Decode, cost_ms: float) -> None:
        self.prefill = prefill
        self.decode = decode
        self.cost_ms = cost_ms

    def explain(self, costs: CostModel) -> Candidate:
        prefill, decode = self.prefill, self.decode
        computes = prefill or decode
        transfer_ms = prefill.transfer_ms(decode) if prefill else 0.0
        handover_ms = costs.handover_ms if prefill else 0.0
        return Candidate(
            decode=decode.worker.address,
            prefill=prefill.worker.address if prefill else None,
            source=computes.source,
            num_source_blocks=computes.num_source_blocks,
            wait_ms=computes.wait_ms,
            fetch_ms=computes.fetch_ms,
            uncached_ms=computes.uncached_ms,
            transfer_ms=transfer_ms,
            handover_ms=handover_ms,
            admit_ms=decode.admit_ms,
            slowdown_ms=decode.join_ms if prefill else decode.direct_slowdown_ms,
            ttft_ms=computes.wait_ms
            + computes.fetch_ms
            + computes.uncached_ms
            + transfer_ms
            + handover_ms
            + decode.admit_ms,
            cost_ms=self.cost_ms,
            num_uncached_tokens=computes.num_uncached_tokens,
            num_cached_tokens=max(computes.num_cached_tokens, decode.num_cached_tokens),
        )


def _assume(prefill_workers: Sequence[WorkerView], decode_workers: Sequence[WorkerView], costs: CostModel) -> CostModel:
    """The model for unmeasured workers: as fast as the mean of the measured ones, which run the same model."""
    if all(w.prefill_tokens_per_second and w.step_seconds for w in decode_workers) and all(
        w.prefill_tokens_per_second for w in prefill_workers
    ):
        return costs  # nobody needs it
    rates = [w.prefill_tokens_per_second for w in chain(prefill_workers, decode_workers) if w.prefill_tokens_per_second]
    steps = [w.step_seconds for w in decode_workers if w.step_seconds]
    return replace(
        costs,
        prefill_tokens_per_second=fmean(rates) if rates else costs.prefill_tokens_per_second,
        step_seconds=fmean(steps) if steps else costs.step_seconds,
    )


def _tokens_per_ms(worker: WorkerView, costs: CostModel) -> float:
    return (worker.prefill_tokens_per_second or costs.prefill_tokens_per_second) / 1000


def _join_ms(decode: WorkerView, costs: CostModel) -> float:
    """One more in the batch: what that adds to a step delays each of the others at every step that they share.

    Where it was not measured, about one step over the answer's life. This spreads answers.
    """
    per_answer = decode.step_seconds_per_request * costs.answer_tokens
    return 1000 * (per_answer or decode.step_seconds or costs.step_seconds) * decode.num_requests


def _admit_ms(num_blocks: int, decode: WorkerView, costs: CostModel) -> float:
    """Until decode has room: the step in progress, and, when it is full, the answers that have to end first.

    Of max_num_seqs answers one ends every (answer_tokens / max_num_seqs) steps; blocks for a whole prompt take longer.
    """
    step_ms = 1000 * (decode.step_seconds or costs.step_seconds)
    answer_ms = costs.answer_tokens * step_ms
    num_ahead = max(0, decode.num_requests + 1 - decode.max_num_seqs)
    lacks_blocks = num_blocks > decode.num_free_blocks
    return step_ms / 2 + num_ahead * answer_ms / decode.max_num_seqs + (answer_ms if lacks_blocks else 0.0)
