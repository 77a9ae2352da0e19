"""Where a request goes: one continuous cost in milliseconds for every candidate, and the cheapest wins (design.md §6).

    ttft(p, d) = wait(p) + uncached_tokens(p) / prefill_rate(p) + transfer + handover + admit(d)
    ttft(d)    = wait(d) + uncached_tokens(d) / prefill_rate(d)            + admit(d)
    cost       = ttft + a · (uncached part of ttft) + w · (delay it causes to the requests on d)

No threshold decides whether to split; the terms do. On an idle pair of equal speed the two differ by `handover` on one
side and by w · (time decode spends on the prompt) on the other: the request that may arrive meanwhile is counted, for
decode's time is what a split exists to protect. With the values below the split wins from 5 ms of prefill on. Each
request running on decode moves that border down (two of them: 1.7 ms), a queue at prefill moves it up, and a prompt
that decode has cached never reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from zlib import crc32


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What the terms are weighed with, and what is assumed where nothing was measured."""

    uncached_weight: float = 2.0  # a: keeping prefixes together pays beyond this request; 2 measured best on a trace
    slowdown_weight: float = 1.0  # w: a millisecond of another request's counts as one of ours
    handover_ms: float = 5.0  # two more calls, announcing, the last block's way
    bandwidth_bytes_per_second: float = 1e9  # between agents, until links are measured
    prefill_tokens_per_second: float = 2000.0  # when no worker has measured; otherwise the mean of those that have
    step_seconds: float = 0.02  # likewise
    answer_tokens: int = 128  # a typical answer: how long a full decode worker takes to have room again


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What is known of a worker, about one prompt. Requests and tokens include ours that no report has shown yet.

    num_cached_blocks: leading blocks of the prompt in its pool
    prefill_tokens_per_second, step_seconds: 0 = not measured
    """

    address: str
    fingerprint: bytes
    block_size: int
    block_bytes: int
    has_agent: bool
    max_num_seqs: int
    num_requests: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    num_cached_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decode worker, alone or with a prefill worker, and what it would cost. All terms in milliseconds.

    slowdown_ms is of other requests and no part of ttft_ms.
    """

    decode: str
    prefill: str | None
    wait_ms: float
    uncached_ms: float
    transfer_ms: float
    handover_ms: float
    admit_ms: float
    slowdown_ms: float
    ttft_ms: float
    cost_ms: float
    num_uncached_tokens: int  # to be computed by the worker that prefills

    @property
    def terms(self) -> Mapping[str, float]:
        """For whoever wants to know why."""
        return {
            "wait_ms": self.wait_ms,
            "uncached_ms": self.uncached_ms,
            "transfer_ms": self.transfer_ms,
            "handover_ms": self.handover_ms,
            "admit_ms": self.admit_ms,
            "slowdown_ms": self.slowdown_ms,
            "ttft_ms": self.ttft_ms,
            "cost_ms": self.cost_ms,
        }


