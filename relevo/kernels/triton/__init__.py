"""Kernels for GPUs, in Triton."""

from __future__ import annotations

from relevo.kernels.triton.activation import gated_activation
from relevo.kernels.triton.attention import paged_attention
from relevo.kernels.triton.blocks import gather_blocks, scatter_blocks
from relevo.kernels.triton.draw import sample
from relevo.kernels.triton.linear import prepare_linear
from relevo.kernels.triton.logprobs import score
from relevo.kernels.triton.lora import sgmv
from relevo.kernels.triton.masks import mask_logits
from relevo.kernels.triton.norm import add_rms_norm, rms_norm
from relevo.kernels.triton.penalties import apply_penalties
from relevo.kernels.triton.rotary import rotary_store_kv
from relevo.kernels.triton.store import store_kv
from relevo.kernels.triton.topk import argmax, top_k
from relevo.kernels.triton.warming import warm_up

__all__ = [
    "WIDENS_16_BITS",
    "add_rms_norm",
    "apply_penalties",
    "argmax",
    "gated_activation",
    "gather_blocks",
    "mask_logits",
    "paged_attention",
    "prepare_linear",
    "rms_norm",
    "rotary_store_kv",
    "sample",
    "scatter_blocks",
    "score",
    "sgmv",
    "store_kv",
    "top_k",
    "warm_up",
]

WIDENS_16_BITS = False
