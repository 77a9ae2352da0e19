"""Choosing tokens: the same ones as the definition in `relevo.kernels.reference`.

Probabilities may differ in their last bits, which moves the borders between tokens by under 1e-5 in total: of these
draws one in some thousand runs may be another.
"""

from __future__ import annotations

import torch

from bench.gpu.checks import CheckFunction, require_close, require_equal
from relevo.kernels import Kernels, reference


def sampling_checks() -> dict[str, CheckFunction]:
    return {
        "argmax and top-k": _largest,
        "sampling": _sample,
        "log-probabilities": _score,
        "grammar mask": _mask,
        "penalties": _penalties,
    }


def _logits(device: torch.device, tiny: bool) -> torch.Tensor:
    """Rounded: many are equal."""
    return (torch.randn(4 if tiny else 8, 1030 if tiny else 151_936, device=device) * 30).round() / 10


def _largest(kernels: Kernels, device: torch.device, tiny: bool) -> None:
    logits = _logits(device, tiny)
    require_equal(kernels.argmax(logits), reference.argmax(logits), "ids")
    for k in (1, 50):
        (values, ids), (expected, expected_ids) = kernels.top_k(logits, k), reference.top_k(logits, k)
        require_equal(ids, expected_ids, f"ids of top {k}")
        require_equal(values, expected, f"values of top {k}")


def _sample(kernels: Kernels, device: torch.device, tiny: bool) -> None:
    logits = _logits(device, tiny)
    rows = len(logits)
    temperature = [0.3, 1.0, 2.0, 5.0, 0.7, 1.0, 1.5, 0.9][:rows]
    for case in (0, 2, 7) if tiny else range(8):
        min_p = [0.05 if case & 1 else 0.0] * rows
        top_k = [0 if case & 2 == 0 else k for k in (2, 50, 1000, 3, 1, 5, 10**6, 20)][:rows]
        top_p = [1.0 if case & 4 == 0 else p for p in (0.3, 0.9, 0.999, 1e-9, 0.5, 0.1, 0.99, 0.8)][:rows]
        uniforms: list[float] = torch.rand(rows, dtype=torch.float64).tolist()
        ids = kernels.sample(logits, temperature, min_p, top_k, top_p, uniforms)
        expected = reference.sample(logits, temperature, min_p, top_k, top_p, uniforms)
        require_equal(ids, expected, f"tokens, filters {case}")


def _score(kernels: Kernels, device: torch.device, tiny: bool) -> None:
    logits = _logits(device, tiny)
    ids = torch.randint(0, logits.shape[1], (len(logits), 5), device=device)
    values, likelier = kernels.score(logits, ids)
    require_equal(likelier, reference.score(logits, ids)[1], "ranks")
    expected = logits.double().log_softmax(dim=-1).gather(1, ids)
    require_close(values, expected, relative=1e-5, absolute=1e-5)


def _mask(kernels: Kernels, device: torch.device, tiny: bool) -> None:
    logits = _logits(device, tiny)
    words = -(-logits.shape[1] // 32)
    masks = torch.randint(-(2**31), 2**31, (2, words), dtype=torch.int64, device=device).to(torch.int32)
    rows, expected = torch.tensor([2, 0], device=device), logits.clone()
    kernels.mask_logits(logits, rows, masks)
    reference.mask_logits(expected, rows, masks)
    require_equal(logits, expected, "logits")


def _penalties(kernels: Kernels, device: torch.device, tiny: bool) -> None:
    logits = _logits(device, tiny)
    ids = torch.randperm(logits.shape[1], device=device)[:60]
    rows = torch.arange(60, device=device) % len(logits)
    counts = torch.randint(0, 4, (60,), device=device)
    penalties = torch.rand(len(logits), 3, device=device) + 0.5
    expected = logits.double()
    kernels.apply_penalties(logits, rows, ids, counts, penalties)
    reference.apply_penalties(expected, rows, ids, counts, penalties.double())
    require_close(logits, expected, relative=1e-5, absolute=1e-5)
