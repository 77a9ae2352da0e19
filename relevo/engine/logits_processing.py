"""What a request's parameters do to its row of logits before a token is chosen, in this order:

allowed_token_ids → bad_words → logit_bias → min_tokens → custom processors → penalties

A row's result is a function of (SamplingParams, token_ids so far, num_prompt_tokens) and of its logits alone: the same
in any batch, after preemption, on another worker, and for a position that was only drafted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from relevo.core.errors import RelevoError
from relevo.core.output_grammar import OutputGrammar
from relevo.core.sampling_params import SamplingParams
from relevo.engine.host_copies import upload, upload_ints
from relevo.engine.logits_processors import apply_processor
from relevo.kernels import Kernels


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits needs. token_ids: prompt and output so far; the new token's position is their number."""

    sampling: SamplingParams  # seed is set
    token_ids: Sequence[int]
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...]
    grammar: OutputGrammar | None = None  # what the output must fit; GrammarMasks makes a mask of it


def process(logits: Tensor, rows: Sequence[SamplingRow], kernels: Kernels) -> tuple[Tensor, dict[int, RelevoError]]:
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
            _exclude_and_bias(processed[i], rows[i])
        except RelevoError as error:
            failures[i] = error
    _penalize(processed, {i: rows[i] for i in changed if i not in failures}, kernels)
    return processed, failures


def process_row(logits: Tensor, row: SamplingRow, kernels: Kernels) -> None:
    """In place. logits: [vocab_size] float32. Token ids outside the vocabulary have no effect."""
    _exclude_and_bias(logits, row)
    _penalize(logits.unsqueeze(0), {0: row}, kernels)


def _exclude_and_bias(logits: Tensor, row: SamplingRow) -> None:
    """Everything before the penalties."""
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
        [values] = upload([np.array(list(bias.values()), dtype=np.float32)], logits.device)
        logits[_ids(tuple(bias), vocab_size, logits.device)] += values
    if _below_min_tokens(row):
        stops = sampling.stop_token_ids if sampling.ignore_eos else (*row.eos_token_ids, *sampling.stop_token_ids)
        logits[_ids(stops, vocab_size, logits.device)] = -math.inf
    for call in sampling.logits_processors:
        prompt, output = row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :]
        logits.copy_(apply_processor(call, prompt, output, logits.clone()))


def _penalize(logits: Tensor, rows: Mapping[int, SamplingRow], kernels: Kernels) -> None:
    """rows: by their row of logits; all of them in one call."""
    entries: list[npt.NDArray[np.int64]] = []
    penalties: npt.NDArray[np.float32] = np.zeros((len(logits), 3), dtype=np.float32)
    for i, row in rows.items():
        sampling = row.sampling
        if sampling.needs_penalties:
            penalties[i] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
            token_ids, counts = _seen(row)
            entries.append(np.stack((np.full_like(token_ids, i), token_ids, counts)))
    if entries:
        (row_ids, token_ids, counts), on_device = upload([np.concatenate(entries, axis=1), penalties], logits.device)
        kernels.apply_penalties(logits, row_ids, token_ids, counts, on_device)


def _seen(row: SamplingRow) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What its penalties look at: tokens, each once, and how often each is in the output."""
    output = np.array(row.token_ids[row.num_prompt_tokens :], dtype=np.int64)
    in_output, output_counts = np.unique(output, return_counts=True)
    if row.sampling.repetition_penalty == 1.0:
        return in_output, output_counts
    token_ids = np.unique(np.array(row.token_ids, dtype=np.int64))
    counts = np.zeros_like(token_ids)
    counts[np.searchsorted(token_ids, in_output)] = output_counts
    return token_ids, counts


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
        or bool(sampling.bad_words_token_ids or sampling.logit_bias or sampling.logits_processors)
        or sampling.needs_penalties
        or _below_min_tokens(row)
    )


@lru_cache(maxsize=64)
def _ids(token_ids: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    """Those within the vocabulary. Kept: allowed_token_ids may be half of it, and are the same in every step."""
    return upload_ints([i for i in token_ids if i < vocab_size], device)
