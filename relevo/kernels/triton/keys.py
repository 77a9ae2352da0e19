"""Logits as whole numbers: one comparison orders by value and, of equals, by id."""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))  # below every key
NAN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def pack(values, ids):
    """int64 keys: the larger value has the larger key, NaN counts as the largest, of equals the lowest id wins."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    order = tl.where(values != values, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def id_of(keys):
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF)
