"""Compile before the first request what does not depend on the model; the rest is compiled when it first runs."""

from __future__ import annotations

import os

import torch

from relevo.kernels.triton.draw import sample
from relevo.kernels.triton.logprobs import score
from relevo.kernels.triton.masks import mask_logits
from relevo.kernels.triton.penalties import apply_penalties
from relevo.kernels.triton.topk import argmax, top_k

VOCAB = 16 * 512  # a multiple of 16, as vocabularies mostly are, and of several chunks


def warm_up(dtype: torch.dtype) -> None:
    """See `Kernels.warm_up`. Nothing in the interpreter."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        choose(torch.device("cuda"))


def choose(device: torch.device) -> None:
    """Everything between logits and tokens, once."""
    logits = torch.zeros(2, VOCAB, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    argmax(logits)
    top_k(logits, 2)
    score(logits, torch.zeros(2, 2, dtype=torch.int64, device=device))
    mask_logits(logits, row, torch.full((1, VOCAB // 32), -1, dtype=torch.int32, device=device))
    apply_penalties(logits, row, row, row, torch.ones(2, 3, device=device))
    sample(logits, [1.0, 0.5], [0.0, 0.1], [5, 0], [0.9, 0.8], [0.1, 0.2])
