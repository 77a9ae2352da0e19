"""Logits to tokens, each row by its own parameters, in vLLM's order:

log-probabilities of the model's own logits (if wanted)
logits_processing → grammar → greedy rows: argmax
                            → the others: temperature → min_p → top_k → top_p → draw
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relevo.core.errors import InvalidRequest, RelevoError
from relevo.core.sampling_params import SamplingParams
from relevo.engine.beams import BeamCandidates, beam_candidates
from relevo.engine.grammar_masks import Masks
from relevo.engine.logits_processing import SamplingRow, process
from relevo.engine.logprobs import TokenLogprobs, named_logprobs, token_logprobs
from relevo.engine.sampling_math import uniform
from relevo.kernels import Kernels

GREEDY_TEMPERATURE = 1e-5  # below it, as at 0, only the likeliest token is left


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None


Sampled = SampledToken | BeamCandidates | RelevoError  # an error ends its own request alone


class BadLogits(RelevoError):
    """The model's logits hold no choice: they are NaN, or none is finite."""

    def __init__(self) -> None:
        super().__init__("the model's logits are NaN or infinite")


class Sampler:
    """Chooses one token a row. A row's token depends on that row alone: not on the batch, its order or the process."""

    def __init__(self, vocab_size: int, device: torch.device | str, kernels: Kernels) -> None:
        self.vocab_size = vocab_size
        self.kernels = kernels
        self.device = torch.device(device)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None) -> list[Sampled]:
        """One token a row, or why there is none: BadLogits, InvalidRequest if the row's parameters leave no token.

        masks: of the rows that have a grammar. It is the last to exclude tokens, and it wins: where other parameters
        leave it nothing (min_tokens, where only the end of text fits), they do not count for this token.

        logits: [n, vocab_size] float32, on the sampler's device; left as they are. Of equal logits, greedy takes the
        lowest id. Token ids outside the vocabulary, in any parameter, have no effect.
        """
        assert logits.shape == (len(rows), self.vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        assert logits.dtype == torch.float32, f"logits must be float32, not {logits.dtype}"
        if not rows:
            return []
        beams = [i for i, row in enumerate(rows) if row.sampling.use_beam_search]
        if beams:
            return self._with_beams(logits, rows, frozenset(beams), masks)
        processed, failures = process(logits, rows, self.kernels)
        if masks is not None:
            processed = processed.clone() if processed is logits else processed
            self.kernels.mask_logits(processed, masks.rows, masks.words)
        chosen, usable = self._likeliest(processed)
        if masks is not None and not all(usable):
            self._let_masks_win(processed, logits, masks, usable)
            chosen, usable = self._likeliest(processed)
        for i, ok in enumerate(usable):
            if not ok and i not in failures:
                failures[i] = _no_choice(logits[i])
        drawn = [i for i, row in enumerate(rows) if i not in failures and not _is_greedy(row.sampling)]
        if len(drawn) == len(rows):
            chosen = self._draw(processed, rows)
        elif drawn:
            chosen[drawn] = self._draw(processed[drawn], [rows[i] for i in drawn])
        token_ids: list[int] = chosen.tolist()
        logprobs = self._logprobs(logits, rows, token_ids)
        return [
            failures[i] if i in failures else SampledToken(token_id, logprobs.get(i))
            for i, token_id in enumerate(token_ids)
        ]

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, list[bool]]:
        """The largest of each row, and whether it is finite: argmax takes a NaN for the largest."""
        chosen = self.kernels.argmax(logits)
        return chosen, logits.gather(1, chosen.unsqueeze(1)).isfinite().squeeze(1).tolist()

    def _let_masks_win(self, processed: Tensor, logits: Tensor, masks: Masks, usable: list[bool]) -> None:
        """The rows that have no token left: the model's own logits, with the mask alone."""
        is_usable = torch.tensor(usable, device=self.device)[masks.rows].unsqueeze(1)
        processed[masks.rows] = torch.where(is_usable, processed[masks.rows], logits[masks.rows])
        self.kernels.mask_logits(processed, masks.rows, masks.words)

    def _with_beams(
        self, logits: Tensor, rows: Sequence[SamplingRow], beams: frozenset[int], masks: Masks | None
    ) -> list[Sampled]:
        """Rows of beams bring what they could go on with, the others their token. Beams have no masks."""
        others = [i for i in range(len(rows)) if i not in beams]
        if masks is not None:
            among_others = [others.index(i) for i in masks.rows.tolist()]
            masks = replace(masks, rows=torch.tensor(among_others, dtype=torch.int64, device=self.device))
        tokens = self.sample(logits[others], [rows[i] for i in others], masks)
        sampled = dict(zip(others, tokens, strict=True))
        for i in beams:
            try:
                finite = bool(logits[i].max().isfinite())
                sampled[i] = beam_candidates(self.kernels, logits[i], rows[i]) if finite else BadLogits()
            except RelevoError as error:
                sampled[i] = error
        return [sampled[i] for i in range(len(rows))]

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
        named = {i: rows[i].sampling.logprob_token_ids for i in wanted if rows[i].sampling.logprob_token_ids}
        counts = {i: k for i, k in wanted.items() if i not in named}
        likeliest = logits if len(counts) == len(rows) else logits[list(counts)]
        scored = token_logprobs(self.kernels, likeliest, [token_ids[i] for i in counts], list(counts.values()))
        by_row = dict(zip(counts, scored, strict=True))
        for i, ids in named.items():
            by_row[i] = named_logprobs(self.kernels, logits[i], token_ids[i], [j for j in ids if j < self.vocab_size])
        return by_row


def _no_choice(logits: Tensor) -> RelevoError:
    """Why a row has no finite largest logit after processing. logits: [vocab_size], the model's own"""
    if not bool(logits.max().isfinite()):
        return BadLogits()
    return InvalidRequest("the parameters (allowed_token_ids, bad_words, stop tokens before min_tokens) leave no token")


def _is_greedy(sampling: SamplingParams) -> bool:
    """Also for top_k 1, where equally likely tokens would otherwise all stay."""
    return sampling.temperature < GREEDY_TEMPERATURE or sampling.top_k == 1


def _uniform(row: SamplingRow) -> float:
    seed = row.sampling.seed
    assert seed is not None, "a request's seed is set where it enters the system"
    return uniform(seed, len(row.token_ids))
