"""A pass's inputs: tokens of many sequences in one flat batch, without padding; still in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from relevo.kernels.metadata import AttentionMetadata, HostBatch

Ints = NDArray[np.int64] | NDArray[np.int32]


class Span(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence whose KV is in these blocks."""

    block_ids: Sequence[int]
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """token_ids, positions: [num_tokens] int64; logits_indices: [n] int64, whose next-token logits are wanted.

    The rest is as AttentionMetadata has it.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    logits_indices: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    cu_seqlens_q: NDArray[np.int32]
    block_table: NDArray[np.int32]
    max_query_len: int
    max_seq_len: int

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def arrays(self) -> tuple[Ints, ...]:
        """token_ids, positions and logits_indices; then what metadata() takes, in its order."""
        return (
            self.token_ids,
            self.positions,
            self.logits_indices,
            self.block_table,
            self.slot_mapping,
            self.seq_lens,
            self.cu_seqlens_q,
        )

    def metadata(
        self, block_table: Tensor, slot_mapping: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor
    ) -> AttentionMetadata:
        """Of the same arrays where they are needed."""
        host = HostBatch(self.block_table, self.seq_lens, self.cu_seqlens_q)
        return AttentionMetadata(
            block_table, slot_mapping, seq_lens, cu_seqlens_q, self.max_query_len, self.max_seq_len, host
        )


def flat_batch(
    token_ids: Sequence[int] | NDArray[np.int64],
    spans: Sequence[Span],
    logits_indices: Sequence[int],
    block_size: int,
) -> FlatBatch:
    """Of the spans' tokens, one span after the other; at least one. logits_indices: of token_ids"""
    counts = np.array([span.num_tokens for span in spans], dtype=np.int32)
    starts = np.array([span.start for span in spans], dtype=np.int32)
    cu_seqlens_q = np.zeros(len(spans) + 1, dtype=np.int32)
    np.cumsum(counts, out=cu_seqlens_q[1:])
    positions = np.arange(cu_seqlens_q[-1], dtype=np.int64) + np.repeat(starts - cu_seqlens_q[:-1], counts)

    block_table = np.zeros((len(spans), max(len(span.block_ids) for span in spans)), dtype=np.int32)
    for row, span in enumerate(spans):
        block_table[row, : len(span.block_ids)] = span.block_ids
    block_ids = block_table[np.repeat(np.arange(len(spans)), counts), positions // block_size]
    slot_mapping = block_ids.astype(np.int64) * block_size + positions % block_size

    seq_lens = starts + counts
    return FlatBatch(
        token_ids=np.asarray(token_ids, dtype=np.int64),
        positions=positions,
        slot_mapping=slot_mapping,
        logits_indices=np.asarray(logits_indices, dtype=np.int64),
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        block_table=block_table,
        max_query_len=int(counts.max()),
        max_seq_len=int(seq_lens.max()),
    )
