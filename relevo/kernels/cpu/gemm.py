"""Products of activations with weights that stay as they were loaded, row by row.

Threads take tasks one after another: a block of rows of x against a chunk of columns of the output, small enough that
its weights stay in level-2 cache while the rows pass by. For each block a thread lays x down as float32 in its own
scratch, k in blocks so that a tile's rows stay in level-1 cache while the weights pass by:

    x          [k_blocks][row_block][k_block]    rows x_stride bytes apart, zero past in_features
    sums       [row_block][chunk_columns]        float32, before scales and biases
    addresses  [chunk_columns] int64             where each column's row of weights begins

Blocks of k depend on in_features alone, so that every output is summed in one order; see `dots`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from relevo.kernels.cpu.dots import AHEAD, ELEMENT_BYTES, INT8, STEP, dot_tile
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.simd import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    copy_bytes,
    fetch_add,
    fma,
    load,
    load_int64,
    narrow,
    record,
    splat,
    store,
    store_int64,
)
from relevo.kernels.cpu.widen import widen

TILE_WIDTH, TILE_ROWS = 3, 4
ONE_ROW_WIDTH = 8
CHUNK_MULTIPLE = 24  # of both widths
COLUMNS_AHEAD = AHEAD * ONE_ROW_WIDTH
PANEL_ADDRESSES = (1 + AHEAD) * ONE_ROW_WIDTH


class Product(NamedTuple):
    """One call's arguments: addresses, strides in bytes, counts."""

    workers_come: int  # counts up from zero
    tasks_taken: int  # counts up from zero
    x: int
    x_row_bytes: int
    x_element: int
    output: int  # of x_element
    segments: int  # [num_segments] Segment
    scales: int  # [out_features] float32, readable to a whole vector's end
    biases: int  # likewise
    rows: int
    in_features: int
    out_features: int
    k_block: int  # a multiple of STEP
    row_block: int
    chunk_columns: int  # a multiple of CHUNK_MULTIPLE
    scratch: int
    scratch_bytes: int  # of each worker


class Segment(NamedTuple):
    """Columns of the output, up to `end`, that come from one matrix."""

    end: int
    weights: int
    row_bytes: int


class Task(NamedTuple):
    """Which outputs to compute, and in which scratch."""

    first_row: int
    rows: int
    first_column: int
    columns: int
    x: int
    x_stride: int
    sums: int
    sums_stride: int
    addresses: int
    panel: int  # [ONE_ROW_WIDTH] rows of weights, where they have to be padded
    panel_addresses: int
    line: int  # 64 bytes for whatever does not fill a vector


SEGMENT_BYTES = 8 * len(Segment._fields)
PRODUCT = struct.Struct(f"@{len(Product._fields)}q")

load_product, _ = record(Product)
load_segment, _ = record(Segment)


