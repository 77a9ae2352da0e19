"""Kernels on the device against float64: which checks there are, and what their answers may differ by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.parts import Bench, Check, short_reason
from relevo.kernels import Kernels, load_backend

CheckFunction = Callable[[Kernels, torch.device, bool], None]

ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CHILD_SECONDS = 120.0
ROOT = Path(__file__).parent.parent.parent


def check_kernels(bench: Bench) -> None:
    """Of the backend that the engine takes; without a GPU those of Triton too, in its interpreter."""
    kernels = load_backend(bench.backend, bench.device.type)
    module: Any = kernels
    name = module.__name__.removeprefix("relevo.kernels.")
    for check in run_checks(kernels, name, bench.device, tiny=bench.tiny):
        bench.checks.append(check)
        bench.deadline.check()
    if bench.device.type == "cpu":
        bench.checks += _interpreted()


def run_checks(kernels: Kernels, backend: str, device: torch.device, *, tiny: bool) -> Iterator[Check]:
    from bench.gpu.check_attention import attention_checks
    from bench.gpu.check_checksums import checksum_checks
    from bench.gpu.check_elements import element_checks
    from bench.gpu.check_products import product_checks
    from bench.gpu.check_sampling import sampling_checks

    checks = attention_checks() | element_checks() | product_checks() | sampling_checks()
    checks |= checksum_checks(backend, device)
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(kernels, device, tiny)
            yield Check(f"{backend}: {name}", True, "")
        except Exception as error:  # whatever it is, the other kernels are looked at
            yield Check(f"{backend}: {name}", False, short_reason(error))


def _interpreted() -> list[Check]:
    """Triton decides when a kernel is defined whether to compile it: a process of its own."""
    child = subprocess.run(
        [sys.executable, "-m", "bench.gpu.interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:]
        return [Check("triton: in its interpreter", False, f"status {child.returncode}: {''.join(last)[:160]}")]
    return [Check(*fields) for fields in json.loads(child.stdout)]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in freed memory of an output's size, where the output is likely to be put."""
    held = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(3)]
    del held


def require_close(actual: Tensor, expected: Tensor, *, relative: float, absolute: Tensor | float) -> None:
    """Raises AssertionError with the worst difference, in units of what is allowed. expected: float64"""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert bool(actual.isfinite().all()), "not finite"
    if actual.numel():
        excess = (actual.double() - expected).abs() / (relative * expected.abs() + absolute)
        worst = float(excess.max())
        assert worst <= 1, f"differs by {worst:.2f} × the tolerance"


def require_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    if not actual.equal(expected):
        raise AssertionError(f"{what}: {int((actual != expected).sum())} of {expected.numel()} differ")
