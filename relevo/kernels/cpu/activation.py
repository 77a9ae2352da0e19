"""The gate of a gated feed-forward layer: activation(gate) * up."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from relevo.kernels import Activation, reference
from relevo.kernels.cpu.calls import Call
from relevo.kernels.cpu.elements import element_size, load_elements, load_part, store_elements, store_part
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.simd import (
    ELEMENTS,
    LANES,
    absolute,
    add,
    divide,
    exp,
    fetch_add,
    fma,
    multiply,
    record,
    splat,
    subtract,
    where_positive,
)

COLUMNS = 512  # of a row that are one unit of work, so that threads can share even a single row
SILU, GELU_TANH, GELU = 0, 1, 2
_KINDS: dict[Activation, int] = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU}


class Arguments(NamedTuple):
    """A unit is `COLUMNS` of one row; x is [rows, 2 * width], output [rows, width]."""

    counter: int
    workers: int
    chunk: int
    units: int
    x: int
    output: int
    width: int
    units_per_row: int
    element: int
    kind: int


_load, _ = record(Arguments)


def gated_activation(x: Tensor, activation: Activation) -> Tensor:
    """See `Kernels.gated_activation`."""
    element = ELEMENTS.get(x.dtype)
    if element is None:
        return reference.gated_activation(x, activation)
    assert x.is_contiguous() and x.shape[1] % 2 == 0, (x.shape, x.stride())
    rows, width = x.shape[0], x.shape[1] // 2
    output = x.new_empty(rows, width)
    units_per_row = -(-width // COLUMNS)
    _gate.run(
        rows * units_per_row,
        4 * min(width, COLUMNS),  # an exponential and a division: about four times the work of a norm
        x.data_ptr(),
        output.data_ptr(),
        width,
        units_per_row,
        element,
        _KINDS[activation],
    )
    return output


def _build() -> CFunction:
    digest = sources_digest()

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        arguments = _load(address)
        while True:
            first = fetch_add(address, 1) * arguments.chunk
            if first >= arguments.units:
                break
            for unit in range(first, min(first + arguments.chunk, arguments.units)):
                _gate_unit(arguments, unit)

    return callback(work)


_gate = Call(_build, Arguments, floats=0)
compile = _gate.compile


@jit
def _gate_unit(arguments: Arguments, unit: int) -> None:
    width, element, kind = arguments.width, arguments.element, arguments.kind
    size = element_size(element)
    row, begin = unit // arguments.units_per_row, unit % arguments.units_per_row * COLUMNS
    gate, output = arguments.x + 2 * row * width * size, arguments.output + row * width * size
    up = gate + width * size
    end = min(begin + COLUMNS, width)
    whole = end - (end - begin) % LANES
    for i in range(begin, whole, LANES):
        x = _activate(load_elements(gate, i, element), kind)
        store_elements(output, i, multiply(x, load_elements(up, i, element)), element)
    if whole < end:
        rest = end - whole
        x = _activate(load_part(gate, whole, rest, element), kind)
        store_part(output, whole, multiply(x, load_part(up, whole, rest, element)), rest, element)


@jit
def _activate(x: Any, kind: int) -> Any:
    if kind == SILU:
        return _swish(x, x)
    if kind == GELU_TANH:
        # tanh's formula (Hendrycks & Gimpel 2016): 0.5 x (1 + tanh(z)) is x * sigmoid(2 z)
        cubic = fma(multiply(multiply(x, x), splat(0.044715)), x, x)
        return _swish(x, multiply(cubic, splat(1.5957691216057308)))
    return _gelu(x)


@jit
def _swish(x: Any, z: Any) -> Any:
    """x * sigmoid(z); no exponential of a positive number, which could be infinite."""
    one = splat(1.0)
    shrunk = exp(subtract(splat(0.0), absolute(z)))
    return divide(multiply(x, where_positive(z, one, shrunk)), add(one, shrunk))


@jit
def _gelu(x: Any) -> Any:
    """x * Phi(x), Phi by formula 7.1.26 of Abramowitz & Stegun 1964: absolute error under 1e-7."""
    z = multiply(absolute(x), splat(0.7071067811865476))
    t = divide(splat(1.0), fma(z, splat(0.3275911), splat(1.0)))
    series = fma(t, splat(1.061405429), splat(-1.453152027))
    series = fma(t, series, splat(1.421413741))
    series = fma(t, series, splat(-0.284496736))
    series = fma(t, series, splat(0.254829592))
    tail = multiply(multiply(multiply(splat(0.5), t), series), exp(subtract(splat(0.0), multiply(z, z))))
    return multiply(x, where_positive(x, subtract(splat(1.0), tail), tail))