def build_gemm(element: int) -> CFunction:
    """`void work(Product *)` for weights of an element type, which each thread calls."""
    digest = sources_digest()
    paired = element == BFLOAT16

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        product = load_product(address)
        worker = fetch_add(address, 1)
        row_blocks = (product.rows + product.row_block - 1) // product.row_block
        chunks = (product.out_features + product.chunk_columns - 1) // product.chunk_columns
        loaded = -1
        while True:
            taken = fetch_add(address + 8, 1)
            if taken >= row_blocks * chunks:
                break
            task = _task(product, worker, taken // chunks, taken % chunks)
            if taken // chunks != loaded:
                loaded = taken // chunks
                _lay_down(product, task, paired)
            _locate(product, task)
            for at in range(0, task.rows * task.sums_stride, 32):
                store(task.sums + at, splat(0.0))
            # Not through a closure: code that closes over compiled functions is not found on disk again.
            if element == FLOAT32:
                _multiply_float32(product, task)
            elif element == BFLOAT16:
                _multiply_bfloat16(product, task)
            elif element == FLOAT16:
                _multiply_float16(product, task)
            else:
                _multiply_int8(product, task)
            _finish(product, task)

    return callback(work)


def scratch_bytes(row_block: int, chunk_columns: int, in_features: int, k_block: int) -> int:
    """What each worker needs."""
    k_blocks = -(-in_features // k_block)
    x_stride, sums_stride = 4 * k_block + 64, 4 * chunk_columns + 32
    rows = row_block * (k_blocks * x_stride + sums_stride)
    addresses = 8 * (PANEL_ADDRESSES + chunk_columns + COLUMNS_AHEAD)
    return (64 + addresses + ONE_ROW_WIDTH * x_stride + rows + 63) // 64 * 64


@jit
def _task(product: Product, worker: int, row_block: int, chunk: int) -> Task:
    first_row, first_column = row_block * product.row_block, chunk * product.chunk_columns
    rows = min(product.row_block, product.rows - first_row)
    columns = min(product.chunk_columns, product.out_features - first_column)
    # rows are not a power of two apart, so that they don't compete for the same lines of a cache
    x_stride, sums_stride = 4 * product.k_block + 64, 4 * product.chunk_columns + 32
    line = product.scratch + worker * product.scratch_bytes
    panel_addresses = line + 64
    addresses = panel_addresses + 8 * PANEL_ADDRESSES
    panel = addresses + 8 * (product.chunk_columns + COLUMNS_AHEAD)
    x = panel + ONE_ROW_WIDTH * x_stride
    sums = x + (product.in_features + product.k_block - 1) // product.k_block * product.row_block * x_stride
    return Task(
        first_row,
        rows,
        first_column,
        columns,
        x,
        x_stride,
        sums,
        sums_stride,
        addresses,
        panel,
        panel_addresses,
        line,
    )


@jit
def _lay_down(product: Product, task: Task, paired: bool) -> None:
    """Write the block's rows of x as float32."""
    size = 4 if product.x_element == FLOAT32 else 2
    target = task.x
    for k in range(0, product.in_features, product.k_block):
        count = min(product.k_block, product.in_features - k)
        source = product.x + task.first_row * product.x_row_bytes + k * size
        for _ in range(task.rows):
            widen(target, source, count, product.x_element, paired, task.line)
            target += task.x_stride
            source += product.x_row_bytes


@jit
def _locate(product: Product, task: Task) -> None:
    """Write where rows of weights begin, of the chunk's columns and those next to it; past the last one, its again."""
    at, begin = product.segments, 0
    segment = load_segment(at)
    last = product.out_features - 1
    for i in range((task.columns + CHUNK_MULTIPLE - 1) // CHUNK_MULTIPLE * CHUNK_MULTIPLE + COLUMNS_AHEAD):
        column = min(task.first_column + i, last)
        while column >= segment.end:
            begin = segment.end
            at += SEGMENT_BYTES
            segment = load_segment(at)
        store_int64(task.addresses + 8 * i, segment.weights + (column - begin) * segment.row_bytes)


def _multiply(element: int) -> Callable[[Product, Task], None]:
    """All of a task's outputs."""
    one_row = _columns(ONE_ROW_WIDTH, 1, element)
    two_rows, three_rows, four_rows = (_columns(TILE_WIDTH, rows, element) for rows in (2, 3, 4))
    # The widest weights come twice as seldom from level-2 cache, which else could not keep up.
    most_rows = 2 * TILE_ROWS if element == FLOAT32 else TILE_ROWS

    @jit
    def multiply(product: Product, task: Task) -> None:
        x = task.x
        for k in range(0, product.in_features, product.k_block):
            count = min(product.k_block, product.in_features - k)
            left, sums = task.rows, task.sums
            while left > 0:
                rows = _next_rows(left, most_rows)
                if rows == 1:
                    one_row(task, k, count, x, sums, 1)
                elif rows == 2:
                    two_rows(task, k, count, x, sums, 1)
                elif rows == 3:
                    three_rows(task, k, count, x, sums, 1)
                else:
                    four_rows(task, k, count, x, sums, rows // TILE_ROWS)
                x += rows * task.x_stride
                sums += rows * task.sums_stride
                left -= rows

    return multiply


@jit
def _next_rows(left: int, most: int) -> int:
    """Fours or eights, and at the end rather three and two than four and one, which would keep multipliers waiting."""
    if left == 5:
        return 3
    return most if left >= most else min(left, TILE_ROWS)


def _columns(width: int, rows: int, element: int) -> Callable[[Task, int, int, int, int, int], None]:
    """A block of k of so many tiles of rows against all columns of a chunk."""
    tile, size = dot_tile(width, rows, element), ELEMENT_BYTES[element]

    @jit
    def multiply(task: Task, k: int, count: int, x: int, sums: int, tiles: int) -> None:
        steps = (count + STEP - 1) // STEP * STEP
        if count < steps:
            for i in range((1 + AHEAD) * width):
                store_int64(task.panel_addresses + 8 * i, task.panel + i % width * task.x_stride)
        for column in range(0, task.columns, width):
            weights, offset = task.addresses + 8 * column, k * size
            if count < steps:
                _fill_panel(task, weights, offset, width, count * size, (steps - STEP) * size)
                weights, offset = task.panel_addresses, 0
            for i in range(0, tiles * rows, rows):
                tile_x, tile_sums = x + i * task.x_stride, sums + i * task.sums_stride + 4 * column
                tile(weights, offset, tile_x, task.x_stride, steps, tile_sums, task.sums_stride)

    return multiply


_multiply_float32, _multiply_bfloat16, _multiply_float16, _multiply_int8 = map(
    _multiply, (FLOAT32, BFLOAT16, FLOAT16, INT8)
)


@jit
def _fill_panel(task: Task, weights: int, offset: int, width: int, num_bytes: int, last_step: int) -> None:
    """Copy a tile's rows of weights; what the last step, which begins so many bytes on, lacks is zero."""
    for i in range(width):
        row = task.panel + i * task.x_stride
        store(row + last_step, splat(0.0))
        store(row + last_step + 32, splat(0.0))
        copy_bytes(row, load_int64(weights + 8 * i) + offset, num_bytes)


@jit
def _finish(product: Product, task: Task) -> None:
    """Scale, add biases, and round into the output."""
    size = 4 if product.x_element == FLOAT32 else 2
    scales, biases = product.scales + 4 * task.first_column, product.biases + 4 * task.first_column
    for row in range(task.rows):
        sums = task.sums + row * task.sums_stride
        for at in range(0, 4 * task.columns, 32):
            store(sums + at, fma(load(sums + at), load(scales + at), load(biases + at)))
        target = product.output + ((task.first_row + row) * product.out_features + task.first_column) * size
        narrow(target, sums, task.columns, product.x_element, task.line)
