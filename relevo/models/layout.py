"""How the KV of one block lies in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.core.block_hash import LayerShape, layout_fingerprint


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A block is contiguous over all layers, dense, without padding:

    layer 0: K [block_size, kv_heads, k_dim], V [block_size, kv_heads, v_dim]; layer 1: K, V; …

    Every offset is a multiple of the dtype's size.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    block_size: int

    @property
    def block_bytes(self) -> int:
        return sum(sum(self._layer_bytes(layer)) for layer in self.layers)

    @property
    def layer_offsets(self) -> list[tuple[int, int]]:
        """Where each layer's K and V begin in a block, in bytes."""
        return [(k_begin, v_begin) for k_begin, v_begin, _ in self._ranges()]

    def views(self, storage: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's K and V of all blocks; strided, sharing storage's memory.

        storage: [num_blocks, block_bytes] uint8, contiguous
        returns: for each layer [num_blocks, block_size, kv_heads, k_dim] and [num_blocks, block_size, kv_heads, v_dim]
        """
        if storage.dtype != torch.uint8 or storage.dim() != 2 or storage.shape[1] != self.block_bytes:
            raise ValueError(
                f"storage must be uint8 [num_blocks, {self.block_bytes}], not {storage.dtype} {list(storage.shape)}"
            )
        elements = storage.view(self.dtype)
        size = self.dtype.itemsize
        leading = (storage.shape[0], self.block_size)
        return [
            (
                elements[:, k_begin // size : v_begin // size].view(*leading, layer.kv_heads, layer.k_dim),
                elements[:, v_begin // size : end // size].view(*leading, layer.kv_heads, layer.v_dim),
            )
            for layer, (k_begin, v_begin, end) in zip(self.layers, self._ranges(), strict=True)
        ]

    def fingerprint(self, model: str, revision: str, quantization: str) -> bytes:
        """32 bytes, equal exactly where blocks are interchangeable; see relevo.core.block_hash.layout_fingerprint."""
        kv_dtype = str(self.dtype).removeprefix("torch.")
        return layout_fingerprint(model, revision, quantization, kv_dtype, self.block_size, self.layers)

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        """For each layer, in bytes of a block: K is [k_begin, v_begin), V is [v_begin, end)."""
        begin = 0
        for layer in self.layers:
            k_bytes, v_bytes = self._layer_bytes(layer)
            yield begin, begin + k_bytes, begin + k_bytes + v_bytes
            begin += k_bytes + v_bytes

    def _layer_bytes(self, layer: LayerShape) -> tuple[int, int]:
        head_bytes = self.block_size * layer.kv_heads * self.dtype.itemsize
        return head_bytes * layer.k_dim, head_bytes * layer.v_dim
