"""Linear layers on a GPU: dense ones by torch (cuBLAS); int8 weights are read once, as int8, and widened on the way.

A decode step's few rows are bound by reading the weights: the features are split over programs until there are enough
of them for a GPU, and what they find is added up in order by a second launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import PreparedLinear, reference
from relevo.kernels.triton.launch import FLOATS

PROGRAMS = 264  # enough for a GPU of 132 cores
FEW_ROWS = 16


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(
    x, weight, scale, bias, out, rows, x_stride, weight_stride, in_features, out_features, part,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """A tile of outputs over [split * part, (split + 1) * part) of the inputs.

    PARTIAL: out is [splits, rows, out_features] float32, without scale and bias.
    """
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    known_rows, known_columns = row < rows, column < out_features
    x += row.to(tl.int64)[:, None] * x_stride
    weight += column.to(tl.int64)[None, :] * weight_stride
    result = tl.zeros([ROWS, OUT], tl.float32)
    end = tl.minimum((split + 1) * part, in_features)
    for first in range(split * part, end, IN):
        feature = first + tl.arange(0, IN)
        values = tl.load(x + feature[None, :], mask=known_rows[:, None] & (feature < end)[None, :], other=0.0)
        weights = tl.load(weight + feature[:, None], mask=(feature < end)[:, None] & known_columns[None, :], other=0)
        result = tl.dot(values, weights.to(x.dtype.element_ty), result, input_precision="ieee")
    place = row.to(tl.int64)[:, None] * out_features + column[None, :]
    inside = known_rows[:, None] & known_columns[None, :]
    if PARTIAL:
        tl.store(out + split.to(tl.int64) * rows * out_features + place, result, mask=inside)
    else:
        result *= tl.load(scale + column, mask=known_columns, other=0.0)[None, :]
        if HAS_BIAS:
            result += tl.load(bias + column, mask=known_columns, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def add_parts_kernel(parts, scale, bias, out, rows, splits, out_features, HAS_BIAS: tl.constexpr, OUT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * OUT + tl.arange(0, OUT)
    inside = column < out_features
    total = tl.zeros([OUT], tl.float32)
    for split in range(splits):
        total += tl.load(parts + (split * rows + row) * out_features + column, mask=inside, other=0.0)
    total *= tl.load(scale + column, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_features + column, total.to(out.dtype.element_ty), mask=inside)


class Int8Linear:
    """Weights of 8 bits with one scale a row; see `Kernels.prepare_linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.numel()
        self._weight = weight.contiguous()
        self._bias = bias
        self._scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in FLOATS:
            return reference.Linear(self._weight, self._bias, self._scale)(x)
        if x.shape[1] != self.in_features:
            raise ValueError(f"x has {x.shape[1]} features instead of {self.in_features}")
        assert x.stride(1) == 1, x.stride()
        out = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        if out.numel():
            self._multiply(x, out)
        return out

    def _multiply(self, x: Tensor, out: Tensor) -> None:
        rows, few = len(x), len(x) <= FEW_ROWS
        at_once, columns, features, warps = (FEW_ROWS, 32, 256, 4) if few else (64 if rows <= 64 else 128, 128, 64, 8)
        if x.dtype == torch.float32:
            at_once, columns, features = min(at_once, 32), 32, 64
        tiles = triton.cdiv(self.out_features, columns)
        splits = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(self.in_features, 2 * features)) if few else 1
        part = triton.cdiv(triton.cdiv(self.in_features, splits), features) * features
        splits = triton.cdiv(self.in_features, part)
        shape = (rows, self.out_features)
        target = torch.empty(splits, *shape, dtype=torch.float32, device=x.device) if splits > 1 else out
        has_bias = self._bias is not None
        bias = self._scale if self._bias is None else self._bias
        int8_kernel[(tiles, triton.cdiv(rows, at_once), splits)](
            x, self._weight, self._scale, bias, target, rows, x.stride(0), self.in_features,
            self.in_features, self.out_features, part, HAS_BIAS=has_bias, PARTIAL=splits > 1,
            ROWS=at_once, OUT=columns, IN=features, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            add_parts_kernel[(rows, triton.cdiv(self.out_features, 256))](
                target, self._scale, bias, out, rows, splits, self.out_features, HAS_BIAS=has_bias, OUT=256, num_warps=2
            )


def prepare_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], scales: Sequence[Tensor] | None = None
) -> PreparedLinear:
    """See `Kernels.prepare_linear`."""
    if scales is None or weights[0].dtype != torch.int8:
        return reference.prepare_linear(weights, biases, scales)
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return Int8Linear(weight, reference.joined_biases(weights, biases), torch.cat(list(scales)))
