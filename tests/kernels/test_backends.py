"""Choosing a backend, and what loading one costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from relevo.kernels import load_backend


@pytest.mark.parametrize(("name", "device", "module"), [
    ("auto", "cpu", "relevo.kernels.cpu"),
    ("auto", "cuda:0", "relevo.kernels.triton"),
    ("reference", "cpu", "relevo.kernels.reference"),
    ("cpu", "cpu", "relevo.kernels.cpu"),
    ("triton", "cuda:0", "relevo.kernels.triton"),
])  # fmt: skip
def test_backends_are_chosen_by_device_or_by_name(name: str, device: str, module: str) -> None:
    assert getattr(load_backend(name, device), "__name__", None) == module


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*auto, reference, cpu, triton, flash-attn, flashinfer"):
        load_backend("cuda", "cpu")


def test_the_cpu_backend_is_refused_on_another_device() -> None:
    with pytest.raises(ValueError, match="'cuda:0'"):
        load_backend("cpu", "cuda:0")


def test_triton_is_refused_on_a_cpu_outside_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a GPU"):
        load_backend("triton", "cpu")


def test_the_package_imports_neither_torch_nor_a_compiler() -> None:
    code = "import sys, relevo.kernels; assert not {'torch', 'numba', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_warm_up_takes_any_dtype(name: str, dtype: torch.dtype) -> None:
    load_backend(name, "cpu").warm_up(dtype)
