"""Linear layers of the cpu backend against float64, and against themselves.

Tolerance: the rounding of the output's type (half a unit in the last place), and 1e-6 of the sum of the absolute
products for float32 sums of up to 4864 of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relevo.kernels import PreparedLinear, reference
from relevo.kernels.cpu import linear as cpu_linear
from relevo.kernels.cpu import onednn
from relevo.kernels.cpu.linear import Linear, prepare_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM_TOLERANCE = 1e-6
Prepare = Callable[[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor] | None], PreparedLinear]


def own(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], scales: Sequence[Tensor] | None = None
) -> PreparedLinear:
    """Our kernels, whatever this CPU is best at."""
    return Linear(weights, biases, scales)


def make_weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8) if dtype == torch.int8 else torch.randn(n, k).to(dtype)


def assert_close(
    output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor] | None = None,
) -> None:
    """`output` is x's product with all weights, side by side, within this file's tolerance."""
    wide = x.double()
    expected, magnitude = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        scale = 1.0 if scales is None else scales[i].double()
        shift = torch.zeros(len(weight)).double() if bias is None else bias.double()
        expected.append(wide @ weight.double().T * scale + shift)
        magnitude.append(wide.abs() @ weight.double().abs().T * scale + shift.abs())
    wanted, sums = torch.cat(expected, dim=1), torch.cat(magnitude, dim=1)
    assert output.dtype == x.dtype and output.is_contiguous() and output.shape == wanted.shape
    error = (output.double() - wanted).abs()
    smallest = torch.finfo(x.dtype).smallest_normal * HALF_UNIT[x.dtype]
    allowed = wanted.abs() * HALF_UNIT[x.dtype] + sums * SUM_TOLERANCE + smallest
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize("k", [1, 7, 50, 896, 1040, 4864])
@pytest.mark.parametrize("n", [1, 8, 23, 250])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_products_match_float64(k: int, n: int, dtype: torch.dtype) -> None:
    weight, bias = make_weight(n, k, dtype), torch.randn(n)
    scales = [torch.rand(n) / 100] if dtype == torch.int8 else None
    layer = own([weight], [bias], scales)
    assert (layer.in_features, layer.out_features, layer.num_bytes) == (k, n, n * k * weight.element_size())
    for rows in (0, 1, 2, 3, 4, 5, 8, 17, 64, 257):
        x = torch.randn(rows, k).to(torch.bfloat16 if dtype == torch.int8 else dtype)
        assert_close(layer(x), x, [weight], [bias], scales)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 1200),
    ns=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    x_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from([*DTYPES, torch.int8]),
    biased=st.integers(0, 7),
    seed=st.integers(0, 1 << 30),
)
def test_joined_layers_of_any_shapes_and_types_match_float64(
    rows: int, k: int, ns: list[int], x_dtype: torch.dtype, dtype: torch.dtype, biased: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weights = [make_weight(n, k, dtype) for n in ns]
    biases = [torch.randn(n).to(x_dtype) if biased >> i & 1 else None for i, n in enumerate(ns)]
    scales = [torch.rand(n) / 100 for n in ns] if dtype == torch.int8 else None
    x = torch.randn(rows, k).to(x_dtype)
    assert_close(own(weights, biases, scales)(x), x, weights, biases, scales)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_a_result_agrees_with_the_reference(dtype: torch.dtype) -> None:
    weights, biases = [make_weight(n, 96, dtype) for n in (40, 8)], [torch.randn(40), None]
    scales = [torch.rand(len(weight)) / 100 for weight in weights] if dtype == torch.int8 else None
    x = torch.randn(6, 96).to(torch.float32 if dtype == torch.int8 else dtype)
    cast = [None if bias is None else bias.to(x.dtype) for bias in biases]
    expected = reference.prepare_linear(weights, cast, scales)(x)
    # two roundings of sums that were summed in another order: an output may fall to either side of a tie
    torch.testing.assert_close(own(weights, cast, scales)(x), expected, rtol=4 * HALF_UNIT[x.dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("k", [50, 896, 1040, 4864])
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(dtype: torch.dtype, k: int) -> None:
    """Bit for bit; float32 outputs, so that rounding hides nothing."""
    weight = make_weight(130, k, dtype)
    layer = own([weight], [None], [torch.ones(130)] if dtype == torch.int8 else None)
    x = torch.randn(300, k)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
    for threads, rows in itertools.product((1, 2, 3), (2, 3, 4, 5, 6, 7, 33, 300)):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x[:rows]), alone[:rows]), (threads, rows)


def test_every_output_is_written_and_nothing_else_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory and the scratch of earlier calls hold NaN; so does what lies around x and the weights."""

    def poisoned(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.full(size, 255, dtype=dtype) if dtype == torch.uint8 else torch.full(size, torch.nan, dtype=dtype)

    monkeypatch.setattr(cpu_linear, "_calls", cpu_linear._Calls())
    monkeypatch.setattr(torch, "empty", poisoned)
    for rows, k, n in ((1, 7, 5), (5, 50, 23), (130, 33, 26)):
        around = torch.full((n + 2, k + 9), torch.nan)
        around[1:-1, 3 : 3 + k] = torch.randn(n, k)
        weight = around[1:-1, 3 : 3 + k]
        x = torch.full((rows, k + 5), torch.nan)
        x[:, 2 : 2 + k] = torch.randn(rows, k)
        x = x[:, 2 : 2 + k]
        assert_close(own([weight], [None])(x), x, [weight], [None])


def test_transposed_weights_and_columns_of_x_are_understood() -> None:
    weight, x = torch.randn(64, 48).T, torch.randn(64, 10).T
    assert_close(own([weight], [None])(x), x, [weight], [None])


def test_weights_stay_where_they_are() -> None:
    weight = torch.randn(32, 64)
    layer, x = own([weight], [None]), torch.randn(2, 64)
    before = layer(x)
    weight.mul_(2)
    assert torch.equal(layer(x), 2 * before)


def test_python_threads_may_call_one_layer_at_once() -> None:
    torch.set_num_threads(2)
    weight = torch.randn(300, 512)
    layer = own([weight], [None])
    inputs = [torch.randn(rows, 512) for rows in (1, 3, 9, 40)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(20):
            for output, wanted in zip(pool.map(layer, inputs), expected, strict=True):
                assert torch.equal(output, wanted)


def test_infinite_and_missing_numbers_pass_through() -> None:
    weight, x = torch.ones(4, 20), torch.ones(3, 20)
    x[0, 19], x[1, 3] = torch.inf, torch.nan
    output = own([weight], [None])(x)
    assert (output[0] == torch.inf).all() and output[1].isnan().all() and (output[2] == 20).all()


@pytest.mark.parametrize("prepare", [own, lambda weights, biases, _=None: onednn.PackedLinear(weights, biases)])
def test_another_number_of_features_is_refused(prepare: Prepare) -> None:
    layer = prepare([torch.randn(8, 16)], [None], None)
    with pytest.raises(ValueError, match=r"15.*16"):
        layer(torch.randn(2, 15))


def test_layers_of_different_inputs_are_not_joined() -> None:
    with pytest.raises(ValueError, match="in_features"):
        prepare_linear([torch.randn(8, 16), torch.randn(8, 17)], [None, None])
    with pytest.raises(ValueError, match="one type"):
        prepare_linear([torch.randn(8, 16), torch.randn(8, 16).half()], [None, None])


def test_float64_goes_to_the_reference() -> None:
    weight, x = torch.randn(8, 16).double(), torch.randn(3, 16).double()
    assert torch.equal(prepare_linear([weight], [None])(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(("dtype", "capabilities", "supports_bfloat16", "faster"), [
    (torch.bfloat16, {"avx512_f": True, "avx512_bf16": True}, True, True),
    (torch.bfloat16, {"avx512_f": True, "amx_bf16": True}, True, True),
    (torch.bfloat16, {"avx512_f": True, "amx_bf16": True}, False, False),
    (torch.bfloat16, {"avx512_f": True, "avx512_bf16": False}, True, False),
    (torch.float32, {"avx512_f": True}, True, True),
    (torch.float32, {"avx2": True, "avx512_f": False}, False, False),
    (torch.float32, {}, False, False),
    (torch.float16, {"avx512_f": True, "amx_bf16": True}, True, False),
    (torch.int8, {"avx512_f": True, "amx_int8": True}, True, False),
])  # fmt: skip
def test_onednn_is_chosen_by_what_the_cpu_can_do(
    dtype: torch.dtype, capabilities: dict[str, object], supports_bfloat16: bool, faster: bool
) -> None:
    assert onednn.is_faster(dtype, capabilities, supports_bfloat16) == faster


@pytest.mark.skipif(not onednn.is_available(), reason="this torch has no oneDNN")
def test_onednn_layers_match_float64() -> None:
    weights, biases = [torch.randn(40, 50), torch.randn(7, 50)], [None, torch.randn(7)]
    layer = onednn.PackedLinear(weights, biases)
    assert (layer.in_features, layer.out_features, layer.num_bytes) == (50, 47, 47 * 50 * 4)
    for rows in (0, 1, 5, 33):
        for dtype in DTYPES:
            x = torch.randn(rows, 50).to(dtype)
            assert_close(layer(x), x, weights, biases)
