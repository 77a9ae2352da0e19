"""A flat batch's positions and attention metadata, from the spans of sequences that a pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relevo.kernels.metadata import AttentionMetadata


class Span(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence whose KV is in these blocks."""

    block_ids: Sequence[int]
    start: int
    num_tokens: int


def flat_batch(spans: Sequence[Span], block_size: int, device: torch.device) -> tuple[Tensor, AttentionMetadata]:
    """Positions, [num_tokens] int64, and metadata of a pass over the spans, one after the other; at least one."""
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
    metadata = AttentionMetadata(
        block_table=torch.from_numpy(block_table).to(device),
        slot_mapping=torch.from_numpy(slot_mapping).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q).to(device),
        max_query_len=int(counts.max()),
        max_seq_len=int(seq_lens.max()),
    )
    return torch.from_numpy(positions).to(device), metadata
