"""Norms, rotary embedding, gates, and blocks in and out.

Tolerances: one rounding of the output's type and 5e-6 of the largest value (5e-6 alone in float32).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu.checks import ROUNDING, CheckFunction, poisoned, require_close, require_equal
from bench.gpu.paged import make_batch
from relevo.kernels import Activation, Kernels, reference


def element_checks() -> dict[str, CheckFunction]:
    checks: dict[str, CheckFunction] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        checks[f"RMSNorm, with and without residual, {name}"] = partial(_norms, dtype)
        checks[f"rotary and cache write, {name}"] = partial(_rotary, dtype)
        for activation in ("silu", "gelu", "gelu_tanh"):
            checks[f"{activation} and mul, {name}"] = partial(_activation, activation, dtype)
    return checks | {"block gather and scatter": _blocks}


def _norms(dtype: torch.dtype, kernels: Kernels, device: torch.device, tiny: bool) -> None:
    for rows, dim in ((3, 33), (5, 100)) if tiny else ((1, 1), (3, 33), (70, 896), (513, 4096)):
        x, residual = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(dim, device=device).to(dtype)
        poisoned((rows, dim), dtype, device)
        expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
        _require(kernels.rms_norm(x, weight, 1e-6), expected, dtype)
        output, total = kernels.add_rms_norm(x, residual, weight, 1e-5, 1.0)
        require_equal(total, x + residual, "sums")
        _require(output, reference.rms_norm(total.double(), weight.double(), 1e-5, 1.0), dtype)


def _rotary(dtype: torch.dtype, kernels: Kernels, device: torch.device, tiny: bool) -> None:
    """Rotated over the whole head, and over half of it. Keys are looked for where the cache keeps them."""
    for rot_dim in (64, 32):
        batch = make_batch([(5, 5), (3, 3)] if tiny else [(40, 40), (300, 300)], heads=8, kv_heads=2, k_dim=64,
                           dtype=dtype, device=device)  # fmt: skip
        angles = torch.rand(len(batch.query), rot_dim // 2, device=device) * 6.2832
        cos, sin = (torch.cat((part, part), dim=-1).to(dtype) for part in (angles.cos(), angles.sin()))
        query = kernels.rotary_store_kv(
            batch.query, batch.keys, batch.values, cos, sin, batch.k_cache, batch.v_cache, batch.slots
        )
        blocks, offsets = batch.slots // 16, batch.slots % 16
        expected = torch.full_like(batch.k_cache, float("nan"), dtype=torch.float64)
        values = torch.full_like(batch.v_cache, float("nan"), dtype=torch.float64)
        rotated = reference.rotary_store_kv(
            batch.query.double(), batch.keys.double(), batch.values.double(), cos.double(), sin.double(),
            expected, values, batch.slots,
        )  # fmt: skip
        _require(query, rotated, dtype)
        _require(batch.k_cache[blocks, offsets], expected[blocks, offsets], dtype)
        require_equal(batch.v_cache[blocks, offsets], batch.values, "values")


def _activation(activation: Activation, dtype: torch.dtype, kernels: Kernels, device: torch.device, tiny: bool) -> None:
    for rows, features in ((3, 33),) if tiny else ((1, 1), (3, 33), (257, 14336)):
        x = torch.randn(rows, 2 * features, device=device).to(dtype)
        poisoned((rows, features), dtype, device)
        _require(kernels.gated_activation(x, activation), reference.gated_activation(x.double(), activation), dtype)


def _blocks(kernels: Kernels, device: torch.device, tiny: bool) -> None:
    for block_bytes in (7, 30, 8 * 2049) if tiny else (7, 30, 8 * 2049, 1 << 21):
        storage = torch.randint(0, 256, (12, block_bytes), dtype=torch.uint8, device=device)
        ids = torch.tensor([5, 0, 11, 3], device=device)
        out = torch.full((4, block_bytes), 255, dtype=torch.uint8, device=device)
        kernels.gather_blocks(storage, ids, out)
        require_equal(out, storage[ids], "bytes gathered")
        target = torch.zeros_like(storage)
        expected = target.clone()
        expected[ids] = out
        kernels.scatter_blocks(out, ids, target)
        require_equal(target, expected, "bytes scattered")


def _require(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    largest = max(1.0, float(expected.abs().max()))
    relative = 0.0 if dtype == torch.float32 else ROUNDING[dtype]
    require_close(actual, expected, relative=relative, absolute=5e-6 * largest)
