"""Grouped LoRA of every backend, against float64 one row at a time.

Tolerances, in units of the sum of absolute products: float32 2e-6; bfloat16 and float16 two roundings (the product of
rank r is rounded to the type before the second one), and one of the result.
"""

from __future__ import annotations

import pytest
import torch

from relevo.kernels import Kernels, load_backend

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k", "r", "m"), [(0, 8, 4, 8), (1, 7, 1, 5), (16, 64, 16, 128), (37, 600, 20, 130)])
def test_each_row_gets_its_own_adapter(kernels: Kernels, rows: int, k: int, r: int, m: int, dtype: torch.dtype) -> None:
    num_adapters = 5
    x = torch.randn(rows, k + 3).to(dtype)[:, :k]
    a, b = torch.randn(num_adapters, r, k).to(dtype), torch.randn(num_adapters, m, r).to(dtype)
    a[1, r // 2 :], b[1, :, r // 2 :] = 0, 0  # of a lower rank
    adapters = torch.randint(-1, num_adapters, (rows,), dtype=torch.int32)
    scale = torch.tensor([1.0, 0.5, 2.0, 0.0, -1.0])
    out = torch.randn(rows, m + 2).to(dtype)[:, :m]
    before = out.clone()
    kernels.sgmv(x, a, b, adapters, scale, out)
    for i, adapter in enumerate(adapters.tolist()):
        if adapter < 0:
            assert out[i].equal(before[i])
            continue
        small, up, factor = a[adapter].double() @ x[i].double(), b[adapter].double(), float(scale[adapter])
        expected = before[i].double() + factor * (up @ small)
        allowed = before[i].double().abs() + abs(factor) * (
            up.abs() @ (a[adapter].double().abs() @ x[i].double().abs()).clamp(max=4 * k**0.5)
        )
        assert ((out[i].double() - expected).abs() <= 2 * ROUNDING[dtype] * allowed + 1e-6).all()


def test_no_adapters_change_nothing(kernels: Kernels) -> None:
    out = torch.ones(2, 8)
    a, b = torch.ones(1, 4, 8), torch.ones(1, 8, 4)
    kernels.sgmv(torch.ones(2, 8), a, b, torch.tensor([-1, -1], dtype=torch.int32), torch.ones(1), out)
    kernels.sgmv(torch.ones(2, 8), a[:0], b[:0], torch.tensor([-1, -1], dtype=torch.int32), torch.ones(0), out)
    assert out.tolist() == [[1.0] * 8] * 2
