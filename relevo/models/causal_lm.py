"""A transformers model as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from relevo.core.block_hash import LayerShape
from relevo.models.attention import Attention, AttentionContext
from relevo.models.passes import PassRecord
from relevo.models.probe import LayerAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLM:
    """module: what is run; config: the model's own
    layers: one entry a decoder layer: heads, shape of its KV, window, …

    dtype: of weights and KV
    vocab_size: rows of the logits
    max_model_len: positions that the model can tell apart, prompt and output together
    fingerprint_parts: model, revision and quantization, for KVLayout.fingerprint
    model_kwargs: the keywords through which an attention reaches the model's modules
    parameters: how many of each dtype, as loaded
    passes: what was done to the modules; empty if passes were off
    kv_scales: each layer's (k_scale, v_scale), [1] float32, that the checkpoint has for a cache in 8 bits
    """

    module: nn.Module
    config: PreTrainedConfig
    layers: tuple[LayerAttention, ...]
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    fingerprint_parts: tuple[str, str, str]
    model_kwargs: Callable[[Attention], Mapping[str, Any]]
    parameters: Mapping[torch.dtype, int]
    passes: tuple[PassRecord, ...] = ()
    kv_scales: tuple[tuple[Tensor, Tensor], ...] | None = None

    @property
    def layout_layers(self) -> tuple[LayerShape, ...]:
        return tuple(layer.shape for layer in self.layers)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, context: AttentionContext, logits_indices: Tensor
    ) -> Tensor:
        """Compute a flat batch; writes its keys and values into the cache.

        input_ids, positions: [num_tokens] int64, sequence after sequence, as context.metadata says
        logits_indices:       [n] int64, the tokens whose next-token logits are wanted; n may be 0
        returns: [n, vocab_size] float32, as the model's own forward gives them
        """
        if self.kv_scales is not None and context.layers[0][0].dtype == torch.float8_e4m3fn:
            context = replace(context, scales=self.kv_scales)
        output = self.module(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logits_indices,
            **self.model_kwargs(context),
        )
        logits: Tensor = output.logits[0]
        return logits.float()