@dataclass(frozen=True, slots=True)
class Placement:
    """A decision: candidates, cheapest first; never empty."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


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
    assumed = _assume(prefill_workers, decode_workers, costs)
    candidates = [_direct(num_prompt_tokens, worker, assumed) for worker in decode_workers]
    for decode in decode_workers:
        candidates += (
            _split(num_prompt_tokens, prefill, decode, assumed)
            for prefill in prefill_workers
            if _can_split(num_prompt_tokens, prefill, decode)
        )
    if not candidates:
        return None

    def order(candidate: Candidate) -> tuple[float, int, str, str]:
        prefill = candidate.prefill or ""
        tie = crc32(prefill.encode(), crc32(candidate.decode.encode(), crc32(affinity)))
        return candidate.cost_ms, tie, candidate.decode, prefill

    return Placement(tuple(sorted(candidates, key=order)))


def _assume(prefill_workers: Sequence[WorkerView], decode_workers: Sequence[WorkerView], costs: CostModel) -> CostModel:
    """The model for unmeasured workers: as fast as the mean of the measured ones, which run the same model."""
    rates = [w.prefill_tokens_per_second for w in chain(prefill_workers, decode_workers) if w.prefill_tokens_per_second]
    steps = [w.step_seconds for w in decode_workers if w.step_seconds]
    return replace(
        costs,
        prefill_tokens_per_second=fmean(rates) if rates else costs.prefill_tokens_per_second,
        step_seconds=fmean(steps) if steps else costs.step_seconds,
    )


def _can_split(num_prompt_tokens: int, prefill: WorkerView, decode: WorkerView) -> bool:
    """Blocks can travel between the two, and there is at least one to send."""
    return (
        prefill.has_agent
        and decode.has_agent
        and prefill.fingerprint == decode.fingerprint
        and num_prompt_tokens // decode.block_size > decode.num_cached_blocks
    )


def _direct(num_prompt_tokens: int, decode: WorkerView, costs: CostModel) -> Candidate:
    num_uncached = _num_uncached_tokens(num_prompt_tokens, decode)
    rate = _tokens_per_ms(decode, costs)
    uncached_ms = num_uncached / rate
    return _weigh(
        decode,
        None,
        costs,
        wait_ms=decode.num_waiting_tokens / rate,
        uncached_ms=uncached_ms,
        admit_ms=_admit_ms(num_prompt_tokens, decode, costs),
        # Chunks of this prompt take their part of every step until it is done: all there are that much later, and so
        # is the one that may come meanwhile (+ 1).
        slowdown_ms=_join_ms(decode, costs) + uncached_ms * (decode.num_requests + 1),
        num_uncached_tokens=num_uncached,
    )


def _split(num_prompt_tokens: int, prefill: WorkerView, decode: WorkerView, costs: CostModel) -> Candidate:
    num_uncached = _num_uncached_tokens(num_prompt_tokens, prefill)
    rate = _tokens_per_ms(prefill, costs)
    uncached_ms = num_uncached / rate
    missing_bytes = (num_prompt_tokens // decode.block_size - decode.num_cached_blocks) * decode.block_bytes
    bytes_ms = 1000 * missing_bytes / costs.bandwidth_bytes_per_second
    return _weigh(
        decode,
        prefill,
        costs,
        wait_ms=prefill.num_waiting_tokens / rate,
        uncached_ms=uncached_ms,
        transfer_ms=max(0.0, bytes_ms - uncached_ms),  # blocks travel while the next ones are computed
        handover_ms=costs.handover_ms,
        admit_ms=_admit_ms(num_prompt_tokens, decode, costs),
        slowdown_ms=_join_ms(decode, costs),
        num_uncached_tokens=num_uncached,
    )


def _weigh(
    decode: WorkerView,
    prefill: WorkerView | None,
    costs: CostModel,
    *,
    wait_ms: float,
    uncached_ms: float,
    admit_ms: float,
    slowdown_ms: float,
    num_uncached_tokens: int,
    transfer_ms: float = 0.0,
    handover_ms: float = 0.0,
) -> Candidate:
    ttft_ms = wait_ms + uncached_ms + transfer_ms + handover_ms + admit_ms
    return Candidate(
        decode=decode.address,
        prefill=prefill.address if prefill else None,
        wait_ms=wait_ms,
        uncached_ms=uncached_ms,
        transfer_ms=transfer_ms,
        handover_ms=handover_ms,
        admit_ms=admit_ms,
        slowdown_ms=slowdown_ms,
        ttft_ms=ttft_ms,
        cost_ms=ttft_ms + costs.uncached_weight * uncached_ms + costs.slowdown_weight * slowdown_ms,
        num_uncached_tokens=num_uncached_tokens,
    )


def _num_uncached_tokens(num_prompt_tokens: int, worker: WorkerView) -> int:
    # The last token is computed even when its block is cached: its logits are what the first output comes from.
    return max(1, num_prompt_tokens - worker.num_cached_blocks * worker.block_size)


def _tokens_per_ms(worker: WorkerView, costs: CostModel) -> float:
    return (worker.prefill_tokens_per_second or costs.prefill_tokens_per_second) / 1000


def _join_ms(decode: WorkerView, costs: CostModel) -> float:
    """One more in the batch: over its life it costs each of the others about one step. This spreads answers."""
    return 1000 * (decode.step_seconds or costs.step_seconds) * decode.num_requests


def _admit_ms(num_prompt_tokens: int, decode: WorkerView, costs: CostModel) -> float:
    """Until decode has room: the step in progress, and, when it is full, the answers that have to end first.

    Of max_num_seqs answers one ends every (answer_tokens / max_num_seqs) steps; blocks for a whole prompt take longer.
    """
    step_ms = 1000 * (decode.step_seconds or costs.step_seconds)
    answer_ms = costs.answer_tokens * step_ms
    num_ahead = max(0, decode.num_requests + 1 - decode.max_num_seqs)
    num_blocks = num_prompt_tokens // decode.block_size + 1 - decode.num_cached_blocks
    lacks_blocks = num_blocks > decode.num_free_blocks
    return step_ms / 2 + num_ahead * answer_ms / decode.max_num_seqs + (answer_ms if lacks_blocks else 0.0)
