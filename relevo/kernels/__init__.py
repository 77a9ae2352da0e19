"""Attention over a paged KV cache: one module a backend, the same functions in each.

`reference` is plain torch, runs everywhere and is what the others are tested against; `cpu` is numba.
Importing this package imports neither torch nor numba; `load_backend` imports what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from relevo.kernels.metadata import AttentionMetadata

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BACKENDS", "AttentionMetadata", "Kernels", "load_backend"]

BACKENDS = ("auto", "reference", "cpu")


class Kernels(Protocol):
    """What every backend module offers."""

    def store_kv(self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write a step's keys and values into the cache.

        key:          [num_tokens, kv_heads, k_dim], any strides
        value:        [num_tokens, kv_heads, v_dim], any strides
        k_cache:      [num_blocks, block_size, kv_heads, k_dim], a strided view; key is cast to its dtype
        v_cache:      [num_blocks, block_size, kv_heads, v_dim], likewise
        slot_mapping: [num_tokens] int64, block_id * block_size + offset

        Raises IndexError for a slot outside the cache.
        """
        ...

    def paged_attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of a flat batch's queries over their sequences' cached keys and values.

        query:   [num_tokens, heads, k_dim], any strides; heads is a multiple of kv_heads
        k_cache: [num_blocks, block_size, kv_heads, k_dim], a strided view
        v_cache: [num_blocks, block_size, kv_heads, v_dim], a strided view
        sinks:   [heads], one logit more in each head's softmax denominator (gpt-oss)
        returns: [num_tokens, heads, v_dim], contiguous, query's dtype

        A query at position p sees keys [max(0, p - sliding_window + 1), p], as in transformers. Logits are
        scaled, then softcap * tanh(logits / softcap), then masked. Keys that no query sees are not read.
        """
        ...

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile, or load from disk, whatever a first call with this dtype would wait for."""
        ...


def load_backend(name: str, device: str) -> Kernels:
    """Import a backend by name; `auto` is `cpu` on a CPU and `reference` on any other device.

    Raises ValueError if the name is unknown, or names a backend that cannot run on `device`.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}: choose one of {', '.join(BACKENDS)}")
    on_cpu = device.partition(":")[0] == "cpu"
    if name == "auto":
        name = "cpu" if on_cpu else "reference"
    if name == "cpu" and not on_cpu:
        raise ValueError(f"kernel backend 'cpu' cannot run on device {device!r}: choose 'reference' or 'auto'")
    return cast(Kernels, import_module(f"relevo.kernels.{name}"))
