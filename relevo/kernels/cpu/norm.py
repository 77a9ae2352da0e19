"""RMSNorm, with or without the addition of a residual before it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.cpu.calls import Call
from relevo.kernels.cpu.elements import (
    element_size,
    load_elements,
    load_part,
    store_elements,
    store_part,
    sum_of_lanes,
)
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.simd import ELEMENTS, LANES, add, fetch_add, float_of, fma, multiply, record, splat


class Arguments(NamedTuple):
    """Rows of x are counted through two dimensions; strides in bytes. The outputs are contiguous."""

    counter: int
    workers: int
    chunk: int
    rows: int
    x: int
    outer_stride: int
    inner_stride: int
    inner_rows: int
    residual: int  # 0: none; else contiguous, as x is then
    total: int
    weight: int
    output: int
    dim: int
    element: int
    weight_element: int
    eps: float
    weight_offset: float


_load, _ = record(Arguments)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """See `Kernels.rms_norm`."""
    element, weight_element = ELEMENTS.get(x.dtype), ELEMENTS.get(weight.dtype)
    if element is None or weight_element is None:
        return reference.rms_norm(x, weight, eps, weight_offset)
    dim, size = weight.numel(), x.element_size()
    inner_rows, outer_stride, inner_stride = 1, dim * size, 0
    if x.is_contiguous():
        assert x.shape[-1] == dim, (x.shape, dim)
        output = torch.empty_like(x)
    else:
        shape, strides = x.shape, x.stride()
        assert shape[-1] == dim and strides[-1] == 1 and len(shape) <= 3, (shape, strides, dim)
        outer_stride = strides[0] * size if len(shape) > 1 else 0
        if len(shape) == 3:
            inner_rows, inner_stride = shape[1], strides[1] * size
        output = x.new_empty(shape)
    _norm.run(
        output.numel() // dim,
        dim,
        x.data_ptr(),
        outer_stride,
        inner_stride,
        inner_rows,
        0,
        0,
        weight.data_ptr(),
        output.data_ptr(),
        dim,
        element,
        weight_element,
        eps,
        weight_offset,
    )
    return output


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_rms_norm`."""
    element, weight_element = ELEMENTS.get(x.dtype), ELEMENTS.get(weight.dtype)
    if element is None or weight_element is None:
        return reference.add_rms_norm(x, residual, weight, eps, weight_offset)
    dim = weight.numel()
    assert x.shape == residual.shape and x.shape[-1] == dim, (x.shape, residual.shape, dim)
    assert residual.dtype == x.dtype, (x.dtype, residual.dtype)
    assert x.is_contiguous() and residual.is_contiguous(), (x.stride(), residual.stride())
    output, total = torch.empty_like(x), torch.empty_like(x)
    _norm.run(
        output.numel() // dim,
        dim,
        x.data_ptr(),
        dim * x.element_size(),
        0,
        1,
        residual.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        dim,
        element,
        weight_element,
        eps,
        weight_offset,
    )
    return output, total


def _build() -> CFunction:
    digest = sources_digest()

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        arguments = _load(address)
        while True:
            first = fetch_add(address, 1) * arguments.chunk
            if first >= arguments.rows:
                break
            for row in range(first, min(first + arguments.chunk, arguments.rows)):
                _norm_row(arguments, row)

    return callback(work)


_norm = Call(_build, Arguments, floats=2)
compile = _norm.compile


@jit
def _norm_row(arguments: Arguments, row: int) -> None:
    dim, element = arguments.dim, arguments.element
    line = dim * element_size(element)
    x = arguments.x + row // arguments.inner_rows * arguments.outer_stride
    x += row % arguments.inner_rows * arguments.inner_stride
    if arguments.residual != 0:
        total = arguments.total + row * line
        _add_row(total, x, arguments.residual + row * line, dim, element)
        x = total
    factor = 1.0 / math.sqrt(_sum_of_squares(x, dim, element) / dim + float_of(arguments.eps))
    _scale_row(arguments, arguments.output + row * line, x, factor)


@jit
def _add_row(total: int, x: int, residual: int, dim: int, element: int) -> None:
    whole = dim - dim % LANES
    for i in range(0, whole, LANES):
        store_elements(total, i, add(load_elements(x, i, element), load_elements(residual, i, element)), element)
    if whole < dim:
        rest = dim - whole
        added = add(load_part(x, whole, rest, element), load_part(residual, whole, rest, element))
        store_part(total, whole, added, rest, element)


@jit
def _sum_of_squares(x: int, dim: int, element: int) -> float:
    """In four running sums, so that each addition need not wait for the one before."""
    s0 = s1 = s2 = s3 = splat(0.0)
    unrolled, whole = dim - dim % (4 * LANES), dim - dim % LANES
    for i in range(0, unrolled, 4 * LANES):
        x0, x1 = load_elements(x, i, element), load_elements(x, i + LANES, element)
        x2, x3 = load_elements(x, i + 2 * LANES, element), load_elements(x, i + 3 * LANES, element)
        s0, s1, s2, s3 = fma(x0, x0, s0), fma(x1, x1, s1), fma(x2, x2, s2), fma(x3, x3, s3)
    for i in range(unrolled, whole, LANES):
        x0 = load_elements(x, i, element)
        s0 = fma(x0, x0, s0)
    if whole < dim:
        x0 = load_part(x, whole, dim - whole, element)
        s1 = fma(x0, x0, s1)
    return sum_of_lanes(add(add(s0, s1), add(s2, s3)))


@jit
def _scale_row(arguments: Arguments, output: int, x: int, factor: float) -> None:
    dim, element = arguments.dim, arguments.element
    weight, weight_element = arguments.weight, arguments.weight_element
    offset, scale = splat(float_of(arguments.weight_offset)), splat(factor)
    whole = dim - dim % LANES
    for i in range(0, whole, LANES):
        w = add(load_elements(weight, i, weight_element), offset)
        store_elements(output, i, multiply(multiply(load_elements(x, i, element), scale), w), element)
    if whole < dim:
        rest = dim - whole
        w = add(load_part(weight, whole, rest, weight_element), offset)
        store_part(output, whole, multiply(multiply(load_part(x, whole, rest, element), scale), w), rest, element)
