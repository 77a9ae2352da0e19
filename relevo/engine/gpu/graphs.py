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
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relevo.engine.batch import FlatBatch
from relevo.engine.host_copies import Array, pack, unpack, upload
from relevo.engine.kv_cache import KVCache
from relevo.kernels import AttentionMetadata, Kernels
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 2  # before a capture: kernels are compiled, workspaces allocated
NOWHERE = -1  # a slot
GRAPH_BYTES = 16 << 20  # an allowance, for what the driver keeps of a graph

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]  # of what computes from static buffers into static buffers


class GraphShape(NamedTuple):
    """Sequences, and of each so many tokens, at most."""

    num_seqs: int
    query_len: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.query_len


def graph_shapes(max_num_seqs: int, max_drafts: int) -> list[GraphShape]:
    """Ascending: few, since each takes time and memory, yet never half of a batch is padding. With drafts twice as
    many: for steps without them, and with all of them.
    """
    steps = [*(1, 2, 4), *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    sizes = [*(size for size in steps if size < max_num_seqs), max_num_seqs]
    return [GraphShape(size, query_len) for query_len in sorted({1, 1 + max_drafts}) for size in sizes]


def draft_graph_shapes(max_num_seqs: int) -> list[GraphShape]:
    """Of a draft model: a token that it lacks, or two, where all drafts were accepted; then one after the other."""
    return graph_shapes(max_num_seqs, 1)


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
    """The graphs, and the buffers that they compute from.

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
        shapes: Sequence[GraphShape],
        max_model_len: int,
    ) -> None:
        """shapes: as graph_shapes gives them"""
        self._model = model
        self._kernels = kernels
        self._layers = kv_cache.layers
        self._device = device = kv_cache.storage.device
        self._max_model_len = max_model_len
        self._shapes = shapes
        self._sizes = sorted({shape.num_seqs for shape in shapes})
        self._query_lens = sorted({shape.query_len for shape in shapes})
        self._graphs: dict[GraphShape, Replay] = {}
        max_num_seqs, max_tokens = self._sizes[-1], shapes[-1].num_tokens
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
        for shape in reversed(self._shapes):
            self._graphs[shape] = capture(partial(self._compute, shape))

    def takes(self, batch: FlatBatch) -> bool:
        """Whether it fits a graph: few sequences, of few tokens each."""
        return batch.num_seqs <= self._sizes[-1] and batch.max_query_len <= self._query_lens[-1]

    def fill(self, batch: FlatBatch) -> Tensor:
        """Bring a batch that it takes into the buffers. Returns that of the token ids, whose values may be replaced."""
        shape = self._padded(batch)
        size, num_tokens = shape.num_seqs, shape.num_tokens
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
        """Of the batch that was filled in: [len(batch.logits_indices), vocab_size] float32, until the next replay."""
        self._graphs[self._padded(batch)]()
        if np.array_equal(batch.logits_indices, np.arange(batch.num_tokens)):
            return self._logits[: batch.num_tokens]
        return self._logits.index_select(0, upload([batch.logits_indices], self._device)[0])

    def _padded(self, batch: FlatBatch) -> GraphShape:
        return GraphShape(
            self._sizes[bisect_left(self._sizes, batch.num_seqs)],
            self._query_lens[bisect_left(self._query_lens, batch.max_query_len)],
        )

    def _compute(self, shape: GraphShape) -> None:
        """A pass over the buffers."""
        size, num_tokens = shape.num_seqs, shape.num_tokens
        metadata = AttentionMetadata(
            block_table=self._block_table[:size],
            slot_mapping=self._slots[:num_tokens],
            seq_lens=self._seq_lens[:size],
            cu_seqlens_q=self._cu_seqlens_q[: size + 1],
            max_query_len=shape.query_len,
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
