"""Logits to tokens, each row by its own parameters, in vLLM's order:

log-probabilities of the model's own logits (if wanted)
logit_bias → min_tokens → penalties → grammar → greedy rows: argmax
                                              → the others: temperature → min_p → top_k → top_p → draw
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.core.errors import RelevoError
from relevo.core.output_grammar import OutputGrammar
from relevo.core.sampling_params import SamplingParams
from relevo.engine.grammar_masks import Masks
from relevo.engine.sampling_math import uniform
from relevo.kernels import Kernels

GREEDY_TEMPERATURE = 1e-5  # below it, as at 0, only the likeliest token is left


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits needs. token_ids: prompt and output so far; the new token's position is their number."""

    sampling: SamplingParams  # seed is set
    token_ids: Sequence[int]
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...]
    grammar: OutputGrammar | None = None  # what the output must fit; GrammarMasks makes a mask of it


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

    def __init__(self, vocab_size: int, device: torch.device | str, kernels: Kernels) -> None:
        self.vocab_size = vocab_size
        self.kernels = kernels
        self.device = torch.device(device)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None) -> list[SampledToken]:
        """One token a row.

        masks: of the rows that have a grammar. It is the last to exclude tokens, and it wins: where other parameters
        leave it nothing (min_tokens, where only the end of text fits), they do not count for this token.

        logits: [n, vocab_size] float32, on the sampler's device; left as they are. Of equal logits, greedy takes the
        lowest id. Token ids outside the vocabulary in logit_bias or stop_token_ids have no effect.
        Raises BadLogits naming the rows without a finite largest logit.
        """
        assert logits.shape == (len(rows), self.vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        assert logits.dtype == torch.float32, f"logits must be float32, not {logits.dtype}"
        if not rows:
            return []
        processed = self._process(logits, rows)
        if masks is not None:
            processed = processed.clone() if processed is logits else processed
            self.kernels.mask_logits(processed, masks.rows, masks.words)
        chosen, usable = self._likeliest(processed)
        if masks is not None and not all(usable):
            self._let_masks_win(processed, logits, masks, usable)
            chosen, usable = self._likeliest(processed)
        if not all(usable):
            raise BadLogits([i for i, ok in enumerate(usable) if not ok])
        drawn = [i for i, row in enumerate(rows) if not _is_greedy(row.sampling)]
        if len(drawn) == len(rows):
            chosen = self._draw(processed, rows)
        elif drawn:
            chosen[drawn] = self._draw(processed[drawn], [rows[i] for i in drawn])
        token_ids: list[int] = chosen.tolist()
        logprobs = self._logprobs(logits, rows, token_ids)
        return [SampledToken(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, list[bool]]:
        """The largest of each row, and whether it is finite: argmax takes a NaN for the largest."""
        chosen = self.kernels.argmax(logits)
        return chosen, logits.gather(1, chosen.unsqueeze(1)).isfinite().squeeze(1).tolist()

    def _let_masks_win(self, processed: Tensor, logits: Tensor, masks: Masks, usable: list[bool]) -> None:
        """The rows that have no token left: the model's own logits, with the mask alone."""
        is_usable = torch.tensor(usable, device=self.device)[masks.rows].unsqueeze(1)
        processed[masks.rows] = torch.where(is_usable, processed[masks.rows], logits[masks.rows])
        self.kernels.mask_logits(processed, masks.rows, masks.words)

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

    def _draw(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        params = [row.sampling for row in rows]
        return self.kernels.sample(
            logits,
            temperature=[p.temperature for p in params],
            min_p=[p.min_p for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            uniforms=[_uniform(row) for row in rows],
        )

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplingRow], token_ids: list[int]) -> dict[int, TokenLogprobs]:
        """By row index, for the rows that want them."""
        wanted = {i: k for i, row in enumerate(rows) if (k := row.sampling.logprobs) is not None}
        if not wanted:
            return {}
        if len(wanted) < len(rows):
            logits = logits[list(wanted)]
        ids = self._ids([token_ids[i] for i in wanted]).unsqueeze(1)
        largest = min(max(wanted.values()), self.vocab_size)
        if largest:
            ids = torch.cat((ids, self.kernels.top_k(logits, largest)[1]), dim=1)
        values, likelier = self.kernels.score(logits, ids)
        scored = zip(wanted.items(), ids.tolist(), values.tolist(), likelier.tolist(), strict=True)
        return {
            i: TokenLogprobs(
                Logprob(row_ids[0], row_values[0], 1 + row_likelier), _ranked(row_values[1:], row_ids[1:], k)
            )
            for (i, k), row_ids, row_values, row_likelier in scored
        }

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self.device)


def _is_greedy(sampling: SamplingParams) -> bool:
    """Also for top_k 1, where equally likely tokens would otherwise all stay."""
    return sampling.temperature < GREEDY_TEMPERATURE or sampling.top_k == 1


def _below_min_tokens(row: SamplingRow) -> bool:
    return len(row.token_ids) - row.num_prompt_tokens < row.sampling.min_tokens


def _changes_logits(row: SamplingRow) -> bool:
    return bool(row.sampling.logit_bias) or row.sampling.needs_penalties or _below_min_tokens(row)


def _uniform(row: SamplingRow) -> float:
    seed = row.sampling.seed
    assert seed is not None, "a request's seed is set where it enters the system"
    return uniform(seed, len(row.token_ids))


def _ranked(values: list[float], token_ids: list[int], count: int) -> tuple[Logprob, ...]:
    """The first `count` of what is in descending order; equals share a rank."""
    ranked: list[Logprob] = []
    for at, (value, token_id) in enumerate(zip(values[:count], token_ids, strict=False)):
        rank = ranked[-1].rank if ranked and ranked[-1].logprob == value else at + 1
        ranked.append(Logprob(token_id, value, rank))
    return tuple(ranked)
