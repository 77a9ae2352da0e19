"""Kernels for GPUs, in Triton."""

from __future__ import annotations

from relevo.kernels.reference import (
    paged_attention,
    prepare_linear,
    sample,
    store_kv,
    warm_up,
)
from relevo.kernels.triton.activation import gated_activation
from relevo.kernels.triton.logprobs import score
from relevo.kernels.triton.masks import mask_logits
from relevo.kernels.triton.norm import add_rms_norm, rms_norm
from relevo.kernels.triton.rotary import rotary_store_kv
from relevo.kernels.triton.topk import argmax, top_k

__all__ = [
    "WIDENS_16_BITS",
    "add_rms_norm",
    "argmax",
    "gated_activation",
    "mask_logits",
    "paged_attention",
    "prepare_linear",
    "rms_norm",
    "rotary_store_kv",
    "sample",
    "score",
    "store_kv",
    "top_k",
    "warm_up",
]

WIDENS_16_BITS = False
