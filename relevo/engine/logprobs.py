"""Log-probabilities of tokens, of the model's own logits: before any parameter changed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.kernels import Kernels


@dataclass(frozen=True, slots=True)
class Logprob:
    """rank: 1 + how many tokens are likelier."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """top: the likeliest first, equals by id; or, if tokens were asked for by id, those in the order asked for."""

    chosen: Logprob
    top: tuple[Logprob, ...]


def token_logprobs(
    kernels: Kernels, logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Each row's token, and so many of its likeliest.

    logits: [n, vocab] float32; token_ids, counts: one a row
    """
    if not token_ids:
        return []
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(1)
    largest = min(max(counts), logits.shape[1])
    if largest:
        ids = torch.cat((ids, kernels.top_k(logits, largest)[1]), dim=1)
    values, likelier = kernels.score(logits, ids)
    scored = zip(counts, ids.tolist(), values.tolist(), likelier.tolist(), strict=True)
    return [
        TokenLogprobs(Logprob(row_ids[0], row_values[0], 1 + row_likelier), _ranked(row_values[1:], row_ids[1:], count))
        for count, row_ids, row_values, row_likelier in scored
    ]


def named_logprobs(kernels: Kernels, logits: Tensor, token_id: int, named: Sequence[int]) -> TokenLogprobs:
    """One row's token, and the tokens that were asked for by id. logits: [vocab] float32"""
    ids = [token_id, *named]
    values, _ = kernels.score(logits.unsqueeze(0), torch.tensor([ids], dtype=torch.int64, device=logits.device))
    ranks = [1 + int((logits > logits[i]).sum()) for i in ids]
    chosen, *rest = [Logprob(*each) for each in zip(ids, values[0].tolist(), ranks, strict=True)]
    return TokenLogprobs(chosen, tuple(rest))


def _ranked(values: list[float], token_ids: list[int], count: int) -> tuple[Logprob, ...]:
    """The first `count` of what is in descending order; equals share a rank."""
    ranked: list[Logprob] = []
    for at, (value, token_id) in enumerate(zip(values[:count], token_ids, strict=False)):
        rank = ranked[-1].rank if ranked and ranked[-1].logprob == value else at + 1
        ranked.append(Logprob(token_id, value, rank))
    return tuple(ranked)
