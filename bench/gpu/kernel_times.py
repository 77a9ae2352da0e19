"""Kernels by themselves, against what the device copies and multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.gpu.clock import seconds_of
from bench.gpu.paged import make_batch
from bench.gpu.parts import Bench
from relevo.kernels import Kernels, load_backend

REPEATS, TINY_REPEATS = 20, 2
HALF = torch.bfloat16
HEADS, KV_HEADS, DIM = 32, 8, 128


def _decode_attention(bench: Bench) -> None:
    """Reads K and V of all contexts once."""
    num_seqs, context = (4, 64) if bench.tiny else (64, 4096)
    bytes_read = 2 * num_seqs * context * KV_HEADS * DIM * HALF.itemsize
    _add(bench, "decode_attention", _attention(bench, num_seqs, context, 1), num_bytes=bytes_read)


def _prefill_attention(bench: Bench) -> None:
    """Two products, of which the mask leaves a half."""
    tokens = 128 if bench.tiny else 16_384
    operations = 2 * HEADS * DIM * tokens**2
    _add(bench, "prefill_attention", _attention(bench, 1, tokens, tokens), operations=operations)


def _attention(bench: Bench, num_seqs: int, context: int, queries: int) -> Callable[[], Any]:
    kernels = _kernels(bench)
    batch = make_batch(
        [(context, queries)] * num_seqs, heads=HEADS, kv_heads=KV_HEADS, k_dim=DIM, dtype=HALF, device=bench.device
    )
    kernels.store_kv(batch.keys, batch.values, batch.k_cache, batch.v_cache, batch.slots)
    return lambda: kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=DIM**-0.5)


def _norm(bench: Bench) -> None:
    """Reads x and the residual, writes their sum and its norm."""
    rows, dim = (16, 256) if bench.tiny else (8192, 4096)
    kernels = _kernels(bench)
    x, residual = (torch.randn(rows, dim, device=bench.device).to(HALF) for _ in range(2))
    weight = torch.ones(dim, dtype=HALF, device=bench.device)
    num_bytes = 4 * x.numel() * HALF.itemsize
    _add(bench, "norm", lambda: kernels.add_rms_norm(x, residual, weight, 1e-5), num_bytes=num_bytes)


def _rotary(bench: Bench) -> None:
    """Reads queries, keys, values, cosines and sines; writes queries, and keys and values into the cache."""
    tokens = 32 if bench.tiny else 8192
    kernels = _kernels(bench)
    batch = make_batch([(tokens, tokens)], heads=HEADS, kv_heads=KV_HEADS, k_dim=DIM, dtype=HALF, device=bench.device)
    cos, sin = (torch.randn(tokens, DIM, device=bench.device).to(HALF) for _ in range(2))
    num_bytes = 2 * HALF.itemsize * (batch.query.numel() + batch.keys.numel() + batch.values.numel() + cos.numel())
    _add(
        bench,
        "rotary",
        lambda: kernels.rotary_store_kv(
            batch.query, batch.keys, batch.values, cos, sin, batch.k_cache, batch.v_cache, batch.slots
        ),
        num_bytes=num_bytes,
    )


def _sampling(bench: Bench) -> None:
    """Reads the logits once, at least."""
    rows, vocab = (4, 4096) if bench.tiny else (64, 151_936)
    kernels = _kernels(bench)
    logits = torch.randn(rows, vocab, device=bench.device) * 3
    uniforms: list[float] = torch.rand(rows, dtype=torch.float64).tolist()
    params = ([0.8] * rows, [0.0] * rows, [50] * rows, [0.95] * rows, uniforms)
    _add(bench, "sampling", lambda: kernels.sample(logits, *params), num_bytes=logits.numel() * 4)


def _add(bench: Bench, key: str, call: Callable[[], Any], *, num_bytes: float = 0, operations: float = 0) -> None:
    """Either bytes or operations say what the bound is."""
    seconds = seconds_of(call, bench.device, TINY_REPEATS if bench.tiny else REPEATS)
    rate, bound = (num_bytes, bench.copy_bandwidth) if num_bytes else (operations, bench.matrix_rate)
    bench.add(key, 1e3 * seconds, rate / seconds / bound if bound else None)


def _kernels(bench: Bench) -> Kernels:
    return load_backend(bench.backend, bench.device.type)


KERNEL_TIMES: Mapping[str, Callable[[Bench], None]] = {  # by the figure's key
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
    "norm": _norm,
    "rotary": _rotary,
    "sampling": _sampling,
}
