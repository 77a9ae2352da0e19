"""Logits to tokens, each row by its own parameters, in vLLM's order:

log-probabilities of the model's own logits (if wanted)
logits_processing → grammar → greedy rows: argmax
                            → the others: temperature → min_p → top_k → top_p → draw
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from relevo.core.errors import InvalidRequest, RelevoError
from relevo.core.sampling_params import SamplingParams
from relevo.engine.beams import BeamCandidates, beam_candidates
from relevo.engine.grammar_masks import Masks
from relevo.engine.host_copies import Download, upload, upload_ints
from relevo.engine.logits_processing import SamplingRow, process
from relevo.engine.logprobs import ScoredTokens, TokenLogprobs, score_named, score_tokens
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


@dataclass(frozen=True, slots=True)
class EnqueuedTokens:
    """Tokens that are being chosen, one a row.

    token_ids: [n] int64, on the device: for the next step's input
    read: waits for the device, and says what came of each row
    """

    token_ids: Tensor
    read: Callable[[], list[Sampled]]


class Sampler:
    """Chooses one token a row. A row's token depends on that row alone: not on the batch, its order or the process."""

    def __init__(self, vocab_size: int, device: torch.device | str, kernels: Kernels) -> None:
        self.vocab_size = vocab_size
        self.kernels = kernels
        self.device = torch.device(device)
        self._on_host = self.device.type == "cpu"  # where looking costs nothing

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None) -> list[Sampled]:
        """One token a row, or why there is none: BadLogits, InvalidRequest if the row's parameters leave no token.

        masks: of the rows that have a grammar. It is the last to exclude tokens, and it wins: where other parameters
        leave it nothing (min_tokens, where only the end of text fits), they do not count for this token.

        logits: [n, vocab_size] float32, on the sampler's device; left as they are. Of equal logits, greedy takes the
        lowest id. Token ids outside the vocabulary, in any parameter, have no effect.
        """
        return self.enqueue(logits, rows, masks).read()

    def enqueue(self, logits: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None) -> EnqueuedTokens:
        """As sample(), without waiting for the device, but for rows of beams. `logits` may change once it returns."""
        assert logits.shape == (len(rows), self.vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        assert logits.dtype == torch.float32, f"logits must be float32, not {logits.dtype}"
        beams = [i for i, row in enumerate(rows) if row.sampling.use_beam_search]
        if beams:
            return self._with_beams(logits, rows, beams, masks)
        if not rows:
            return self._no_rows()
        processed, failures = process(logits, rows, self.kernels)
        if masks is None:
            chosen, usable = self._likeliest(processed)
        else:
            processed = processed.clone() if processed is logits else processed
            chosen, usable = self._mask(processed, logits, masks)
        has_choice = self._has_choice(logits, usable) if processed is not logits else usable
        chosen = self._draw(processed, rows, chosen, usable, failures)
        scored = self._score(logits, rows, chosen)
        download = Download([chosen, usable, has_choice, *(t for _, its in scored for t in its.tensors)], self.device)

        def read() -> list[Sampled]:
            token_ids, are_usable, have_choices, *tensors = download.wait()
            logprobs: dict[int, TokenLogprobs] = {}
            for at, (indices, its) in enumerate(scored):
                logprobs.update(zip(indices, its.read(*tensors[3 * at : 3 * at + 3]), strict=True))
            each = zip(token_ids.tolist(), are_usable.tolist(), have_choices.tolist(), strict=True)
            return [
                failures.get(i) or (SampledToken(token_id, logprobs.get(i)) if ok else _no_choice(has_choice))
                for i, (token_id, ok, has_choice) in enumerate(each)
            ]

        return EnqueuedTokens(chosen, read)

    def _no_rows(self) -> EnqueuedTokens:
        download = Download([], self.device)

        def read() -> list[Sampled]:
            download.wait()
            return []

        return EnqueuedTokens(torch.empty(0, dtype=torch.int64, device=self.device), read)

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of each row, and whether it is finite: argmax takes a NaN for the largest."""
        chosen = self.kernels.argmax(logits)
        return chosen, logits.gather(1, chosen.unsqueeze(1)).isfinite().squeeze(1)

    def _has_choice(self, logits: Tensor, usable: Tensor) -> Tensor:
        """Of the rows that are not usable: whether that is not for the model's own logits, [n, vocab_size]."""
        if self._on_host and bool(usable.all()):
            return usable
        return logits.amax(dim=1).isfinite()

    def _mask(self, processed: Tensor, logits: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """In place; what is likeliest then. Rows that would have no token left are the model's own logits, with the
        mask alone.
        """
        rows, words = upload([masks.rows, masks.words], self.device)
        self.kernels.mask_logits(processed, rows, words)
        chosen, usable = self._likeliest(processed)
        if self._on_host and bool(usable.all()):
            return chosen, usable
        is_usable = usable.index_select(0, rows).unsqueeze(1)
        processed[rows] = torch.where(is_usable, processed[rows], logits[rows])
        self.kernels.mask_logits(processed, rows, words)
        return self._likeliest(processed)

    def _with_beams(
        self, logits: Tensor, rows: Sequence[SamplingRow], beams: Sequence[int], masks: Masks | None
    ) -> EnqueuedTokens:
        """Rows of beams bring what they could go on with, the others their token. Beams have no masks."""
        others = sorted({*range(len(rows))} - {*beams})
        if masks is not None:
            masks = replace(masks, rows=np.searchsorted(others, masks.rows))
        enqueued = self.enqueue(logits[upload_ints(others, self.device)], [rows[i] for i in others], masks)
        candidates: dict[int, Sampled] = {}
        for i in beams:
            try:
                finite = bool(logits[i].max().isfinite())
                candidates[i] = beam_candidates(self.kernels, logits[i], rows[i]) if finite else BadLogits()
            except RelevoError as error:
                candidates[i] = error

        def read() -> list[Sampled]:
            sampled = candidates | dict(zip(others, enqueued.read(), strict=True))
            return [sampled[i] for i in range(len(rows))]

        return EnqueuedTokens(enqueued.token_ids, read)

    def _draw(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        chosen: Tensor,
        usable: Tensor,
        failures: Mapping[int, RelevoError],
    ) -> Tensor:
        """`chosen`, with what is drawn for the rows that are not greedy."""
        drawn = [i for i, row in enumerate(rows) if i not in failures and not _is_greedy(row.sampling)]
        if self._on_host:
            are_usable: list[bool] = usable.tolist()
            drawn = [i for i in drawn if are_usable[i]]
        elif drawn:
            # There is nothing to draw from in a row without a finite largest logit; what comes of it is dropped.
            logits = logits.masked_fill(~usable.unsqueeze(1), 0.0)
        if not drawn:
            return chosen
        params = [rows[i].sampling for i in drawn]
        indices = None if len(drawn) == len(rows) else upload_ints(drawn, self.device)
        token_ids = self.kernels.sample(
            logits if indices is None else logits.index_select(0, indices),
            temperature=[p.temperature for p in params],
            min_p=[p.min_p for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            uniforms=[_uniform(rows[i]) for i in drawn],
        )
        return token_ids if indices is None else chosen.index_copy_(0, indices, token_ids)

    def _score(
        self, logits: Tensor, rows: Sequence[SamplingRow], chosen: Tensor
    ) -> list[tuple[Sequence[int], ScoredTokens]]:
        """For the rows that want log-probabilities: by their indices."""
        wanted = {i: k for i, row in enumerate(rows) if (k := row.sampling.logprobs) is not None}
        if not wanted:
            return []
        named = {i: rows[i].sampling.logprob_token_ids for i in wanted if rows[i].sampling.logprob_token_ids}
        counts = {i: k for i, k in wanted.items() if i not in named}
        scored: list[tuple[Sequence[int], ScoredTokens]] = []
        if counts:
            indices = None if len(counts) == len(rows) else upload_ints(list(counts), self.device)
            likeliest = logits if indices is None else logits.index_select(0, indices)
            its = chosen if indices is None else chosen.index_select(0, indices)
            scored.append((list(counts), score_tokens(self.kernels, likeliest, its, list(counts.values()))))
        for i, ids in named.items():
            within = [j for j in ids if j < self.vocab_size]
            scored.append(([i], score_named(self.kernels, logits[i], chosen[i : i + 1], within)))
        return scored


def _no_choice(has_choice: bool) -> RelevoError:
    """Why a row has no finite largest logit after processing. has_choice: the model's own logits have one"""
    if not has_choice:
        return BadLogits()
    return InvalidRequest("the parameters (allowed_token_ids, bad_words, stop tokens before min_tokens) leave no token")


def _is_greedy(sampling: SamplingParams) -> bool:
    """Also for top_k 1, where equally likely tokens would otherwise all stay."""
    return sampling.temperature < GREEDY_TEMPERATURE or sampling.top_k == 1


def _uniform(row: SamplingRow) -> float:
    seed = row.sampling.seed
    assert seed is not None, "a request's seed is set where it enters the system"
    return uniform(seed, len(row.token_ids))
