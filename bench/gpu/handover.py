"""A prompt's KV from one engine into another, as prefill and decode workers do it: blocks leave while the next chunk is
computed, and the second engine goes on from the first one's token.

Both engines are in this process and on one device: blocks take the way over (pinned) host memory, by
`KVCache.leaving` and `arriving`, in a thread and on streams of their own. No checksums, no other process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bench.gpu.clock import Deadline
from relevo.core.sampling_params import SamplingParams
from relevo.engine.block_streams import STAGED_BLOCKS
from relevo.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class HandOver:
    """ttft_seconds: from the request to the first token
    tail_seconds: from the first token until the last block is in the second engine's cache
    second_token_seconds: after the first token
    """

    tokens: list[int]
    num_blocks: int
    num_bytes: int
    ttft_seconds: float
    tail_seconds: float
    second_token_seconds: float


class _Copier:
    """Copies blocks in order, in a thread, as workers do but for the arena between them."""

    def __init__(self, source: Engine, target: Engine) -> None:
        self._source, self._target = source.kv_cache, target.kv_cache
        self._thread = ThreadPoolExecutor(1)
        self._copies: list[Future[None]] = []

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: (block in the source, block in the target); a step that has ended has filled the former"""
        for start in range(0, len(pairs), STAGED_BLOCKS):
            self._copies.append(self._thread.submit(self._copy, pairs[start : start + STAGED_BLOCKS]))

    def wait(self) -> None:
        for copy in self._copies:
            copy.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        leaving, arriving = ([pair[side] for pair in pairs] for side in (0, 1))
        with self._source.leaving(leaving) as blocks, self._target.arriving(arriving) as places:
            for block, place in zip(blocks, places, strict=True):
                np.copyto(place, block)


def hand_over(source: Engine, target: Engine, prompt: Sequence[int], num_tokens: int, deadline: Deadline) -> HandOver:
    """Greedy; so many tokens in total, at least 2. The engines have nothing else to do."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=0, ignore_eos=True)
    first_only = SamplingParams(max_tokens=1, temperature=0.0, seed=0, ignore_eos=True)
    target.submit(target.make_request("hand-over", prompt, sampling, await_kv=True))
    places = target.step().reserved[0].block_ids
    copier = _Copier(source, target)
    try:
        return _hand_over(source, target, prompt, first_only, places, copier, deadline)
    finally:
        copier.close()


def _hand_over(
    source: Engine,
    target: Engine,
    prompt: Sequence[int],
    sampling: SamplingParams,
    places: Sequence[int],
    copier: _Copier,
    deadline: Deadline,
) -> HandOver:
    block_size, copied = source.info.block_size, 0
    started = time.perf_counter()
    source.submit(source.make_request("hand-over", prompt, sampling, hold_blocks=True))
    tokens: list[int] = []
    while source.has_unfinished_requests:
        deadline.check()
        result = source.step()
        for computed in result.computed:
            done = min(computed.num_computed_tokens // block_size, len(places))
            copier.copy(list(zip(computed.block_ids[copied:done], places[copied:done], strict=True)))
            copied = max(copied, done)
        for new in result.tokens:
            tokens += new.token_ids
    first_token_at = time.perf_counter()
    copier.wait()
    arrived_at = time.perf_counter()
    source.release("hand-over")
    target.resume("hand-over", copied * block_size, list(tokens))
    second_token_at = 0.0
    while target.has_unfinished_requests:
        deadline.check()
        for new in target.step().tokens:
            tokens += new.token_ids
            second_token_at = second_token_at or time.perf_counter()
    return HandOver(
        tokens=tokens,
        num_blocks=copied,
        num_bytes=copied * source.info.block_bytes,
        ttft_seconds=first_token_at - started,
        tail_seconds=arrived_at - first_token_at,
        second_token_seconds=second_token_at - first_token_at,
    )
