"""Blocks between the cache and staging memory: many by one launch, in words as wide as their size allows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # words of a program


@triton.jit
def copy_blocks_kernel(
    source,
    target,
    block_ids,
    source_stride,
    target_stride,
    words,
    num_blocks,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i of one side is row block_ids[i] of the other; an id outside the cache moves nothing."""
    row = tl.program_id(0).to(tl.int64)
    block_id = tl.load(block_ids + row).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (word < words) & (block_id >= 0) & (block_id < num_blocks)
    if GATHER:
        source += block_id * source_stride
        target += row * target_stride
    else:
        source += row * source_stride
        target += block_id * target_stride
    tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)


def gather_blocks(storage: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """See `Kernels.gather_blocks`. An id outside the cache leaves its row as it is."""
    _copy(storage, out, block_ids, len(storage), gather=True)


def scatter_blocks(source: Tensor, block_ids: Tensor, storage: Tensor) -> None:
    """See `Kernels.scatter_blocks`. An id outside the cache is left out."""
    _copy(source, storage, block_ids, len(storage), gather=False)


def _copy(source: Tensor, target: Tensor, block_ids: Tensor, num_blocks: int, *, gather: bool) -> None:
    assert source.dtype == target.dtype == torch.uint8, (source.dtype, target.dtype)
    assert source.shape[1] == target.shape[1], (source.shape, target.shape)
    assert len(block_ids) == len(target if gather else source), (block_ids.shape, source.shape, target.shape)
    assert block_ids.is_contiguous(), block_ids.stride()
    source, target = _as_words(source, target)
    words = source.shape[1]
    if len(block_ids) and words:
        grid = (len(block_ids), triton.cdiv(words, BLOCK))
        copy_blocks_kernel[grid](
            source, target, block_ids, source.stride(0), target.stride(0), words, num_blocks, GATHER=gather, BLOCK=BLOCK
        )


def _as_words(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the widest integers that their sizes, strides and addresses allow."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        divisible = source.shape[1] % dtype.itemsize == 0
        for side in (source, target):
            divisible = divisible and side.stride(0) % dtype.itemsize == 0 and side.stride(1) == 1
            divisible = divisible and side.data_ptr() % dtype.itemsize == 0
            divisible = divisible and side.storage_offset() % dtype.itemsize == 0
        if divisible:
            return source.view(dtype), target.view(dtype)
    return source, target
