"""GPT-Neo: every second layer sees a window, logits are not scaled, and modules pass no keywords down.

The one thing that its blocks do hand to their attention is the cache. So the attention context travels as one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoForCausalLM, GPTNeoSelfAttention

from relevo.models.attention import Attention

# transformers 5.24 renamed it.
_CACHE_KEYWORD = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(GPTNeoForCausalLM.forward).parameters
)


class GPTNeoAdapter:
    """See relevo.models.adapters.Adapter."""

    def prepare(self, model: nn.Module) -> None:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.attn.attention = PagedSelfAttention(block.attn.attention)

    def model_kwargs(self, attention: Attention) -> Mapping[str, Any]:
        # A mask of four dimensions is taken as it is: transformers then builds none, and asks no cache for its length.
        return {_CACHE_KEYWORD: _Carrier(attention), "attention_mask": torch.empty((1, 1, 0, 0))}


class PagedSelfAttention(nn.Module):
    """A GPTNeoSelfAttention's projections around paged attention. Its masks [max_positions²] are let go."""

    def __init__(self, attention: GPTNeoSelfAttention) -> None:
        super().__init__()
        self.q_proj = attention.q_proj
        self.k_proj = attention.k_proj
        self.v_proj = attention.v_proj
        self.out_proj = attention.out_proj
        self.layer_idx: int = attention.layer_id
        self.num_heads: int = attention.num_heads
        # A local layer sees the query's own position and window_size - 1 before it.
        self.sliding_window: int | None = attention.config.window_size if attention.attention_type == "local" else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, layer_past: _Carrier, **_: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = layer_past.attention.attend(
            self,
            query,
            key,
            value,
            attention_mask,
            layer_idx=self.layer_idx,
            scale=1.0,
            sliding_window=self.sliding_window,
        )
        return self.out_proj(output.flatten(-2)), None


@dataclass(frozen=True, slots=True)
class _Carrier:
    """What the model takes for its cache."""

    attention: Attention
