"""Log-probabilities of tokens, of the model's own logits: before any parameter changed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.engine.host_copies import upload_ints
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


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """What is asked of some rows, as the device has it: their own token and others.

    ids, values: [n, 1 + m] int64 and float32; log-probabilities, each row's own token first
    likelier:    [n] int64, how many tokens are likelier than the first; if is_named [n, 1 + m], than each
    counts:      how many of the others each row wants
    """

    ids: Tensor
    values: Tensor
    likelier: Tensor
    counts: Sequence[int]
    is_named: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.values, self.likelier

    def read(self, ids: Tensor, values: Tensor, likelier: Tensor) -> list[TokenLogprobs]:
        """Of each row. ids, values, likelier: `tensors` in host memory"""
        rows = zip(self.counts, ids.tolist(), values.tolist(), likelier.tolist(), strict=True)
        if self.is_named:
            return [_named(*row_scores) for _, *row_scores in rows]
        return [
            TokenLogprobs(
                Logprob(row_ids[0], row_values[0], 1 + row_likelier), _ranked(row_values[1:], row_ids[1:], count)
            )
            for count, row_ids, row_values, row_likelier in rows
        ]


def score_tokens(kernels: Kernels, logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> ScoredTokens:
    """Each row's token, and so many of its likeliest. Waits for nothing.

    logits: [n, vocab] float32; token_ids: [n] int64, on its device; counts: one a row; n at least 1
    """
    ids = token_ids.unsqueeze(1)
    largest = min(max(counts), logits.shape[1])
    if largest:
        ids = torch.cat((ids, kernels.top_k(logits, largest)[1]), dim=1)
    values, likelier = kernels.score(logits, ids)
    return ScoredTokens(ids, values, likelier, counts, is_named=False)


def score_named(kernels: Kernels, logits: Tensor, token_id: Tensor, named: Sequence[int]) -> ScoredTokens:
    """One row's token, and the tokens that were asked for by id. logits: [vocab] float32; token_id: [1] int64"""
    ids = torch.cat((token_id, upload_ints(named, logits.device)))
    values, _ = kernels.score(logits.unsqueeze(0), ids.unsqueeze(0))
    likelier = torch.stack([(logits > of).sum() for of in logits[ids]])
    return ScoredTokens(ids.unsqueeze(0), values, likelier.unsqueeze(0), [len(named)], is_named=True)


def token_logprobs(kernels: Kernels, logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """See score_tokens; waits for the device."""
    scored = score_tokens(kernels, logits, token_ids, counts)
    return scored.read(*scored.tensors)


def named_logprobs(kernels: Kernels, logits: Tensor, token_id: int, named: Sequence[int]) -> TokenLogprobs:
    """See score_named; waits for the device."""
    scored = score_named(kernels, logits, upload_ints([token_id], logits.device), named)
    return scored.read(*scored.tensors)[0]


def _named(token_ids: list[int], values: list[float], likelier: list[int]) -> TokenLogprobs:
    chosen, *rest = (Logprob(i, value, 1 + count) for i, value, count in zip(token_ids, values, likelier, strict=True))
    return TokenLogprobs(chosen, tuple(rest))


def _ranked(values: list[float], token_ids: list[int], count: int) -> tuple[Logprob, ...]:
    """The first `count` of what is in descending order; equals share a rank."""
    ranked: list[Logprob] = []
    for at, (value, token_id) in enumerate(zip(values[:count], token_ids, strict=False)):
        rank = ranked[-1].rank if ranked and ranked[-1].logprob == value else at + 1
        ranked.append(Logprob(token_id, value, rank))
    return tuple(ranked)
