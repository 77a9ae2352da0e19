"""Penalties for tokens that a row's text holds already."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # tokens of a program


@triton.jit(do_not_specialize=["tokens"])
def apply_penalties_kernel(logits, rows, token_ids, counts, penalties, row_stride, tokens, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    row = tl.load(rows + token, mask=inside, other=0)
    place = logits + row * row_stride + tl.load(token_ids + token, mask=inside, other=0)
    count = tl.load(counts + token, mask=inside, other=0)
    repetition = tl.load(penalties + 3 * row)
    frequency = tl.load(penalties + 3 * row + 1)
    presence = tl.load(penalties + 3 * row + 2)
    value = tl.load(place, mask=inside, other=0.0)
    value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    value -= frequency * count.to(tl.float32)
    value -= tl.where(count > 0, presence, 0.0)
    tl.store(place, value, mask=inside)


def apply_penalties(logits: Tensor, rows: Tensor, token_ids: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """See `Kernels.apply_penalties`."""
    assert logits.dtype == penalties.dtype == torch.float32, (logits.dtype, penalties.dtype)
    assert logits.stride(1) == 1 and penalties.is_contiguous(), (logits.stride(), penalties.stride())
    assert all(x.is_contiguous() for x in (rows, token_ids, counts)), (rows.stride(), token_ids.stride())
    tokens = len(token_ids)
    if tokens:
        apply_penalties_kernel[(triton.cdiv(tokens, BLOCK),)](
            logits, rows, token_ids, counts, penalties, logits.stride(0), tokens, BLOCK=BLOCK
        )
