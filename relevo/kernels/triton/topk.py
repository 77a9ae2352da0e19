"""The largest of each row. A row is split over many programs: a decode batch may be one row, a GPU has 132 cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels.triton.keys import NOTHING, id_of, pack

CHUNK = 4096  # ids of a program
SPLITS = 64  # of a row, read at once by the program that merges them
TOP_K_CHUNK = 1024
MOST_KEPT = 32  # of a chunk, one by one; beyond, all of it is


@triton.jit
def largest_kernel(logits, keys, row_stride, vocab, CHUNK: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=0.0)
    largest = tl.max(tl.where(ids < vocab, pack(values, ids), NOTHING), axis=0)
    tl.store(keys + row * tl.num_programs(1) + split, largest)


@triton.jit(do_not_specialize=["splits"])
def merge_largest_kernel(keys, out, splits, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([SPLITS], NOTHING, tl.int64)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        largest = tl.maximum(largest, tl.load(keys + row * splits + split, mask=split < splits, other=NOTHING))
    tl.store(out + row, id_of(tl.max(largest, axis=0)))


@triton.jit
def top_keys_kernel(logits, keys, row_stride, vocab, CHUNK: tl.constexpr, KEPT: tl.constexpr):
    """Each chunk's KEPT largest keys, or all of them."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=0.0)
    found = tl.where(ids < vocab, pack(values, ids), NOTHING)
    keys += (row * tl.num_programs(1) + split) * KEPT
    if KEPT == CHUNK:
        tl.store(keys + tl.arange(0, CHUNK), found)
    else:
        for place in range(KEPT):
            largest = tl.max(found, axis=0)
            tl.store(keys + place, largest)
            found = tl.where(found == largest, NOTHING, found)


def argmax(logits: Tensor) -> Tensor:
    """See `Kernels.argmax`."""
    rows, vocab = _shape(logits)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        splits = triton.cdiv(vocab, CHUNK)
        keys = torch.empty(rows, splits, dtype=torch.int64, device=logits.device)
        largest_kernel[(rows, splits)](logits, keys, logits.stride(0), vocab, CHUNK=CHUNK, num_warps=8)
        merge_largest_kernel[(rows,)](keys, out, splits, SPLITS=SPLITS, num_warps=1)
    return out


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Kernels.top_k`."""
    rows, vocab = _shape(logits)
    splits = triton.cdiv(vocab, TOP_K_CHUNK)
    kept = triton.next_power_of_2(max(k, 1)) if k <= MOST_KEPT else TOP_K_CHUNK
    keys = torch.empty(rows, splits * kept, dtype=torch.int64, device=logits.device)
    if keys.numel():
        top_keys_kernel[(rows, splits)](logits, keys, logits.stride(0), vocab, CHUNK=TOP_K_CHUNK, KEPT=kept)
    # Keys are all different, so that torch's choice among equals does not matter.
    ids = 0x7FFFFFFF - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def _shape(logits: Tensor) -> tuple[int, int]:
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    return logits.shape[0], logits.shape[1]
