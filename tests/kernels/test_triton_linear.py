"""Weights of 8 bits in Triton, against float64.

Tolerance: one rounding of the output's type, and 1e-6 of the sum of the absolute products.
"""

from __future__ import annotations

import pytest
import torch

from relevo.kernels import load_backend

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "ns", "k"), [
    (0, [8], 16), (1, [1], 1), (3, [40, 7], 1100), (16, [33], 520), (17, [33], 65), (70, [130], 64),
])  # fmt: skip
def test_int8_products_match_float64(backend: str, rows: int, ns: list[int], k: int, dtype: torch.dtype) -> None:
    weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for n in ns]
    scales = [torch.rand(n) / 100 for n in ns]
    biases = [torch.randn(n).to(dtype) if i == 0 else None for i, n in enumerate(ns)]
    layer = load_backend(backend, "cpu").prepare_linear(weights, biases, scales)
    assert (layer.in_features, layer.out_features, layer.num_bytes) == (k, sum(ns), sum(ns) * k)
    x = torch.full((rows, k + 5), torch.nan, dtype=dtype)
    x[:, 2 : 2 + k] = torch.randn(rows, k).to(dtype)
    x = x[:, 2 : 2 + k]
    output = layer(x)
    weight, scale = torch.cat(weights).double(), torch.cat(scales).double()
    shift = torch.cat([torch.zeros(n) if b is None else b for n, b in zip(ns, biases, strict=True)]).double()
    expected = x.double() @ weight.T * scale + shift
    sums = x.double().abs() @ weight.abs().T * scale + shift.abs()
    assert output.dtype == dtype and output.is_contiguous() and output.shape == expected.shape
    assert ((output.double() - expected).abs() <= expected.abs() * ROUNDING[dtype] + sums * 1e-6 + 1e-7).all()


def test_another_number_of_features_is_refused_by_triton() -> None:
    layer = load_backend("triton", "cpu").prepare_linear([torch.ones(8, 16, dtype=torch.int8)], [None], [torch.ones(8)])
    with pytest.raises(ValueError, match=r"15.*16"):
        layer(torch.randn(2, 15))
