"""What is measured, and what the project wants of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """unit: of the value
    bound: what its ratio is a ratio of; shares of a bound are better the higher, times a bound the lower
    target, moonshot: of the ratio, on an H200; None: nobody asks for one
    """

    key: str
    label: str
    unit: str
    bound: str = ""
    better: Literal["higher", "lower"] = "higher"
    target: float | None = None
    moonshot: float | None = None


COPY, MATRIX, BYTES = "of copy bandwidth", "of matrix rate", "× bytes ÷ bandwidth"
LLAMA, QWEN, MOE = "llama-3.1-8b", "qwen3-0.6b", "moe-8x0.5b"
BATCHES, PREFILLS = (1, 8, 64, 256), (2, 16)  # requests; thousands of tokens
_TPOT_TARGETS = {1: (1.25, 1.1), 64: (1.4, 1.2)}

MACHINE = (Figure("copy", "copy bandwidth", "GB/s"), Figure("matrix", "bf16 matrix rate", "TFLOP/s"))
KERNELS = (
    Figure("decode_attention", "decode attention, 64 × 4k, 8 KV heads", "ms", COPY, "higher", 0.75, 0.90),
    Figure("prefill_attention", "prefill attention, 16k causal, 32 heads", "ms", MATRIX, "higher", 0.50, 0.65),
    Figure("norm", "add + RMSNorm, 8k × 4096", "ms", COPY),
    Figure("rotary", "rotary + KV store, 8k tokens", "ms", COPY),
    Figure("sampling", "top-k/top-p sampling, 64 × 152k", "ms", COPY),
)


def decode_figures(shape: str) -> tuple[Figure, ...]:
    targets = _TPOT_TARGETS if shape == LLAMA else {}
    return tuple(
        Figure(
            f"{shape}/tpot_{n}", f"{shape}: TPOT, batch {n}, 1k", "ms", BYTES, "lower", *targets.get(n, (None, None))
        )
        for n in BATCHES
    )


def prefill_figures(shape: str) -> tuple[Figure, ...]:
    targets = {16: (0.55, 0.70)} if shape == LLAMA else {}
    return tuple(
        Figure(
            f"{shape}/prefill_{n}k", f"{shape}: prefill {n}k", "tok/s", MATRIX, "higher", *targets.get(n, (None,) * 2)
        )
        for n in PREFILLS
    )


THROUGHPUT = (Figure("throughput", f"{LLAMA}: 256 requests, 512 in / 256 out", "tok/s"),)
GENERATE = (
    Figure("generate", "transformers generate, one by one", "tok/s", "× slower than Relevo", "higher", 24.0, 60.0),
)
CONTINUOUS = (
    Figure("continuous", "transformers continuous batching", "tok/s", "× slower than Relevo", "higher", 3.0, 6.0),
)
HANDOVER = (Figure("handover_tail", f"{LLAMA}: hand-over tail, 16k", "ms", "of TTFT", "lower", 0.05, 0.02),)


def is_met(figure: Figure, ratio: float, target: float | None) -> bool | None:
    """None: there is no such target."""
    if target is None:
        return None
    return ratio >= target if figure.better == "higher" else ratio <= target


def ratio_text(figure: Figure, ratio: float) -> str:
    return f"{ratio:.2f} {figure.bound}" if figure.bound.startswith("×") else f"{ratio:.1%} {figure.bound}"


def target_text(figure: Figure) -> str:
    if figure.target is None:
        return ""
    sign = "≥" if figure.better == "higher" else "≤"
    return f"{sign} {figure.target:g} ×" if figure.bound.startswith("×") else f"{sign} {figure.target:.0%}"
