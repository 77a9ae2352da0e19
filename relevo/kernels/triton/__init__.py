"""Kernels for GPUs, in Triton."""

from __future__ import annotations

from relevo.kernels.reference import (
    add_rms_norm,
    argmax,
    gated_activation,
    mask_logits,
    paged_attention,
    prepare_linear,
    rms_norm,
    rotary_store_kv,
    sample,
    score,
    store_kv,
    top_k,
    warm_up,
)

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
