"""What the device itself does: how fast it copies, and how fast it multiplies."""

from __future__ import annotations

import torch

from bench.gpu.clock import seconds_of
from bench.gpu.parts import Bench

COPY_BYTES, MATRIX_SIZE = 2 << 30, 8192
TINY_COPY_BYTES, TINY_MATRIX_SIZE = 32 << 20, 256


def measure_device(bench: Bench) -> None:
    """copy: bytes read and written a second; matrix: of a square bf16 product, by torch."""
    num_bytes = TINY_COPY_BYTES if bench.tiny else COPY_BYTES
    size = TINY_MATRIX_SIZE if bench.tiny else MATRIX_SIZE
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.copy_bandwidth = 2 * num_bytes / seconds_of(lambda: target.copy_(source), bench.device, 10)
    bench.add("copy", bench.copy_bandwidth / 1e9)
    # Random: products of zeros draw less power, and run at a higher clock than any model does.
    a, b = (torch.randn(size, size, device=bench.device).to(torch.bfloat16) for _ in range(2))
    bench.matrix_rate = 2 * size**3 / seconds_of(lambda: a @ b, bench.device, 10)
    bench.add("matrix", bench.matrix_rate / 1e12)
