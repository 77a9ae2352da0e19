"""Drawing a token from each row as `relevo.kernels.sampling` defines it, in whole numbers, without a sort and without a
word from the device: three launches, and two more where a row has top_k or top_p.

    sum       chunks → largest logit and sum of exponentials; the largest of each group of GROUP ids
    list      chunks → the keys of tokens that top_k and top_p may keep; bounds that need no sort leave out most
    select    rows   → the lowest key that stays, by bisection over the list
    race      chunks → the winner among blocks of RACE_BLOCK ids
    finish    rows   → the winner of all, and the token that wins in it

Sums are of whole numbers and chunks depend on the vocabulary alone, so that a row's token does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels.triton.logprobs import exponentials
from relevo.kernels.triton.probabilities import scaled_logits
from relevo.kernels.triton.race import finish_kernel, race_kernel
from relevo.kernels.triton.selection import list_kernel, select_kernel

CHUNK = 4096  # ids of a program
GROUP = 512  # ids whose largest logit bounds the k-th largest of all from below
SPLITS = 64  # of a row, read at once by the program that merges them
READ = 1024  # of a list, at once
LISTED = 16384  # keys of a row; where there are more, select reads the row again instead


@triton.jit(do_not_specialize=["rows", "num_groups"])
def sum_kernel(
    logits,
    settings,
    largest,
    sums,
    groups,
    row_stride,
    rows,
    vocab,
    num_groups,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * CHUNK + tl.arange(0, CHUNK)
    values = scaled_logits(logits + row * row_stride, ids, vocab, tl.load(settings + row))
    chunk_largest, chunk_sum = exponentials(values)
    tl.store(largest + row * tl.num_programs(1) + split, chunk_largest)
    tl.store(sums + row * tl.num_programs(1) + split, chunk_sum)
    group = split * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    group_largest = tl.max(tl.reshape(values, [CHUNK // GROUP, GROUP]), axis=1)
    tl.store(groups + row * num_groups + group, group_largest, mask=group < num_groups)


def sample(
    logits: Tensor,
    temperature: Sequence[float],
    min_p: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    uniforms: Sequence[float],
) -> Tensor:
    """See `Kernels.sample`."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    (rows, vocab), device = logits.shape, logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return out
    settings = _on_device([temperature, min_p, top_k, top_p, uniforms], device)
    splits, num_groups = triton.cdiv(vocab, CHUNK), triton.cdiv(vocab, GROUP)
    largest = torch.empty(rows, splits, dtype=torch.float32, device=device)
    groups = torch.empty(rows, num_groups, dtype=torch.float32, device=device)
    row = (logits, settings, largest, torch.empty_like(largest))
    shape = (logits.stride(0), rows, vocab)
    sum_kernel[(rows, splits)](*row, groups, *shape, num_groups, CHUNK=CHUNK, GROUP=GROUP, num_warps=8)
    # each begins at a multiple of 16 bytes, so that one compilation serves any number of rows
    lowest, counts, weights = torch.zeros(3, rows + rows % 2, dtype=torch.int64, device=device)
    if any(k > 0 for k in top_k) or any(p < 1.0 for p in top_p):
        keys = torch.empty(rows, min(LISTED, vocab), dtype=torch.int64, device=device)
        listed = keys.shape[1]
        list_kernel[(rows, splits)](
            *row, groups, keys, counts, weights, *shape, num_groups, listed,
            CHUNK=CHUNK, SPLITS=SPLITS, num_warps=8,
        )  # fmt: skip
        select_kernel[(rows,)](
            *row, keys, counts, weights, lowest, *shape, splits, listed, BLOCK=READ, SPLITS=SPLITS, num_warps=8
        )
    times = torch.empty(rows, splits, dtype=torch.float64, device=device)
    winners = torch.empty(rows, splits, dtype=torch.int32, device=device)
    race_kernel[(rows, splits)](*row, lowest, times, winners, *shape, CHUNK=CHUNK, SPLITS=SPLITS, num_warps=8)
    finish_kernel[(rows,)](*row, lowest, times, winners, out, *shape, splits, SPLITS=SPLITS, num_warps=1)
    return out


def _on_device(columns: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """[columns, rows] float64, in one copy that nobody waits for."""
    values = torch.tensor(columns, dtype=torch.float64, pin_memory=device.type == "cuda")
    return values.to(device, non_blocking=True)
