"""What attention has to know about a step's batch, beyond queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What the host knows of a batch, for who plans there; as AttentionMetadata has it, in host memory."""

    block_table: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    cu_seqlens_q: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which tokens of a flat batch belong to which sequence, and where each sequence's KV lies.

    block_table:  [num_seqs, max_blocks] int32; entries past a sequence's last block are unspecified, never read
    slot_mapping: [num_tokens] int64; block_id * block_size + offset, where this step's K and V go
    seq_lens:     [num_seqs] int32; tokens of context, this step's included
    cu_seqlens_q: [num_seqs + 1] int32; sequence i's tokens in this step are [cu[i], cu[i + 1])

    host:         None in a CUDA graph: whatever was planned for these lengths would be of no use for the next ones

    All but `host` on the engine's device. A sequence's queries are the last tokens of its context. Nothing of this
    changes once attention has seen it: `plans` is where a backend keeps what it worked out, for the layers that follow.
    """

    block_table: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    max_query_len: int
    max_seq_len: int
    host: HostBatch | None = None
    plans: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
