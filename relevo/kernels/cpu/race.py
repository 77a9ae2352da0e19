"""The draw of `relevo.kernels.sampling.draw` in compiled code: a race of blocks, then of the tokens in the winner."""

from __future__ import annotations

import math

import numpy as np

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.keys import BLOCK
from relevo.kernels.cpu.simd import load_double, load_float
from relevo.kernels.cpu.weights import weight_of
from relevo.kernels.sampling import FIRST_TOKEN, GOLDEN_GAMMA, MIX_1, MIX_2, RACE_BLOCK

assert BLOCK == RACE_BLOCK  # sums that other kernels make of blocks are raced with

_GAMMA, _FIRST_MIX, _SECOND_MIX = np.uint64(GOLDEN_GAMMA), np.uint64(MIX_1), np.uint64(MIX_2)
_SHIFT_11, _SHIFT_27, _SHIFT_30, _SHIFT_31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)


@jit
def race(row: int, sums: int, blocks: int, lowest: float, key: int) -> int:
    """The token that is drawn.

    row: probabilities, float32, padded to whole blocks; those under `lowest` take no part
    sums: of each block's weights, float64; not all 0
    key: the row's random number, in units of 2**-53
    """
    block, first = 0, math.inf
    for at in range(blocks):
        weight = load_double(sums + 8 * at)
        if weight > 0.0:
            time = _waiting_time(key, at) / weight
            if time < first:
                block, first = at, time
    token, first = 0, math.inf
    for at in range(BLOCK * block, BLOCK * (block + 1)):
        p = load_float(row + 4 * at)
        if p >= lowest:
            weight = weight_of(p)
            if weight > 0.0:
                time = _waiting_time(key, FIRST_TOKEN + at) / weight
                if time < first:
                    token, first = at, time
    return token


@jit
def _waiting_time(key: int, runner: int) -> float:
    """See `relevo.kernels.sampling.waiting_times`."""
    state = (np.uint64(key) << _SHIFT_11) + np.uint64(runner + 1) * _GAMMA
    state = (state ^ (state >> _SHIFT_30)) * _FIRST_MIX
    state = (state ^ (state >> _SHIFT_27)) * _SECOND_MIX
    state = state ^ (state >> _SHIFT_31)
    return -math.log((np.float64(state >> _SHIFT_11) + 0.5) * 2.0**-53)
