"""How large tiles are: so that code for sm_90 spills nothing and fits in shared memory. Not tuned on a device yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

STAGE_BYTES = 36 << 10  # of keys and values that are on their way at once, in one stage of a packed tile's pipeline
MAX_PACKED_ROWS = 64  # a sequence with no more rows is one tile
MIN_SPLIT_KEYS = 256  # fewer are not worth a merge
MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
# Triton divides the stages between the block table's entries and the keys and values that they point to: with 5, two
# tiles of keys and values are on their way.
PIPELINED = 5


@dataclass(frozen=True, slots=True)
class Tile:
    """block_m rows of queries by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@cache
def packed_tile(rows: int, dims: int, itemsize: int) -> Tile:
    """For sequences of at most so many rows: decode and verification. What it waits for is memory.

    dims: of key and value together, padded; itemsize: bytes of an element as it is multiplied
    """
    block_m = max(16, triton.next_power_of_2(rows))
    block_n = _power_of_two(STAGE_BYTES // (dims * itemsize), 16, 128 if block_m <= 16 else 64)
    if itemsize == 4:
        return Tile(block_m, 32 if block_m <= 16 and dims <= 256 else 16, 8, 2)
    return Tile(block_m, block_n, 8 if dims > 512 else 4, PIPELINED)


@cache
def long_tile(dims: int, itemsize: int) -> Tile:
    """For prompts and chunks of them. What it waits for is the matrix product."""
    if itemsize == 4:
        return Tile(32 if dims <= 256 else 16, 16, 8, 2)
    if dims <= 256:
        return Tile(128, 64, 8, PIPELINED)
    if dims <= 512:
        return Tile(128, 32, 8, PIPELINED)
    return Tile(32, 16, 8, PIPELINED)


def num_splits(programs: int, max_keys: int, device: torch.device) -> int:
    """Of each tile's keys, so that all multiprocessors have work. A function of host integers alone."""
    wanted = -(-PROGRAMS_PER_SM * num_multiprocessors(device) // max(1, programs))
    return max(1, min(wanted, max_keys // MIN_SPLIT_KEYS, MAX_SPLITS))


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; in the interpreter, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power_of_two(at_most: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << max(0, at_most.bit_length() - 1)))
