"""Where each thread keeps what it works on: addresses inside one float32 array per thread."""

from __future__ import annotations

from typing import NamedTuple

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.records import Problem
from relevo.kernels.cpu.tile import MAX_PANEL, TILE_KEYS

MAX_ROWS = 128  # query rows (tokens × query heads of one kv head) that share one reading of the keys


class Result(NamedTuple):
    """Attention of up to `max_rows` rows over some keys; output is not yet divided by the sums."""

    output: int  # [max_rows, v_pad]
    maxima: int  # [max_rows]
    sums: int  # [max_rows]


class Buffers(NamedTuple):
    """Addresses of float32 arrays, for `tile`'s functions."""

    queries: int  # panels, each [8, k_pad] or [k_pad, 16]
    keys: int  # [TILE_KEYS, k_pad]
    values: int  # [TILE_KEYS, v_pad]
    logits: int  # [TILE_KEYS, panel]
    decay: int  # [panel]
    ahead: int  # [TILE_KEYS, 2] int64, where the next tile's keys and values lie
    line: int  # [max(k_pad, v_pad)], one row on its way in or out
    result: Result


@jit
def tokens_per_item(problem: Problem) -> int:
    """How many tokens of one sequence an item holds at most."""
    return max(1, MAX_ROWS // (problem.heads // problem.kv_heads))


@jit
def padded(size: int) -> int:
    """Rounded up to whole panels, which are also whole cache lines."""
    return (size + MAX_PANEL - 1) // MAX_PANEL * MAX_PANEL


@jit
def max_rows(problem: Problem) -> int:
    """The most rows an item has, rounded up."""
    return padded(tokens_per_item(problem) * (problem.heads // problem.kv_heads))


@jit
def result_floats(problem: Problem) -> int:
    """How many float32 a Result takes."""
    return max_rows(problem) * (padded(problem.v_dim) + 2)


@jit
def scratch_floats(problem: Problem) -> int:
    """How many float32 the Buffers of one thread take."""
    k_pad, v_pad = padded(problem.k_dim), padded(problem.v_dim)
    tile = TILE_KEYS * (k_pad + v_pad + MAX_PANEL + 4)
    return max_rows(problem) * k_pad + tile + MAX_PANEL + max(k_pad, v_pad) + result_floats(problem)


@jit
def result_at(problem: Problem, address: int) -> Result:
    """A Result that begins at this address."""
    rows = max_rows(problem)
    maxima = address + 4 * rows * padded(problem.v_dim)
    return Result(address, maxima, maxima + 4 * rows)


@jit
def buffers_at(problem: Problem, address: int) -> Buffers:
    """Buffers that begin at this address."""
    k_pad, v_pad = padded(problem.k_dim), padded(problem.v_dim)
    keys = address + 4 * max_rows(problem) * k_pad
    values = keys + 4 * TILE_KEYS * k_pad
    logits = values + 4 * TILE_KEYS * v_pad
    decay = logits + 4 * TILE_KEYS * MAX_PANEL
    ahead = decay + 4 * MAX_PANEL
    line = ahead + 16 * TILE_KEYS
    return Buffers(address, keys, values, logits, decay, ahead, line, result_at(problem, line + 4 * max(k_pad, v_pad)))
