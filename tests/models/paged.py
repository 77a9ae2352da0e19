"""Runs a CausalLM over a paged cache as the engine does, without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from relevo.kernels import AttentionMetadata, Kernels, load_backend
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM
from relevo.models.layout import KVLayout

BLOCK_SIZE = 8
NUM_BLOCKS = 64


class PagedModel:
    """A cache with garbage in it, and sequences whose blocks lie anywhere in it."""

    def __init__(self, model: CausalLM, seed: int = 0, backend: str = "reference") -> None:
        self.model = model
        self._kernels: Kernels = load_backend(backend, "cpu")
        self._layout = KVLayout(layers=model.layout_layers, dtype=model.dtype, block_size=BLOCK_SIZE)
        generator = torch.Generator().manual_seed(seed)
        storage = torch.empty(NUM_BLOCKS, self._layout.block_bytes, dtype=torch.uint8)
        storage.view(model.dtype).normal_(std=10, generator=generator)
        self._layers = self._layout.views(storage)
        self._free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
        self._blocks: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, batch: dict[str, Sequence[int]]) -> dict[str, Tensor]:
        """Append tokens to sequences, all in one flat batch; returns the logits of every new token, by sequence."""
        flat, context, positions = self._batch(batch)
        logits = self.model.forward(torch.tensor(flat), positions, context, torch.arange(len(flat)))
        return dict(zip(batch, torch.split(logits, [len(tokens) for tokens in batch.values()]), strict=True))

    def forward(self, batch: dict[str, Sequence[int]], logits_indices: Tensor) -> Tensor:
        """The same, but the logits that are asked for."""
        flat, context, positions = self._batch(batch)
        return self.model.forward(torch.tensor(flat), positions, context, logits_indices)

    def _batch(self, batch: dict[str, Sequence[int]]) -> tuple[list[int], AttentionContext, Tensor]:
        flat: list[int] = []
        positions: list[int] = []
        for name, tokens in batch.items():
            start = self._lengths.get(name, 0)
            self._lengths[name] = start + len(tokens)
            flat += tokens
            positions += range(start, start + len(tokens))
            blocks = self._blocks.setdefault(name, [])
            while len(blocks) * BLOCK_SIZE < self._lengths[name]:
                blocks.append(self._free.pop())
        table = torch.full((len(batch), max(len(self._blocks[name]) for name in batch)), -7, dtype=torch.int32)
        for row, name in enumerate(batch):
            table[row, : len(self._blocks[name])] = torch.tensor(self._blocks[name], dtype=torch.int32)
        slots = [
            self._blocks[name][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for name, tokens in batch.items()
            for position in range(self._lengths[name] - len(tokens), self._lengths[name])
        ]
        counts = [len(tokens) for tokens in batch.values()]
        seq_lens = [self._lengths[name] for name in batch]
        metadata = AttentionMetadata(
            block_table=table,
            slot_mapping=torch.tensor(slots),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=max(seq_lens),
        )
        return flat, AttentionContext(metadata, self._layers, self._kernels), torch.tensor(positions)
