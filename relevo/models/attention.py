"""Paged attention behind transformers' attention interface.

A model loaded with `attn_implementation=PAGED` calls `_attention_forward` from its attention modules. What it needs to
know about the batch arrives as the keyword `relevo`, which the model hands down through its **kwargs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from relevo.kernels import AttentionMetadata, Kernels

# transformers builds no mask for an implementation that has no mask function, and hands None to the modules.
PAGED = "relevo"
# The same, with masks that say what the model wanted masked; for probe.py.
PROBED = "relevo_probe"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(Protocol):
    """What the keyword `relevo` carries."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of one layer.

        query: [1, heads, num_tokens, k_dim]
        key:   [1, kv_heads, num_tokens, k_dim]
        value: [1, kv_heads, num_tokens, v_dim]
        kwargs: what else the module passed to its attention function
        returns: [1, num_tokens, heads, v_dim]
        """
        ...


class RotaryAttention(Attention, Protocol):
    """What it also offers to modules that passes put in."""

    def attend_rotary(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer, before the rotary embedding of its queries and keys.

        query:    [num_tokens, heads, k_dim]
        key:      [num_tokens, kv_heads, k_dim]
        value:    [num_tokens, kv_heads, v_dim]
        cos, sin: [num_tokens, rot_dim], see Kernels.rotary_store_kv
        returns:  [num_tokens, heads, v_dim]
        """
        ...


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """A step's batch, the cache it reads and writes, and the kernels that do so.

    layers: for every layer its (k_cache, v_cache), as KVLayout.views gives them
    scales: for every layer its (k_scale, v_scale), of a cache in 8 bits; None: 1
    """

    metadata: AttentionMetadata
    layers: Sequence[tuple[Tensor, Tensor]]
    kernels: Kernels
    scales: Sequence[tuple[Tensor, Tensor]] | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Store the new keys and values, then attend over the cached ones; see `Attention.attend`."""
        k_cache, v_cache = self.layers[layer_idx]
        k_scale, v_scale = self._scales(layer_idx)
        slots = self.metadata.slot_mapping
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self.kernels.store_kv(key, value, k_cache, v_cache, slots, k_scale, v_scale)
        return self.kernels.paged_attention(
            query[0].transpose(0, 1),
            k_cache,
            v_cache,
            self.metadata,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        ).unsqueeze(0)

    def attend_rotary(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Rotate, store and attend; see `RotaryAttention.attend_rotary`."""
        k_cache, v_cache = self.layers[layer_idx]
        k_scale, v_scale = self._scales(layer_idx)
        kernels, metadata = self.kernels, self.metadata
        rotated = kernels.rotary_store_kv(
            query, key, value, cos, sin, k_cache, v_cache, metadata.slot_mapping, k_scale, v_scale
        )
        return kernels.paged_attention(
            rotated,
            k_cache,
            v_cache,
            metadata,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def _scales(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.scales is None else self.scales[layer_idx]


def register_attention() -> None:
    """Make PAGED and PROBED known to transformers. Called before a model is loaded; repeating it is harmless."""
    for name in (PAGED, PROBED):
        AttentionInterface.register(name, _attention_forward)
    AttentionMaskInterface.register(PROBED, _describe_mask)


def described_mask(mask: Tensor | None) -> MaskFunction | None:
    """The function (batch, head, query position, key position) → visible that a mask made under PROBED stands for."""
    function: MaskFunction | None = getattr(mask, "relevo_mask_function", None)
    return function


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    relevo: Attention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output = relevo.attend(
        module,
        query,
        key,
        value,
        attention_mask,
        layer_idx=module.layer_idx,  # type: ignore[arg-type]  # an int on every module that can use a cache
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        **kwargs,
    )
    return output, None


def _describe_mask(*, mask_function: MaskFunction, q_length: int, kv_length: int, device: Any, **_: Any) -> Tensor:
    mask = torch.ones((1, 1, q_length, kv_length), dtype=torch.bool, device=device)
    mask.relevo_mask_function = mask_function  # type: ignore[attr-defined]  # lost by any operation on the mask: meant
    return mask
