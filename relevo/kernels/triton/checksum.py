"""xxh3-64 of blocks of the cache, where they lie (`relevo/kernels/xxh3.py` has the algorithm's constants).

What a stripe adds to the lanes does not depend on them. So all pieces of 1 KiB are summed up at once by one kernel; the
other goes from piece to piece through the sums, a sixteenth of the bytes, and scrambles. The host does the rest.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels.xxh3 import (
    LAST_SECRET,
    MIN_BYTES,
    P64_1,
    PIECE_BYTES,
    SCRAMBLING_SECRET,
    SECRET,
    START,
    STRIPE_BYTES,
    finish,
)

PIECES = 8  # of a program
AHEAD = 8  # pieces whose sums are loaded before the first is used

# Words in the table of constants: the secret's part that stripes shift over, the last stripe's, the lanes' start.
_LAST = SCRAMBLING_SECRET // 8 + 8
_START = _LAST + 8

# Bytes → hash of the words i × P64_1, by the xxhash package.
_KNOWN = {1024: 0xA4420C058591140D, 5 * 1024 + 104: 0xF5BA9AFDEE79F790}


def can_hash(block_bytes: int) -> bool:
    return block_bytes >= MIN_BYTES and block_bytes % 8 == 0


def hash_lanes(storage: Tensor, block_ids: Tensor) -> Tensor:
    """The lanes that `finish` makes hashes of, [n, 8] int64.

    storage:   [num_blocks, block_bytes] uint8, contiguous; can_hash(block_bytes)
    block_ids: [n] int64, on storage's device

    Enqueues on the current stream and does not wait.
    """
    num_blocks, num_bytes = len(block_ids), storage.shape[1]
    assert can_hash(num_bytes) and storage.is_contiguous(), (storage.shape, storage.stride())
    words, constants = storage.view(torch.int64), _constants(storage.device)
    num_pieces = (num_bytes - 1) // PIECE_BYTES  # that are scrambled after; one more has the stripes behind them
    sums = torch.empty(num_blocks, num_pieces + 1, 8, dtype=torch.int64, device=storage.device)
    lanes = torch.empty(num_blocks, 8, dtype=torch.int64, device=storage.device)
    if num_blocks:
        grid = (num_blocks, triton.cdiv(num_pieces + 1, PIECES))
        num_stripes = (num_bytes - 1) // STRIPE_BYTES
        sum_stripes_kernel[grid](
            words, block_ids, constants, sums, words.shape[1], num_stripes, num_pieces + 1, PIECES=PIECES
        )
        scramble_kernel[(num_blocks,)](
            words, block_ids, constants, sums, lanes, words.shape[1], num_pieces,
            SCRAMBLING=SCRAMBLING_SECRET // 8, LAST=_LAST, START=_START, AHEAD=AHEAD, num_warps=1,
        )  # fmt: skip
    return lanes


def check(device: torch.device) -> bool:
    """Compile, and see that it computes what is known."""
    for num_bytes, known in _KNOWN.items():
        pattern = torch.arange(2 * num_bytes // 8, dtype=torch.int64, device=device) * (P64_1 - (1 << 64))
        storage = pattern.view(torch.uint8).view(2, num_bytes)
        lanes = hash_lanes(storage, torch.tensor([1, 0, 1], device=device)).tolist()
        if [finish(each, num_bytes) for each in lanes][1:] != [known, finish(lanes[0], num_bytes)]:
            return False
    return True


@cache
def _constants(device: torch.device) -> Tensor:
    """[SCRAMBLING_SECRET // 8 + 24] int64"""
    shifted, last = SECRET.view(np.int64), SECRET[LAST_SECRET : LAST_SECRET + STRIPE_BYTES].copy().view(np.int64)
    return torch.from_numpy(np.concatenate((shifted, last, START.view(np.int64)))).to(device)


@triton.jit
def _product(key):
    """Of the low half and the high half."""
    return (key & 0xFFFFFFFF) * ((key >> 32) & 0xFFFFFFFF)


@triton.jit
def sum_stripes_kernel(words, block_ids, constants, sums, block_words, num_stripes, num_pieces, PIECES: tl.constexpr):
    """What the stripes of each piece add to the lanes: sums [n, num_pieces, 8]."""
    row = tl.program_id(0).to(tl.int64)
    words += tl.load(block_ids + row) * block_words
    piece = tl.program_id(1) * PIECES + tl.arange(0, PIECES)
    stripe, lane = tl.arange(0, 16)[None, :, None], tl.arange(0, 8)[None, None, :]
    number = piece[:, None, None] * 16 + stripe
    inside = (number < num_stripes) & (lane >= 0)
    value = tl.load(words + number * 8 + lane, mask=inside, other=0)
    neighbour = tl.load(words + number * 8 + (lane ^ 1), mask=inside, other=0)
    added = neighbour + _product(value ^ tl.load(constants + stripe + lane))
    out = sums + (row * num_pieces + piece[:, None]) * 8 + tl.arange(0, 8)[None, :]
    tl.store(out, tl.sum(tl.where(inside, added, 0), axis=1), mask=piece[:, None] < num_pieces)


@triton.jit
def scramble_kernel(
    words,
    block_ids,
    constants,
    sums,
    lanes,
    block_words,
    num_pieces,
    SCRAMBLING: tl.constexpr,
    LAST: tl.constexpr,
    START: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One block: its num_pieces pieces, one after the other, then the stripes behind them and the last 64 bytes."""
    row = tl.program_id(0).to(tl.int64)
    words += tl.load(block_ids + row) * block_words + block_words - 8
    sums += row * (num_pieces + 1) * 8
    lane = tl.arange(0, 8)
    secret = tl.load(constants + SCRAMBLING + lane)
    acc = tl.load(constants + START + lane)
    for first in range(0, num_pieces, AHEAD):
        for step in tl.static_range(AHEAD):
            inside = (first + step < num_pieces) & (lane >= 0)
            mixed = acc + tl.load(sums + (first + step) * 8 + lane, mask=inside, other=0)
            mixed = (mixed ^ ((mixed >> 47) & 0x1FFFF) ^ secret) * 0x9E3779B1
            acc = tl.where(inside, mixed, acc)
    acc += tl.load(sums + num_pieces * 8 + lane)
    acc += tl.load(words + (lane ^ 1)) + _product(tl.load(words + lane) ^ tl.load(constants + LAST + lane))
    tl.store(lanes + row * 8 + lane, acc)
