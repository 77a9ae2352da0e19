"""Decode steps as CUDA graphs: captured once for some batch sizes, then replayed over the same buffers.

A step of one token a request launches hundreds of kernels, each of microseconds: without graphs the host, not the GPU,
sets the pace. A graph's kernels read and write where they did when it was captured. So a step's inputs go into static
buffers, by one copy from pinned memory, and the batch is padded to the next size that was captured.

Padding: sequences without tokens, and tokens of no sequence, whose keys and values go nowhere (slot -1). What comes of
them is never read; in a pass rows do not meet but in attention.

What a graph can't hold: sizes. Kernels take them from shapes and from the host's max_query_len and max_seq_len alone;
the latter is the model's whole context.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from relevo.engine.batch import FlatBatch
from relevo.engine.host_copies import Array, pack, unpack
from relevo.engine.kv_cache import KVCache
from relevo.kernels import AttentionMetadata, Kernels
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 2  # before a capture: kernels are compiled, workspaces allocated
NOWHERE = -1  # a slot

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]  # of what computes from static buffers into static buffers


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Ascending: few, since each takes time and memory, yet never half of a batch is padding."""
    steps = [*(1, 2, 4), *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [*(size for size in steps if size < max_num_seqs), max_num_seqs]


class CudaCapture:
    """Captures on a stream of its own, all graphs into one pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Replay:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy blocks meanwhile: that is no part of the graph, and no fault.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()
        return graph.replay


class DecodeGraphs:
    """The graphs, by (sequences, tokens of each at most), and the buffers that they compute from.

    Of n sequences with at most q tokens each, one copy from pinned memory brings

    token ids, positions, slots  [n * q] int64
    seq_lens, cu_seqlens_q       [n] and [n + 1] int32
    block_table                  [n, w] int32, w the longest one's blocks; another copy spreads it over the table that
                                 the graphs read, [n, W]
    """

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        kernels: Kernels,
        *,
        max_num_seqs: int,
        max_model_len: int,
        query_lens: tuple[int, ...] = (1,),
    ) -> None:
        """query_lens: ascending; a batch takes the first that holds its sequences' tokens."""
        self.sizes = graph_sizes(max_num_seqs)
        self.query_lens = query_lens
        self._model = model
        self._kernels = kernels
        self._layers = kv_cache.layers
        self._device = device = kv_cache.storage.device
        self._max_model_len = max_model_len
        self._graphs: dict[tuple[int, int], Replay] = {}
        max_tokens = max_num_seqs * query_lens[-1]
        max_blocks = -(-max_model_len // kv_cache.layout.block_size)
        self._token_ids = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._token_ids)
        self._slots = torch.zeros_like(self._token_ids)
        self._seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._cu_seqlens_q = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._block_table = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._rows = torch.arange(max_tokens, device=device)
        # One for all graphs: their own would all have to be kept.
        self._logits = torch.empty((max_tokens, model.vocab_size), dtype=torch.float32, device=device)

    def capture(self, capture: Capture) -> None:
        """All sizes, the largest first: the others find room in its memory."""
        self._slots.fill_(NOWHERE)
        for query_len in reversed(self.query_lens):
            for size in reversed(self.sizes):
                self._graphs[size, query_len] = capture(partial(self._compute, size, query_len))

    def takes(self, batch: FlatBatch) -> bool:
        """Whether it fits a graph: few tokens a sequence, and the logits of all of them."""
        return (
            batch.max_query_len <= self.query_lens[-1]
            and batch.num_seqs <= self.sizes[-1]
            and len(batch.logits_indices) == batch.num_tokens
            and bool((batch.logits_indices == np.arange(batch.num_tokens)).all())
        )

    def fill(self, batch: FlatBatch) -> Tensor:
        """Bring a batch that it takes into the buffers. Returns that of the token ids, whose values may be replaced."""
        size, query_len = self._padded(batch)
        num_tokens = size * query_len
        arrays: list[Array] = [
            _padded_to(num_tokens, batch.token_ids, 0),
            _padded_to(num_tokens, batch.positions, 0),
            _padded_to(num_tokens, batch.slot_mapping, NOWHERE),
            _padded_to(size, batch.seq_lens, 0),
            _padded_to(size + 1, batch.cu_seqlens_q, batch.num_tokens),
            batch.block_table,
        ]
        uploaded = unpack(pack(arrays, self._device).to(self._device, non_blocking=True), arrays)
        rows, width = batch.block_table.shape
        targets = [
            self._token_ids[:num_tokens],
            self._positions[:num_tokens],
            self._slots[:num_tokens],
            self._seq_lens[:size],
            self._cu_seqlens_q[: size + 1],
            self._block_table[:rows, :width],
        ]
        for target, source in zip(targets, uploaded, strict=True):
            target.copy_(source)
        return self._token_ids

    def replay(self, batch: FlatBatch) -> Tensor:
        """Logits of the batch that was filled in, [num_tokens, vocab_size] float32, until the next replay."""
        self._graphs[self._padded(batch)]()
        return self._logits[: batch.num_tokens]

    def _padded(self, batch: FlatBatch) -> tuple[int, int]:
        return (
            self.sizes[bisect_left(self.sizes, batch.num_seqs)],
            self.query_lens[bisect_left(self.query_lens, batch.max_query_len)],
        )

    def _compute(self, size: int, query_len: int) -> None:
        """A pass over the buffers."""
        num_tokens = size * query_len
        metadata = AttentionMetadata(
            block_table=self._block_table[:size],
            slot_mapping=self._slots[:num_tokens],
            seq_lens=self._seq_lens[:size],
            cu_seqlens_q=self._cu_seqlens_q[: size + 1],
            max_query_len=query_len,
            max_seq_len=self._max_model_len,
        )
        context = AttentionContext(metadata, self._layers, self._kernels)
        logits = self._model.forward(
            self._token_ids[:num_tokens], self._positions[:num_tokens], context, self._rows[:num_tokens]
        )
        self._logits[:num_tokens].copy_(logits)


def _padded_to(length: int, values: Array, padding: int) -> Array:
    padded = np.full(length, padding, dtype=values.dtype)
    padded[: len(values)] = values
    return padded
