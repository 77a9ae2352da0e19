"""RMS norm, with or without the sum before it: several rows a program, each read once.

dtypes: float32, bfloat16 and float16; others go to `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.triton.launch import FLOATS, num_warps

TILE = 4096  # elements of a program, where rows are short and many
MANY_ROWS = 4096


@triton.jit(do_not_specialize=["rows", "inner", "eps", "weight_offset"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    total,
    out,
    rows,
    inner,
    outer_stride,
    inner_stride,
    dim,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x's row i * inner + j begins at i * outer_stride + j * inner_stride; residual, total and out are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < dim)
    start = row // inner * outer_stride + row % inner * inner_stride
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * dim + column, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * dim + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / dim + eps)
    weights = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32) + weight_offset
    tl.store(out + row * dim + column, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """See `Kernels.rms_norm`."""
    if x.dtype not in FLOATS:
        return reference.rms_norm(x, weight, eps, weight_offset)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shaped = x.view(1, 1, -1) if x.dim() == 1 else x.unsqueeze(0) if x.dim() == 2 else x
    _launch(shaped, None, weight, None, out, eps, weight_offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_rms_norm`."""
    if x.dtype not in FLOATS or residual.dtype != x.dtype:
        return reference.add_rms_norm(x, residual, weight, eps, weight_offset)
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x.unsqueeze(0), residual, weight, total, out, eps, weight_offset)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    out: Tensor,
    eps: float,
    weight_offset: float,
) -> None:
    """x: [outer, inner, dim]"""
    outer, inner, dim = x.shape
    rows = outer * inner
    if rows == 0 or dim == 0:
        return
    assert x.stride(2) == 1 and weight.stride(0) == 1, (x.stride(), weight.stride())
    block = triton.next_power_of_2(dim)
    rows_at_once = max(1, TILE // block) if rows > MANY_ROWS else 1
    rms_norm_kernel[(triton.cdiv(rows, rows_at_once),)](
        x, x if residual is None else residual, weight, out if total is None else total, out,
        rows, inner, x.stride(0), x.stride(1), dim, eps, weight_offset,
        HAS_RESIDUAL=residual is not None, ROWS=rows_at_once, BLOCK=block, num_warps=num_warps(rows_at_once * block),
    )  # fmt: skip
