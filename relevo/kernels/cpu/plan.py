"""How a batch's attention is cut into items of work that threads take one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from relevo.kernels.cpu.buffers import result_floats, scratch_floats, tokens_per_item
from relevo.kernels.cpu.jit import entry_point, jit, sources_digest
from relevo.kernels.cpu.records import ITEM_FIELDS, Item, Problem, load_problem, store_item
from relevo.kernels.cpu.simd import load_int32

ITEMS_PER_THREAD = 4  # enough that a thread which lost its core for a while does not hold up the others
MIN_SPLIT_KEYS = 256  # below, merging a split costs more than it gains

Items = npt.NDArray[np.int64]


class Span(NamedTuple):
    """A sequence's part in the step."""

    first: int  # tokens [first, past) of the batch
    past: int
    position: int  # of the first of them in its sequence


def _build(digest: int) -> Callable[[int], tuple[Items, int, int, int, int]]:
    @entry_point
    def plan(problem_address: int) -> tuple[Items, int, int, int, int]:
        """Cut the batch into items: ([items, ITEM_FIELDS], groups of splits, float32 of scratch, of results, cost).

        The cost is in multiplications of a query vector with a key.

        Raises IndexError if a block that would be read is not in the table, or not in the cache.
        """
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        problem = load_problem(problem_address)
        size = tokens_per_item(problem)
        cost = _total_cost(problem, size)
        fair_share = max(1, cost // (problem.workers * ITEMS_PER_THREAD))
        items = np.empty((_emit(problem, size, fair_share, 0)[0], ITEM_FIELDS), np.int64)
        _, partials, groups = _emit(problem, size, fair_share, items.ctypes.data)
        cost *= problem.heads // problem.kv_heads
        return items, groups, problem.workers * scratch_floats(problem), partials * result_floats(problem), cost

    return plan


plan = _build(sources_digest())


@jit
def _span(problem: Problem, sequence: int) -> Span:
    at = problem.cu_seqlens_q + 4 * sequence
    first, past = load_int32(at), load_int32(at + 4)
    return Span(first, past, load_int32(problem.seq_lens + 4 * sequence) - (past - first))


@jit
def _keys(problem: Problem, span: Span, token: int, tokens: int) -> tuple[int, int]:
    """The keys [begin, end) that tokens [token, token + tokens) of the batch see between them."""
    position = span.position + token - span.first
    return max(0, position - problem.window + 1), position + tokens


@jit
def _total_cost(problem: Problem, size: int) -> int:
    """Queries times keys, of all kv heads. Checks the block table on its way."""
    total = 0
    for sequence in range(problem.num_seqs):
        span = _span(problem, sequence)
        if span.first < span.past:
            begin, end = _keys(problem, span, span.first, span.past - span.first)
            _check_blocks(problem, sequence, begin // problem.block_size, (end - 1) // problem.block_size)
        for token in range(span.first, span.past, size):
            tokens = min(size, span.past - token)
            begin, end = _keys(problem, span, token, tokens)
            total += tokens * (end - begin)
    return total * problem.kv_heads


@jit
def _check_blocks(problem: Problem, sequence: int, first: int, last: int) -> None:
    if last >= problem.max_blocks:
        raise IndexError("a sequence in seq_lens is longer than its row in block_table")
    for block in range(first, last + 1):
        block_id = load_int32(problem.block_table + sequence * problem.block_table_stride + 4 * block)
        if block_id < 0 or block_id >= problem.num_blocks:
            raise IndexError("block_table names a block that is not in the cache")


@jit
def _emit(problem: Problem, size: int, fair_share: int, items: int) -> tuple[int, int, int]:
    """Write the items to an address, or only count them if it is 0: (items, partials, groups)."""
    count = partials = groups = 0
    for sequence in range(problem.num_seqs):
        span = _span(problem, sequence)
        for token in range(span.first, span.past, size):
            tokens = min(size, span.past - token)
            begin, end = _keys(problem, span, token, tokens)
            splits = 1
            if problem.workers > 1:
                wanted = (tokens * (end - begin) + fair_share - 1) // fair_share
                splits = min(wanted, max(1, (end - begin) // MIN_SPLIT_KEYS))
            for kv_head in range(problem.kv_heads):
                for split in range(splits):
                    if items != 0:
                        item = Item(
                            sequence,
                            token,
                            tokens,
                            span.position + token - span.first,
                            begin + (end - begin) * split // splits,
                            begin + (end - begin) * (split + 1) // splits,
                            kv_head,
                            split,
                            splits,
                            partials,
                            groups,
                        )
                        store_item(items + 8 * ITEM_FIELDS * count, item)
                    count += 1
                if splits > 1:
                    partials += splits
                    groups += 1
    return count, partials, groups
