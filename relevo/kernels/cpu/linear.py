"""Linear layers on the CPU: weights stay as they were loaded, unless oneDNN knows this CPU better."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from relevo.kernels import PreparedLinear, reference
from relevo.kernels.cpu import onednn
from relevo.kernels.cpu.dots import INT8, STEP
from relevo.kernels.cpu.gemm import CHUNK_MULTIPLE, PRODUCT, build_gemm, scratch_bytes
from relevo.kernels.cpu.jit import CFunction
from relevo.kernels.cpu.openmp import run_on_threads
from relevo.kernels.cpu.simd import ELEMENTS, FLOAT32, LANES

WEIGHT_ELEMENTS = {**ELEMENTS, torch.int8: INT8}
# What is multiplied and what is asked for ahead of that fit in a level-1 cache of 32 KiB.
MAX_K_BLOCK, MAX_K_BLOCK_FLOAT32 = 896, 448
MAX_ROW_BLOCK = 128
MAX_CHUNK_COLUMNS = 240
MAX_CHUNK_BYTES = 176 << 10  # of weights in a block of k, beside as much of x in a level-2 cache of 512 KiB
TASKS_PER_THREAD = 8  # so that a thread which lost its core for a while does not hold up the others
# Under so many multiplications for each, more threads cost more than they bring.
WORK_PER_THREAD = 1 << 17


class Linear:
    """Layers whose weights stay as they are; see `Kernels.prepare_linear`.

    A row of the result is the same, bit for bit, whatever the other rows and the number of threads. May be called by
    several Python threads at once.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], scales: Sequence[Tensor] | None
    ) -> None:
        # These also keep the memory alive whose addresses go into the segments.
        self._weights = [_dense_rows(weight.detach()) for weight in weights]
        self.in_features = self._weights[0].shape[1]
        self.out_features = sum(len(weight) for weight in self._weights)
        self.num_bytes = sum(weight.numel() * weight.element_size() for weight in self._weights)
        self._scales = _padded(scales or [torch.ones(len(weight)) for weight in weights])
        self._biases = _padded(
            [torch.zeros(len(weight)) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
        )
        self._segments = _segments(self._weights)
        self._addresses = self._segments.data_ptr(), self._scales.data_ptr(), self._biases.data_ptr()
        self._element = WEIGHT_ELEMENTS[self._weights[0].dtype]
        self._element_bytes = self._weights[0].element_size()
        self._gemm = _compiled(self._element)

    def __call__(self, x: Tensor) -> Tensor:
        rows, in_features = x.shape
        element = ELEMENTS.get(x.dtype)
        if in_features != self.in_features or element is None:
            raise ValueError(
                f"x is {in_features} {x.dtype} wide: it must be {self.in_features} of float32, bfloat16 or float16"
            )
        row_stride, last_stride = x.stride()
        if last_stride != 1:
            x = x.contiguous()
            row_stride = in_features
        output = torch.empty(rows, self.out_features, dtype=x.dtype)
        plan = _plan(
            rows, in_features, self.out_features, self._element == FLOAT32, self._element_bytes, torch.get_num_threads()
        )
        call = _calls.with_scratch(plan.workers * plan.scratch_bytes)
        PRODUCT.pack_into(
            call.product,
            0,
            0,
            0,
            x.data_ptr(),
            row_stride * x.element_size(),
            element,
            output.data_ptr(),
            *self._addresses,
            rows,
            in_features,
            self.out_features,
            plan.k_block,
            plan.row_block,
            plan.chunk_columns,
            call.scratch_address,
            plan.scratch_bytes,
        )
        if plan.workers == 1:
            self._gemm.call(call.address)
        else:
            run_on_threads(self._gemm.function.address, call.address, plan.workers)
        return output


def prepare_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], scales: Sequence[Tensor] | None = None
) -> PreparedLinear:
    """See `Kernels.prepare_linear`. Weights of other types than float32, bfloat16, float16 and int8 go to `reference`.

    Raises ValueError if the weights differ in type or in_features.
    """
    kinds = {(weight.dtype, weight.shape[1]) for weight in weights}
    if len(kinds) != 1:
        raise ValueError(f"layers to be joined have one type and in_features, not {sorted(map(str, kinds))}")
    dtype = weights[0].dtype
    if dtype not in WEIGHT_ELEMENTS:
        return reference.prepare_linear(weights, biases, scales)
    can_pack = scales is None and onednn.is_available()
    if can_pack and onednn.is_faster(dtype, torch.cpu.get_capabilities(), onednn.supports_bfloat16()):
        return onednn.PackedLinear(weights, biases)
    return Linear(weights, biases, scales)


class _Plan(NamedTuple):
    """How a product is cut; see `gemm`."""

    k_block: int
    row_block: int
    chunk_columns: int
    workers: int
    scratch_bytes: int


@lru_cache(maxsize=4096)
def _plan(rows: int, in_features: int, out_features: int, float32: bool, element_bytes: int, threads: int) -> _Plan:
    k_blocks = max(1, -(-in_features // (MAX_K_BLOCK_FLOAT32 if float32 else MAX_K_BLOCK)))
    k_block = max(STEP, _up(-(-in_features // k_blocks), STEP))
    row_blocks = max(1, -(-rows // MAX_ROW_BLOCK))
    row_block = max(1, -(-rows // row_blocks))
    workers = max(1, min(threads, rows * in_features * out_features // WORK_PER_THREAD))
    most_columns = min(MAX_CHUNK_BYTES // (k_block * element_bytes), MAX_CHUNK_COLUMNS) // CHUNK_MULTIPLE
    columns = -(-out_features * row_blocks // (workers * TASKS_PER_THREAD)) if workers > 1 else out_features
    chunk_columns = min(_up(max(columns, 1), CHUNK_MULTIPLE), max(most_columns, 1) * CHUNK_MULTIPLE)
    return _Plan(
        k_block, row_block, chunk_columns, workers, scratch_bytes(row_block, chunk_columns, in_features, k_block)
    )


class _Calls(threading.local):
    """Each Python thread's own memory for its product in progress; grows to what the largest one needed."""

    def __init__(self) -> None:
        self.product = bytearray(PRODUCT.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.product))
        self._capacity = -1

    def with_scratch(self, num_bytes: int) -> _Calls:
        if self._capacity < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
            self._capacity, self.scratch_address = num_bytes, self._scratch.data_ptr()
        return self


_calls = _Calls()


class _Compiled(NamedTuple):
    """A worker for one type of weights, to run on threads or to call here and now; both release the GIL."""

    function: CFunction
    call: Callable[[int], None]


@cache
def _compiled(element: int) -> _Compiled:
    function = build_gemm(element)
    return _Compiled(function, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address))


def _segments(weights: Sequence[Tensor]) -> Tensor:
    """[len(weights), 3] int64, each a `gemm.Segment`."""
    segments, end = [], 0
    for weight in weights:
        end += len(weight)
        segments.append((end, weight.data_ptr(), weight.stride(0) * weight.element_size()))
    return torch.tensor(segments, dtype=torch.int64)


def _dense_rows(weight: Tensor) -> Tensor:
    """The weight itself, or a copy whose rows are contiguous."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """One float32 tensor, readable to a whole vector's end."""
    return torch.cat([*(part.detach().float() for part in parts), torch.zeros(LANES)])


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
