"""What a request's parameters do to its row of logits before a token is chosen, in this order:

allowed_token_ids → bad_words → logit_bias → min_tokens → custom processors → penalties

A row's result is a function of (SamplingParams, token_ids so far, num_prompt_tokens) and of its logits alone: the same
in any batch, after preemption, on another worker, and for a position that was only drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from relevo.core.errors import RelevoError
from relevo.core.output_grammar import OutputGrammar
from relevo.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits needs. token_ids: prompt and output so far; the new token's position is their number."""

    sampling: SamplingParams  # seed is set
    token_ids: Sequence[int]
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...]
    grammar: OutputGrammar | None = None  # what the output must fit; GrammarMasks makes a mask of it


def process(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, dict[int, RelevoError]]:
    """The rows as their parameters want them, and of those that could not be processed the reason, by their index.

    logits: [n, vocab_size] float32, left as they are. Where no row changes anything they are what is returned.
    """
    changed = [i for i, row in enumerate(rows) if _changes_logits(row)]
    if not changed:
        return logits, {}
    processed = logits.clone()
    failures: dict[int, RelevoError] = {}
    for i in changed:
        try:
            process_row(processed[i], rows[i])
        except RelevoError as error:
            failures[i] = error
    return processed, failures


def process_row(logits: Tensor, row: SamplingRow) -> None:
    """In place. logits: [vocab_size] float32. Token ids outside the vocabulary have no effect."""
    sampling = row.sampling
    vocab_size = len(logits)
    if sampling.allowed_token_ids is not None:
        allowed = _ids(sampling.allowed_token_ids, vocab_size, logits.device)
        kept = logits[allowed]
        logits.fill_(-math.inf)
        logits[allowed] = kept
    banned = _banned(row)
    if banned:
        logits[_ids(tuple(banned), vocab_size, logits.device)] = -math.inf
    bias = {i: value for i, value in sampling.logit_bias.items() if i < vocab_size}
    if bias:
        values = torch.tensor(list(bias.values()), device=logits.device, dtype=torch.float32)
        logits[_ids(tuple(bias), vocab_size, logits.device)] += values
    if _below_min_tokens(row):
        stops = sampling.stop_token_ids if sampling.ignore_eos else (*row.eos_token_ids, *sampling.stop_token_ids)
        logits[_ids(stops, vocab_size, logits.device)] = -math.inf
    _penalize(logits, row)


def _penalize(logits: Tensor, row: SamplingRow) -> None:
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(row.token_ids, dtype=torch.int64, device=logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = row.token_ids[row.num_prompt_tokens :]
    if output and (sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0):
        seen, counts = torch.unique(torch.tensor(output), return_counts=True)
        seen = seen.to(logits.device)
        logits[seen] -= sampling.frequency_penalty * counts.to(logits.device, torch.float32)
        logits[seen] -= sampling.presence_penalty


def _banned(row: SamplingRow) -> list[int]:
    """The last tokens of those bad words whose other tokens the output ends with. The prompt is not looked at."""
    banned = []
    num_output_tokens = len(row.token_ids) - row.num_prompt_tokens
    for word in row.sampling.bad_words_token_ids:
        num_before = len(word) - 1
        if num_before <= num_output_tokens:
            end = len(row.token_ids)
            if tuple(row.token_ids[end - num_before : end]) == word[:-1]:
                banned.append(word[-1])
    return banned


def _below_min_tokens(row: SamplingRow) -> bool:
    return len(row.token_ids) - row.num_prompt_tokens < row.sampling.min_tokens


def _changes_logits(row: SamplingRow) -> bool:
    sampling = row.sampling
    return (
        sampling.allowed_token_ids is not None
        or bool(sampling.bad_words_token_ids or sampling.logit_bias)
        or sampling.needs_penalties
        or _below_min_tokens(row)
    )


@lru_cache(maxsize=64)
def _ids(token_ids: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    """Those within the vocabulary. Kept: allowed_token_ids may be half of it, and are the same in every step."""
    return torch.tensor([i for i in token_ids if i < vocab_size], dtype=torch.int64, device=device)
