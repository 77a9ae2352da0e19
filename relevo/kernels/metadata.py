"""What attention has to know about a step's batch, beyond queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which tokens of a flat batch belong to which sequence, and where each sequence's KV lies.

    block_table:  [num_seqs, max_blocks] int32; entries past a sequence's last block are unspecified, never read
    slot_mapping: [num_tokens] int64; block_id * block_size + offset, where this step's K and V go
    seq_lens:     [num_seqs] int32; tokens of context, this step's included
    cu_seqlens_q: [num_seqs + 1] int32; sequence i's tokens in this step are [cu[i], cu[i + 1])

    All on the engine's device. A sequence's queries are the last tokens of its context.
    """

    block_table: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    max_query_len: int
    max_seq_len: int
