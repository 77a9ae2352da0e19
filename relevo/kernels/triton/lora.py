"""Low-rank adapters of many requests in one batch, each row by its own (Chen et al. 2023, "Punica: multi-tenant LoRA
serving"; Sheng et al. 2023, "S-LoRA"): down to the rank, then up, each one launch.

A program takes a tile of rows and goes over the adapters that occur in it: one for most tiles of a prompt, a few for a
decode batch. dtypes: float32, bfloat16 and float16, all of one; others go to `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.triton.launch import FLOATS

ROWS = 16
FEATURES_IN = 64  # of x, read at once
PART = 512  # of x, a program's: a decode batch's few rows are spread over the GPU
FEATURES_OUT = 128  # of a program

NO_MORE = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["rows"])
def down_kernel(
    x, a, adapters, parts, rows, x_stride, a_adapter, a_rank, features, rank: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, FEATURES_IN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """parts [splits, rows, RANK] float32: each row's product with its adapter's a, over PART features of x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    wanted = tl.load(adapters + row, mask=row < rows, other=-1)
    rank_index = tl.arange(0, RANK)
    result = tl.zeros([ROWS, RANK], tl.float32)
    adapter = tl.min(tl.where(wanted >= 0, wanted, NO_MORE), axis=0)
    while adapter < NO_MORE:
        mine = wanted == adapter
        for first in range(0, PART, FEATURES_IN):
            feature = split * PART + first + tl.arange(0, FEATURES_IN)
            known = feature < features
            values = tl.load(
                x + row.to(tl.int64)[:, None] * x_stride + feature[None, :],
                mask=mine[:, None] & known[None, :],
                other=0.0,
            )
            weights = tl.load(
                a + adapter.to(tl.int64) * a_adapter + rank_index[None, :] * a_rank + feature[:, None],
                mask=known[:, None] & (rank_index < rank)[None, :],
                other=0.0,
            )
            result = tl.dot(values, weights, result, input_precision="ieee")
        adapter = tl.min(tl.where(wanted > adapter, wanted, NO_MORE), axis=0)
    place = (split * rows + row[:, None]) * RANK + rank_index[None, :]
    tl.store(parts + place, result, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "splits"])
def up_kernel(
    parts, b, adapters, scale, out, rows, splits, b_adapter, b_feature, out_stride, features, rank: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, FEATURES_OUT: tl.constexpr,
):  # fmt: skip
    """Add to out each row's part of the rank, scaled, times its adapter's b."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES_OUT + tl.arange(0, FEATURES_OUT)
    wanted = tl.load(adapters + row, mask=row < rows, other=-1)
    rank_index = tl.arange(0, RANK)
    small = tl.zeros([ROWS, RANK], tl.float32)
    for split in range(splits):
        place = (split * rows + row[:, None]) * RANK + rank_index[None, :]
        small += tl.load(parts + place, mask=(row < rows)[:, None], other=0.0)
    small *= tl.load(scale + wanted, mask=wanted >= 0, other=0.0).to(tl.float32)[:, None]
    result = tl.zeros([ROWS, FEATURES_OUT], tl.float32)
    adapter = tl.min(tl.where(wanted >= 0, wanted, NO_MORE), axis=0)
    while adapter < NO_MORE:
        values = tl.where((wanted == adapter)[:, None], small, 0.0).to(b.dtype.element_ty)
        weights = tl.load(
            b + adapter.to(tl.int64) * b_adapter + feature[None, :] * b_feature + rank_index[:, None],
            mask=(feature < features)[None, :] & (rank_index < rank)[:, None],
            other=0.0,
        )
        result = tl.dot(values, weights, result, input_precision="ieee")
        adapter = tl.min(tl.where(wanted > adapter, wanted, NO_MORE), axis=0)
    place = out + row.to(tl.int64)[:, None] * out_stride + feature[None, :]
    inside = (wanted >= 0)[:, None] & (feature < features)[None, :]
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + result).to(out.dtype.element_ty), mask=inside)


def sgmv(x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scale: Tensor, out: Tensor) -> None:
    """See `Kernels.sgmv`."""
    if x.dtype not in FLOATS or not x.dtype == a.dtype == b.dtype == out.dtype:
        reference.sgmv(x, a, b, adapters, scale, out)
        return
    (rows, features_in), (_, rank, _), features_out = x.shape, a.shape, out.shape[1]
    assert adapters.dtype == torch.int32 and adapters.is_contiguous() and scale.is_contiguous(), adapters.dtype
    assert x.stride(1) == a.stride(2) == b.stride(2) == out.stride(1) == 1, (x.stride(), a.stride(), b.stride())
    if rows == 0 or rank == 0 or len(a) == 0 or out.numel() == 0:
        return
    padded, splits, tiles = (
        max(16, triton.next_power_of_2(rank)),
        triton.cdiv(features_in, PART),
        triton.cdiv(rows, ROWS),
    )
    parts = torch.empty(splits, rows, padded, dtype=torch.float32, device=x.device)
    down_kernel[(tiles, splits)](
        x, a, adapters, parts, rows, x.stride(0), a.stride(0), a.stride(1), features_in, rank=rank,
        ROWS=ROWS, RANK=padded, FEATURES_IN=FEATURES_IN, PART=PART,
    )  # fmt: skip
    up_kernel[(tiles, triton.cdiv(features_out, FEATURES_OUT))](
        parts, b, adapters, scale, out, rows, splits, b.stride(0), b.stride(1), out.stride(0), features_out, rank=rank,
        ROWS=ROWS, RANK=padded, FEATURES_OUT=FEATURES_OUT,
    )  # fmt: skip
