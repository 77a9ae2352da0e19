"""A prompt's KV from one engine into another, as prefill and decode workers do it: blocks leave while the next chunk is
computed, and the second engine goes on from the first one's token.

Both engines are in this process and on one device; between them lies shared memory, mapped once for each, and a thread
for each side, as between workers. On a GPU blocks go straight to it and from it, and their checksums, made on the
device, are compared. No other process, and no agent that slots are asked of.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from bench.gpu.clock import Deadline
from relevo.core.sampling_params import SamplingParams
from relevo.engine.engine import Engine
from relevo.engine.gpu.block_streams import STAGED_BLOCKS

NUM_PARTS = 8  # on their way at the same time
PART_SECONDS = 60.0  # for the oldest of them to arrive; longer: its copy has failed


@dataclass(frozen=True, slots=True)
class HandOver:
    """ttft_seconds: from the request to the first token
    tail_seconds: from the first token until the last block is in the second engine's cache
    second_token_seconds: after the first token
    out_seconds, in_seconds: that each side's thread spent with copies and checksums
    """

    tokens: list[int]
    num_blocks: int
    num_bytes: int
    ttft_seconds: float
    tail_seconds: float
    second_token_seconds: float
    out_seconds: float
    in_seconds: float


class _Arena:
    """Shared memory as two workers see it, NUM_PARTS × STAGED_BLOCKS slots a side."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._slot_bytes = -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        num_bytes = NUM_PARTS * STAGED_BLOCKS * self._slot_bytes
        fd = os.memfd_create("hand-over")
        try:
            os.ftruncate(fd, num_bytes)
            self.sides = [memoryview(mmap.mmap(fd, num_bytes)) for _ in range(2)]
        finally:
            os.close(fd)

    def slots(self, side: int, part: int, num_blocks: int) -> list[memoryview]:
        starts = [(part * STAGED_BLOCKS + slot) * self._slot_bytes for slot in range(num_blocks)]
        return [self.sides[side][start : start + self._block_bytes] for start in starts]


class _Copier:
    """Copies blocks in order, in two threads."""

    def __init__(self, source: Engine, target: Engine) -> None:
        self._source, self._target = source.kv_cache, target.kv_cache
        self._arena = _Arena(source.info.block_bytes)
        for cache, view in zip((self._source, self._target), self._arena.sides, strict=True):
            cache.pin(view)
        self._out, self._in = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._free: SimpleQueue[int] = SimpleQueue()
        for part in range(NUM_PARTS):
            self._free.put(part)
        self._copies: list[Future[Future[None]]] = []
        self.out_seconds = self.in_seconds = 0.0

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: (block in the source, block in the target); a step that has ended has filled the former"""
        for start in range(0, len(pairs), STAGED_BLOCKS):
            self._copies.append(self._out.submit(self._send, pairs[start : start + STAGED_BLOCKS]))

    def wait(self) -> None:
        for copy in self._copies:
            copy.result().result()

    def close(self) -> None:
        for thread in (self._out, self._in):
            thread.shutdown(cancel_futures=True)

    def _send(self, pairs: Sequence[tuple[int, int]]) -> Future[None]:
        part = self._free.get(timeout=PART_SECONDS)
        slots = self._arena.slots(0, part, len(pairs))
        block_ids = [source for source, _ in pairs]
        started = time.perf_counter()
        checksums = self._source.send(block_ids, slots)
        if checksums is None:
            with self._source.leaving(block_ids) as blocks:
                for block, slot in zip(blocks, slots, strict=True):
                    slot[:] = block.data
        self.out_seconds += time.perf_counter() - started
        return self._in.submit(self._receive, part, [target for _, target in pairs], checksums)

    def _receive(self, part: int, places: Sequence[int], checksums: list[int] | None) -> None:
        slots = self._arena.slots(1, part, len(places))
        started = time.perf_counter()
        after = self._target.last_launch()
        if self._target.receive(places, slots, after) != checksums:
            raise ValueError("blocks are not what has left")
        if checksums is None:
            with self._target.arriving(places, after) as into:
                for place, slot in zip(into, slots, strict=True):
                    place.data[:] = slot
        self.in_seconds += time.perf_counter() - started
        self._free.put(part)


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
        out_seconds=copier.out_seconds,
        in_seconds=copier.in_seconds,
    )
