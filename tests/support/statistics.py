"""Goodness of fit: p-values of Pearson's chi-squared and of the Kolmogorov-Smirnov test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def chi_squared_pvalue(observed: Tensor, expected: Tensor) -> float:
    """Chance of counts at least this far from the expected ones; len - 1 degrees of freedom. Both: [n], same sum."""
    observed, expected = observed.double(), expected.double()
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def uniform_pvalue(values: Sequence[float]) -> float:
    """Of the hypothesis that values are uniform in [0, 1): Kolmogorov-Smirnov, asymptotic (Stephens 1970)."""
    n = len(values)
    ordered = sorted(values)
    distance = max(max((i + 1) / n - value, value - i / n) for i, value in enumerate(ordered))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.2:
        return 1.0  # where the series below converges slowly, and to this
    return 2 * sum((1 if k % 2 else -1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
