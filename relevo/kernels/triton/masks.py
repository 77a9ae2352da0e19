"""What a grammar excludes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 64  # of a program, 32 ids each


@triton.jit(do_not_specialize=["mask_stride"])
def mask_logits_kernel(logits, rows, masks, row_stride, mask_stride, vocab, WORDS: tl.constexpr):
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bits = tl.load(masks + mask * mask_stride + word, mask=word * 32 < vocab, other=0)
    bit = tl.arange(0, 32)[None, :]
    ids = word[:, None] * 32 + bit
    excluded = ((bits[:, None] >> bit) & 1) == 0
    tl.store(logits + row * row_stride + ids, float("-inf"), mask=excluded & (ids < vocab))


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """See `Kernels.mask_logits`."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert rows.dtype == torch.int64 and masks.dtype == torch.int32, (rows.dtype, masks.dtype)
    assert rows.is_contiguous() and masks.stride(1) == 1, (rows.stride(), masks.stride())
    vocab = logits.shape[1]
    if len(rows):
        grid = (len(rows), triton.cdiv(vocab, 32 * WORDS))
        mask_logits_kernel[grid](logits, rows, masks, logits.stride(0), masks.stride(0), vocab, WORDS=WORDS)
