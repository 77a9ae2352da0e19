"""Llamas that look like Llamas and do something else: what no name and no attribute gives away."""
# mypy: disable-error-code="no-untyped-call, override, return-value"
# They leave out arguments of what they are made from that the engine never gives.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
)


class SmallerResidual(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + 0.99 * self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        output: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return output


class Parallel(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        output: Tensor = hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))
        return output


class OtherPositions(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        cos, sin = position_embeddings
        output: Tensor = super().forward(hidden_states, position_embeddings=(cos * cos, sin * cos), **kwargs)
        return output


class WeightReader(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(hidden_states.to(self.self_attn.o_proj.weight.dtype), **kwargs)
        return output


class Gated(LlamaAttention):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        output, _ = super().forward(hidden_states, **kwargs)
        return output * hidden_states.sigmoid(), None


class Clipped(LlamaAttention):
    """Only what is beyond 12 deviations of a usual value."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        output, _ = super().forward(hidden_states.clamp(-12.0, 12.0), **kwargs)
        return output, None


class Swapped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return output


class Limited(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))
        return output


class OtherEps(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (hidden_states.float() * scale).to(hidden_states.dtype)


class CappedLogits(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 100 * torch.tanh(output.logits / 100)
        return output


class WithEmbeddingBias(LlamaForCausalLM):
    """Adds to the embeddings what no module of its own adds."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(inputs_embeds=self.model.embed_tokens(input_ids) + 0.05, **kwargs)
