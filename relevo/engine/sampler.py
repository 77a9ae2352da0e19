"""Logits to tokens, each row by its own parameters, in vLLM's order:

log-probabilities of the model's own logits (if wanted)
logit_bias → min_tokens → penalties → greedy rows: argmax
                                    → the others: temperature → min_p → top_k → top_p → draw
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.core.errors import RelevoError
from relevo.core.sampling_params import SamplingParams
from relevo.engine.sampling_math import draw, filtered_weights, uniform

GREEDY_TEMPERATURE = 1e-5  # below it, as at 0, only the likeliest token is left
DRAW_ELEMENTS = 1 << 18  # rows × vocabulary drawn from at once: bounds the temporaries, and keeps them near the cache


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits needs. token_ids: prompt and output so far; the new token's position is their number."""

    sampling: SamplingParams  # seed is set
    token_ids: Sequence[int]
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Logprob:
    """rank: 1 + how many tokens are likelier."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the model's own logits, before any parameter changed them. top: the likeliest first, equals by id."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None


class BadLogits(RelevoError):
    """The model's logits hold no choice: NaN, infinity, or every token excluded. `rows` says where."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"logits of rows {list(rows)} are NaN or infinite, or leave no token to choose")
        self.rows = tuple(rows)


class Sampler:
    """Chooses one token a row. A row's token depends on that row alone: not on the batch, its order or the process."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token a row.

        logits: [n, vocab_size] float32, on the sampler's device; left as they are. Of equal logits, greedy takes the
        lowest id. Token ids outside the vocabulary in logit_bias or stop_token_ids have no effect.
        Raises BadLogits naming the rows without a finite largest logit.
        """
        assert logits.shape == (len(rows), self.vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        assert logits.dtype == torch.float32, f"logits must be float32, not {logits.dtype}"
        if not rows:
            return []
        processed = self._process(logits, rows)
        chosen = processed.argmax(dim=-1)
        # argmax takes a NaN for the largest, so that its value tells whether the row can be used.
        usable: list[bool] = processed.gather(1, chosen.unsqueeze(1)).isfinite().squeeze(1).tolist()
        if not all(usable):
            raise BadLogits([i for i, ok in enumerate(usable) if not ok])
        for indices in _groups(rows):
            for part in _parts(indices, max(1, DRAW_ELEMENTS // self.vocab_size)):
                chosen[part] = _draw_rows(processed[part], [rows[i] for i in part])
        token_ids: list[int] = chosen.tolist()
        logprobs = _logprobs(logits, rows, token_ids)
        return [SampledToken(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]

    def _process(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Bias, min_tokens and penalties; `logits` itself where no row has any."""
        changed = [i for i, row in enumerate(rows) if _changes_logits(row)]
        if not changed:
            return logits
        processed = logits.clone()
        for i in changed:
            self._process_row(processed[i], rows[i])
        return processed

    def _process_row(self, logits: Tensor, row: SamplingRow) -> None:
        sampling = row.sampling
        bias = {i: value for i, value in sampling.logit_bias.items() if i < self.vocab_size}
        if bias:
            logits[self._ids(list(bias))] += torch.tensor(list(bias.values()), device=self.device, dtype=torch.float32)
        if _below_min_tokens(row):
            stops = sampling.stop_token_ids if sampling.ignore_eos else (*row.eos_token_ids, *sampling.stop_token_ids)
            logits[self._ids([i for i in stops if i < self.vocab_size])] = -math.inf
        if sampling.repetition_penalty != 1.0:
            seen = self._ids(row.token_ids)
            values = logits[seen]
            penalty = sampling.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        output = row.token_ids[row.num_prompt_tokens :]
        if output and (sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0):
            seen, counts = torch.unique(torch.tensor(output), return_counts=True)
            seen = seen.to(self.device)
            logits[seen] -= sampling.frequency_penalty * counts.to(self.device, torch.float32)
            logits[seen] -= sampling.presence_penalty

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self.device)


def _is_greedy(sampling: SamplingParams) -> bool:
    """Also for top_k 1, where equally likely tokens would otherwise all stay."""
    return sampling.temperature < GREEDY_TEMPERATURE or sampling.top_k == 1


def _below_min_tokens(row: SamplingRow) -> bool:
    return len(row.token_ids) - row.num_prompt_tokens < row.sampling.min_tokens


def _changes_logits(row: SamplingRow) -> bool:
    return bool(row.sampling.logit_bias) or row.sampling.needs_penalties or _below_min_tokens(row)


def _groups(rows: Sequence[SamplingRow]) -> list[list[int]]:
    """Indices of the rows to draw for, those that need the same filters together: nobody pays for a neighbour's."""
    groups: dict[tuple[bool, bool, bool], list[int]] = {}
    for i, row in enumerate(rows):
        sampling = row.sampling
        if not _is_greedy(sampling):
            key = (sampling.min_p > 0.0, sampling.top_k > 0, sampling.top_p < 1.0)
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def _parts(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _draw_rows(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Rows of one group: what the first filters, all do."""
    params = [row.sampling for row in rows]
    first = params[0]
    weights = filtered_weights(
        logits,
        temperature=[p.temperature for p in params],
        min_p=[p.min_p for p in params] if first.min_p > 0.0 else None,
        top_k=[p.top_k for p in params] if first.top_k > 0 else None,
        top_p=[p.top_p for p in params] if first.top_p < 1.0 else None,
    )
    return draw(weights, [_uniform(row) for row in rows])


def _uniform(row: SamplingRow) -> float:
    seed = row.sampling.seed
    assert seed is not None, "a request's seed is set where it enters the system"
    return uniform(seed, len(row.token_ids))


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], token_ids: list[int]) -> dict[int, TokenLogprobs]:
    """By row index, for the rows that want them."""
    wanted = {i: k for i, row in enumerate(rows) if (k := row.sampling.logprobs) is not None}
    if not wanted:
        return {}
    values = logits[list(wanted)].log_softmax(dim=-1)
    ids = torch.tensor([token_ids[i] for i in wanted], device=logits.device).unsqueeze(1)
    chosen = values.gather(1, ids)
    chosen_values: list[float] = chosen.squeeze(1).tolist()
    ranks: list[int] = ((values > chosen).sum(dim=-1) + 1).tolist()
    top = values.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)
    top_values, top_ids = top.values.tolist(), top.indices.tolist()
    result = {}
    for at, (i, k) in enumerate(wanted.items()):
        likeliest = sorted(zip(top_values[at], top_ids[at], strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
        result[i] = TokenLogprobs(
            Logprob(token_ids[i], chosen_values[at], ranks[at]),
            tuple(
                Logprob(token_id, value, 1 + sum(other > value for other, _ in likeliest))
                for value, token_id in likeliest
            ),
        )
    return result
