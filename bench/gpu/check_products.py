"""Grouped LoRA and linear layers of 8 bits.

Tolerances, in sums of absolute products: LoRA two roundings of the type (the product of rank r is rounded before the
second one), float32 2e-6; int8 1e-6, and one rounding of the output.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu.checks import ROUNDING, CheckFunction, require_close
from relevo.kernels import Kernels


def product_checks() -> dict[str, CheckFunction]:
    checks: dict[str, CheckFunction] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        checks[f"grouped LoRA (SGMV), {name}"] = partial(_sgmv, dtype)
        checks[f"int8 linear, {name}"] = partial(_int8, dtype)
    return checks


def _sgmv(dtype: torch.dtype, kernels: Kernels, device: torch.device, tiny: bool) -> None:
    num_adapters = 5
    for rows, k, r, m in ((16, 64, 16, 40),) if tiny else ((1, 7, 1, 5), (37, 600, 20, 130), (300, 4096, 16, 4096)):
        x = torch.randn(rows, k, device=device).to(dtype)
        a = torch.randn(num_adapters, r, k, device=device).to(dtype)
        b = torch.randn(num_adapters, m, r, device=device).to(dtype)
        adapters = torch.randint(-1, num_adapters, (rows,), dtype=torch.int32, device=device)
        scale = torch.tensor([1.0, 0.5, 2.0, 0.0, -1.0], device=device)
        out = torch.randn(rows, m, device=device).to(dtype)
        expected, allowed = out.double(), out.double().abs()
        kernels.sgmv(x, a, b, adapters, scale, out)
        for adapter in range(num_adapters):
            mine = adapters == adapter
            wide, down, up = x[mine].double(), a[adapter].double(), b[adapter].double()
            factor = float(scale[adapter])
            expected[mine] += factor * ((wide @ down.T) @ up.T)
            small = (wide.abs() @ down.abs().T).clamp(max=4 * k**0.5)  # what a sum of k random products stays below
            allowed[mine] += abs(factor) * (small @ up.abs().T)
        rounding = 2e-6 if dtype == torch.float32 else ROUNDING[dtype]
        require_close(out, expected, relative=0.0, absolute=2 * rounding * allowed + 1e-6)


def _int8(dtype: torch.dtype, kernels: Kernels, device: torch.device, tiny: bool) -> None:
    for rows, n, k in (
        ((3, 47, 200), (17, 33, 65)) if tiny else ((1, 1, 1), (1, 4096, 4096), (17, 33, 65), (300, 520, 1100))
    ):
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        scale, bias = torch.rand(n, device=device) / 100, torch.randn(n, device=device).to(dtype)
        x = torch.randn(rows, k, device=device).to(dtype)
        output = kernels.prepare_linear([weight], [bias], [scale])(x)
        wide, factor, shift = weight.double(), scale.double(), bias.double()
        expected = x.double() @ wide.T * factor + shift
        sums = x.double().abs() @ wide.abs().T * factor + shift.abs()
        assert output.dtype == dtype
        require_close(output, expected, relative=ROUNDING[dtype], absolute=sums * 1e-6 + 1e-7)
