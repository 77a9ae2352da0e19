"""Penalties of every backend, against the formula one token at a time. Tolerance: two roundings of float32."""

from __future__ import annotations

import math

import pytest
import torch

from relevo.kernels import load_backend


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257])
def test_penalties_are_those_of_each_row_and_of_its_tokens_alone(backend: str, tokens: int) -> None:
    kernels = load_backend(backend, "cpu")
    vocab = 300
    logits = (torch.randn(4, vocab + 5) * 3)[:, 2 : 2 + vocab]  # rows that do not lie side by side
    logits[2, :20] = -math.inf
    penalties = torch.tensor([[1.0, 0.0, 0.0], [1.3, 0.0, 0.0], [0.7, 0.5, 0.25], [2.0, -0.5, -1.0]])
    places = torch.randperm(4 * vocab)[:tokens]
    rows, token_ids, counts = places // vocab, places % vocab, torch.randint(0, 4, (tokens,))
    expected = logits.clone()
    for row, token_id, count in zip(rows.tolist(), token_ids.tolist(), counts.tolist(), strict=True):
        repetition, frequency, presence = penalties[row].tolist()
        value = float(logits[row, token_id])
        value = value / repetition if value > 0 else value * repetition
        expected[row, token_id] = value - frequency * count - (presence if count else 0.0)
    kernels.apply_penalties(logits, rows, token_ids, counts, penalties)
    torch.testing.assert_close(logits, expected, rtol=2.0**-22, atol=2.0**-22)
