from __future__ import annotations

import math

import pytest
import torch

from relevo.kernels import load_backend


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 4096, 4099])
def test_a_mask_excludes_what_its_bits_do_not_name(backend: str, vocab: int) -> None:
    kernels = load_backend(backend, "cpu")
    logits = torch.randn(5, vocab + 3)[:, :vocab]  # rows that do not lie side by side
    allowed = torch.rand(3, vocab) < torch.tensor([[0.0], [0.5], [1.1]])
    words = torch.zeros(3, -(-vocab // 32), dtype=torch.int64)
    for token_id in range(vocab):
        words[:, token_id // 32] |= allowed[:, token_id].long() << (token_id % 32)
    masks = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    if vocab % 32:
        masks[:, -1] |= -1 << (vocab % 32)  # bits behind the vocabulary say nothing
    expected = logits.clone()
    expected[[4, 0, 2]] = expected[[4, 0, 2]].masked_fill(~allowed, -math.inf)
    kernels.mask_logits(logits, torch.tensor([4, 0, 2]), masks)
    assert logits.equal(expected)
