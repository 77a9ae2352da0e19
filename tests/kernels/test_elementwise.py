"""Norms, rotary embedding and gates of every backend, against the same formulas in float64.

Tolerances: float32 5e-6 of the largest value there is; bfloat16 and float16 one rounding (2**-8, 2**-11 of the value).
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from relevo.kernels import Activation, Kernels, load_backend
from tests.support.triton_interpreter import takes_long

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ACTIVATIONS: list[Activation] = ["silu", "gelu", "gelu_tanh"]
# (rows, dim) below, at and above whole vectors and unrolled loops; the last is worth two threads
SHAPES = [(1, 1), (3, 7), (2, 8), (5, 33), (1, 896), (4, 100), (0, 16), (70, 520)]


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.is_contiguous() and actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=ROUNDING[dtype], atol=5e-6 * max(1.0, largest))


def normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


def gated(x: Tensor, activation: Activation) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Leave NaN in freed memory of an output's size, where the output is likely to be put."""
    held = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(4)]
    del held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_norms(kernels: Kernels, rows: int, dim: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    x, residual, weight = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype), torch.randn(dim).to(dtype)
    poison(rows, dim, dtype=dtype)
    check(kernels.rms_norm(x, weight, 1e-6), normed(x, weight, 1e-6, 0.0), dtype)
    check(kernels.rms_norm(x, weight.float(), 1e-3, 1.0), normed(x, weight, 1e-3, 1.0), dtype)
    poison(rows, dim, dtype=dtype)
    y, total = kernels.add_rms_norm(x, residual, weight, 1e-5, 1.0)
    assert total.equal(x + residual)
    check(y, normed(total, weight, 1e-5, 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_strided_heads(kernels: Kernels, dtype: torch.dtype) -> None:
    """As q_norm sees them: heads of a merged projection; also a slice of rows, and one vector."""
    merged, weight = torch.randn(9, 6 * 20).to(dtype), torch.randn(20).to(dtype)
    for x in (merged[:, 20:100].view(9, 4, 20), merged[::2, 3:23], merged[2, 5:25]):
        check(kernels.rms_norm(x, weight, 1e-6), normed(x, weight, 1e-6, 0.0), dtype)


def test_norm_of_large_and_of_zero_rows(kernels: Kernels) -> None:
    x = torch.stack((torch.zeros(40), torch.full((40,), 1e4)))
    assert kernels.rms_norm(x, torch.ones(40), 1e-6).tolist() == [[0.0] * 40, pytest.approx([1.0] * 40)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_gates(kernels: Kernels, rows: int, dim: int, dtype: torch.dtype, activation: Activation) -> None:
    torch.set_num_threads(2)
    x = (torch.randn(rows, 2 * dim) * 4).to(dtype)
    poison(rows, dim, dtype=dtype)
    check(kernels.gated_activation(x, activation), gated(x, activation), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(kernels: Kernels, activation: Activation) -> None:
    gate = torch.tensor([-1e30, -500.0, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 500.0, 1e30])
    actual = kernels.gated_activation(torch.cat((gate, torch.ones(10)))[None], activation)
    torch.testing.assert_close(actual[0], gate.clamp(min=0.0), rtol=1e-6, atol=1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pair (j, j + half) of each head turned, in float64."""
    x, result, half = x.double(), x.double().clone(), cos.shape[1] // 2
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    left, right = x[..., :half], x[..., half : 2 * half]
    result[..., :half] = left * cos[..., :half] - right * sin[..., :half]
    result[..., half : 2 * half] = right * cos[..., half:] + left * sin[..., half:]
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16], ids=["angles32", "angles16"])
@pytest.mark.parametrize(("k_dim", "v_dim", "rot_dim"), [(64, 64, 64), (128, 64, 32), (20, 12, 10), (96, 96, 72)])
@pytest.mark.parametrize("tokens", [0, 1, 60])
def test_rotary_of_a_merged_projection_goes_into_the_cache(
    kernels: Kernels, tokens: int, k_dim: int, v_dim: int, rot_dim: int, angles: torch.dtype, dtype: torch.dtype
) -> None:
    torch.set_num_threads(2)
    tokens = min(tokens, 4) if takes_long(kernels) else tokens
    heads, kv_heads, block_size = 6, 2, 8
    merged = torch.randn(tokens, heads * k_dim + kv_heads * (k_dim + v_dim)).to(dtype)
    middle, end = heads * k_dim, (heads + kv_heads) * k_dim
    query, key = merged[:, :middle].view(tokens, heads, k_dim), merged[:, middle:end].view(tokens, kv_heads, k_dim)
    value = merged[:, end:].view(tokens, kv_heads, v_dim)
    cos, sin = torch.randn(tokens, rot_dim).to(angles), torch.randn(tokens, rot_dim).to(angles)
    storage = torch.full((12, 2, block_size, kv_heads, k_dim), float("nan"), dtype=dtype)
    k_cache, v_cache = storage[:, 0], storage[:, 1, :, :, :v_dim]
    slots = torch.randperm(12 * block_size)[:tokens]
    poison(tokens, heads, k_dim, dtype=dtype)
    output = kernels.rotary_store_kv(query, key, value, cos, sin, k_cache, v_cache, slots)
    check(output, rotated(query, cos, sin), dtype)
    block_ids, offsets = slots // block_size, slots % block_size
    check(k_cache[block_ids, offsets], rotated(key, cos, sin), dtype)
    assert v_cache[block_ids, offsets].equal(value)
    written = torch.zeros(12, block_size, dtype=torch.bool)
    written[block_ids, offsets] = True
    assert storage[:, 0][~written].isnan().all() and storage[:, 1][~written].isnan().all()


@pytest.mark.parametrize("slot", [-1, 96])
def test_rotary_writes_nothing_if_a_slot_is_outside(slot: int) -> None:
    """By the compiled backend: torch checks its indices itself."""
    cache = torch.zeros(12, 8, 1, 16)
    x, angles = torch.ones(3, 1, 16), torch.ones(3, 16)
    with pytest.raises(IndexError, match="not in the cache"):
        load_backend("cpu", "cpu").rotary_store_kv(x, x, x, angles, angles, cache, cache, torch.tensor([0, 5, slot]))
    assert not cache.any()


def test_rotary_leaves_a_slot_outside_unwritten_with_triton() -> None:
    """A GPU could only raise by waiting; a padded batch has -1 there."""
    cache = torch.zeros(12, 8, 1, 16)
    x, cos, sin = torch.ones(4, 1, 16), torch.ones(4, 16), torch.zeros(4, 16)
    slots = torch.tensor([-1, 5, 96, 10**12])
    query = load_backend("triton", "cpu").rotary_store_kv(x, x, x, cos, sin, cache, cache, slots)
    assert query.equal(x) and cache.sum() == 16 and cache[0, 5].eq(1).all()


def test_rotary_of_mixed_types_is_that_of_the_reference(kernels: Kernels) -> None:
    """Float32 keys into a bfloat16 cache, and a query whose last dimension is strided."""
    cache = torch.zeros(2, 2, 4, 1, 16, dtype=torch.bfloat16)
    query, key = torch.randn(16, 2, 3).permute(2, 1, 0), torch.randn(3, 1, 16)
    cos, sin, slots = torch.randn(3, 16), torch.randn(3, 16), torch.tensor([7, 0, 2])
    output = kernels.rotary_store_kv(query, key, key, cos, sin, cache[:, 0], cache[:, 1], slots)
    check(output, rotated(query, cos, sin), torch.float32)
    assert cache[:, 1][slots // 4, slots % 4].equal(key.bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 999),
)
def test_any_shape_and_each_row_as_if_alone(
    backend: str, rows: int, dim: int, dtype: torch.dtype, activation: Activation, seed: int
) -> None:
    kernels = load_backend(backend, "cpu")
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, dim).to(dtype), torch.randn(dim).to(dtype)
    y, gates = kernels.rms_norm(x, weight, 1e-6), kernels.gated_activation(torch.cat((x, x), dim=1), activation)
    check(y, normed(x, weight, 1e-6, 0.0), dtype)
    check(gates, gated(torch.cat((x, x), dim=1), activation), dtype)
    row = seed % rows
    alone = x[row : row + 1]
    if backend == "cpu":  # torch may vectorize a lone row another way
        assert kernels.rms_norm(alone, weight, 1e-6).equal(y[row : row + 1])
        assert kernels.gated_activation(torch.cat((alone, alone), dim=1), activation).equal(gates[row : row + 1])


def test_two_python_threads_may_call_at_once() -> None:
    """Small calls, done where they are, and large ones, on torch's threads: each gets its own arguments."""
    torch.set_num_threads(2)
    kernels = load_backend("cpu", "cpu")
    inputs = [torch.randn(rows, 64) for rows in (3, 2000, 5, 3000)]
    weight = torch.randn(64)
    alone = [kernels.rms_norm(x, weight, 1e-6) for x in inputs]
    wrong: list[Any] = []

    def repeat(i: int) -> None:
        if not all(kernels.rms_norm(inputs[i], weight, 1e-6).equal(alone[i]) for _ in range(200)):
            wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
