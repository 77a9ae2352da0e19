"""Log-probabilities and ranks of a few tokens: two readings of a row's logits, nothing of its size written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # ids of a program
SPLITS = 64  # of a row, read at once by the program that merges them


@triton.jit
def exponentials(values):
    """(largest, sum of exp(value - largest)) of one chunk; -inf counts as nothing, also where all are -inf."""
    largest = tl.max(values, axis=0)
    above = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(values - above), axis=0)


@triton.jit
def merged_exponentials(largest, sums, row, splits, SPLITS: tl.constexpr):
    """The same of a whole row, of what its chunks found: [rows, splits] each."""
    top = tl.full([SPLITS], float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        top = tl.maximum(top, tl.load(largest + row * splits + split, mask=split < splits, other=float("-inf")))
    row_largest = tl.max(top, axis=0)
    above = tl.where(row_largest == float("-inf"), 0.0, row_largest)
    total = tl.zeros([SPLITS], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = split < splits
        part = tl.load(largest + row * splits + split, mask=inside, other=float("-inf"))
        total += tl.load(sums + row * splits + split, mask=inside, other=0.0) * tl.exp(part - above)
    return row_largest, tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["token_stride"])
def score_kernel(logits, token_ids, largest, sums, likelier, row_stride, token_stride, vocab, CHUNK: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * row_stride
    ids = split * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
    chunk_largest, chunk_sum = exponentials(values)
    chosen = tl.load(logits + tl.load(token_ids + row * token_stride))
    place = row * tl.num_programs(1) + split
    tl.store(largest + place, chunk_largest)
    tl.store(sums + place, chunk_sum)
    tl.store(likelier + place, tl.sum((values > chosen).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["token_stride", "splits", "tokens"])
def merge_scores_kernel(
    logits, token_ids, largest, sums, likelier, logprobs, ranks,
    row_stride, token_stride, splits, tokens, SPLITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_largest, total = merged_exponentials(largest, sums, row, splits, SPLITS)
    log_total = tl.log(total)
    counts = tl.zeros([SPLITS], tl.int64)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        counts += tl.load(likelier + row * splits + split, mask=split < splits, other=0).to(tl.int64)
    tl.store(ranks + row, tl.sum(counts, axis=0))
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        ids = tl.load(token_ids + row * token_stride + token, mask=token < tokens, other=0)
        values = tl.load(logits + row * row_stride + ids)
        tl.store(logprobs + row * tokens + token, values - row_largest - log_total, mask=token < tokens)


def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.score`."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert token_ids.dtype == torch.int64 and token_ids.stride(1) == 1, (token_ids.dtype, token_ids.stride())
    (rows, vocab), tokens = logits.shape, token_ids.shape[1]
    splits = triton.cdiv(vocab, CHUNK)
    logprobs = torch.empty(rows, tokens, dtype=torch.float32, device=logits.device)
    likelier = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return logprobs, likelier
    largest = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(largest)
    counts = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    strides = (logits.stride(0), token_ids.stride(0))
    score_kernel[(rows, splits)](logits, token_ids, largest, sums, counts, *strides, vocab, CHUNK=CHUNK, num_warps=8)
    merge_scores_kernel[(rows,)](
        logits, token_ids, largest, sums, counts, logprobs, likelier, *strides, splits, tokens,
        SPLITS=SPLITS, TOKENS=32, num_warps=1,
    )  # fmt: skip
    return logprobs, likelier
