"""The cache write, bit for bit; paged attention against the reference in float64, over what the cache then holds.

Tolerances, absolute, for outputs that are means of N(0, 1) values: float32 2e-5; bfloat16 1.6e-2 (one rounding of an
output below 4), and twice that over a cache in 8 bits, whose scales make outputs larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.checks import CheckFunction, poisoned, require_close, require_equal
from bench.gpu.paged import Batch, make_batch
from relevo.kernels import Kernels, reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
FP8 = torch.float8_e4m3fn

Lens = Sequence[tuple[int, int]]
DECODE: Lens = ((1, 1), (15, 1), (16, 1), (17, 1), (129, 1), (1030, 1))
PREFILL: Lens = ((1, 1), (16, 16), (17, 17), (100, 40), (300, 300))
VERIFY: Lens = ((1030, 5), (513, 5), (40, 5))
MIXED: Lens = ((600, 1), (45, 3), (80, 40), (90, 2))
TINY: Lens = ((17, 1), (33, 5))


def attention_checks() -> dict[str, CheckFunction]:
    half = torch.bfloat16
    wide: dict[str, Any] = {"heads": 32, "kv_heads": 8, "k_dim": 128}
    return {
        "attention, decode": partial(_check, DECODE, shape=wide),
        "attention, decode, float32": partial(_check, DECODE, dtype=torch.float32),
        "attention, prefill": partial(_check, PREFILL, shape=wide),
        "attention, verification of 4 drafts": partial(_check, VERIFY),
        "attention, decodes beside prompts": partial(_check, MIXED),
        "attention, sliding window": partial(_check, MIXED, sliding_window=40),
        "attention, softcap": partial(_check, MIXED, softcap=4.0),
        "attention, sinks": partial(_check, MIXED, sinks=True),
        "attention, fp8 KV with scales": partial(_check, MIXED, cache_dtype=FP8),
        "attention, blocks of 64": partial(_check, MIXED, shape={"block_size": 64}),
        "attention, head dim 96": partial(_check, MIXED, shape={"k_dim": 96}),
        "attention, head dim 256": partial(_check, MIXED, shape={"k_dim": 256}),
        "attention, K of 576 and V of 512": partial(
            _check, MIXED, dtype=half, shape={"heads": 16, "kv_heads": 1, "k_dim": 576, "v_dim": 512}
        ),
    }


def _check(
    lens: Lens,
    kernels: Kernels,
    device: torch.device,
    tiny: bool,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    shape: dict[str, Any] | None = None,
    sinks: bool = False,
    **options: Any,
) -> None:
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 2, "k_dim": 64} | (shape or {})
    batch = make_batch(TINY if tiny else lens, dtype=dtype, cache_dtype=cache_dtype, device=device, **sizes)
    scales: dict[str, Any] = {}
    if cache_dtype == FP8:
        scales = {
            "k_scale": torch.tensor([0.5, 2.0], device=device),
            "v_scale": torch.tensor([0.75, 1.5], device=device),
        }
    if sinks:
        options["sinks"] = torch.randn(sizes["heads"], device=device)
    _store(kernels, batch, scales)
    poisoned((batch.query.shape[0], sizes["heads"], batch.v_cache.shape[-1]), dtype, device)
    scale = sizes["k_dim"] ** -0.5
    query, metadata = batch.query, batch.metadata
    output = kernels.paged_attention(query, batch.k_cache, batch.v_cache, metadata, scale=scale, **options, **scales)
    assert output.dtype == dtype and output.is_contiguous()
    k_wide, v_wide = _wide(batch.k_cache, scales.get("k_scale")), _wide(batch.v_cache, scales.get("v_scale"))
    expected = reference.paged_attention(query.double(), k_wide, v_wide, metadata, scale=scale, **options)
    require_close(output, expected, relative=0.0, absolute=TOLERANCE[dtype] * (2 if scales else 1))


def _store(kernels: Kernels, batch: Batch, scales: dict[str, Tensor]) -> None:
    """Fill the cache; the rest of it stays as it is."""
    others = batch.storage.clone()
    kernels.store_kv(batch.keys, batch.values, batch.k_cache, batch.v_cache, batch.slots, **scales)
    written = batch.storage.clone()
    batch.storage.copy_(others)
    reference.store_kv(batch.keys, batch.values, batch.k_cache, batch.v_cache, batch.slots, **scales)
    require_equal(written, batch.storage, "bytes of the cache")


def _wide(cache: Tensor, scale: Tensor | None) -> Tensor:
    wide = cache.float().double()
    return wide if scale is None else wide * scale.double()[:, None]
