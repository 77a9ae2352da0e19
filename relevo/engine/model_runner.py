"""Runs the model over what the scheduler chose: one flat batch, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from relevo.core.errors import RelevoError
from relevo.core.schedule import ScheduledRequest
from relevo.engine.batch import Span, flat_batch
from relevo.engine.beams import BeamCandidates
from relevo.engine.grammar_masks import GrammarMasks
from relevo.engine.kv_cache import KVCache
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.logprobs import TokenLogprobs
from relevo.engine.prompt_logprobs import PromptRows
from relevo.engine.sampler import SampledToken, Sampler
from relevo.engine.spec_decode.verification import accept, sampling_rows
from relevo.kernels import Kernels
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class RunResult:
    """By request id.

    sampled: of each request whose known tokens are all computed, what follows them: the drafts that are accepted, and
        one more, or why there is none. They may go on behind the request's end
    candidates: of those that are hypotheses of a beam search, instead
    prompt_logprobs: of those prompts' tokens that a step has computed and that are asked for
    """

    sampled: dict[str, list[SampledToken] | RelevoError]
    candidates: dict[str, BeamCandidates]
    prompt_logprobs: dict[str, list[TokenLogprobs]]


class ModelRunner:
    """One step on the device: inputs and attention metadata, forward, sampling."""

    def __init__(
        self, model: CausalLM, kv_cache: KVCache, kernels: Kernels, sampler: Sampler, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.kernels = kernels
        self.sampler = sampler
        self.eos_token_ids = eos_token_ids
        self.device = kv_cache.storage.device
        self.block_size = kv_cache.layout.block_size
        self._grammar_masks = GrammarMasks(sampler.vocab_size, self.device)

    def run(self, scheduled: Sequence[ScheduledRequest]) -> RunResult:
        """Compute the scheduled tokens."""
        token_ids: list[int] = []
        sampled_rows: list[int] = []  # of the flat batch: those whose logits choose tokens
        rows: list[SamplingRow] = []
        sampling: list[ScheduledRequest] = []
        prompt_rows = PromptRows()
        for entry in scheduled:
            prompt_rows.add(entry, len(token_ids))
            token_ids += entry.token_ids
            if entry.samples:
                sampling.append(entry)
                own = sampling_rows(entry.request, entry.draft_token_ids, self.eos_token_ids)
                sampled_rows += range(len(token_ids) - len(own), len(token_ids))
                rows += own
        masks = self._grammar_masks.begin(rows)
        spans = [Span(e.request.block_ids, e.request.num_computed_tokens, e.num_scheduled_tokens) for e in scheduled]
        positions, metadata = flat_batch(spans, self.block_size, self.device)
        logits = self.model.forward(
            torch.tensor(token_ids, device=self.device),
            positions,
            AttentionContext(metadata=metadata, layers=self.kv_cache.layers, kernels=self.kernels),
            torch.tensor(sampled_rows + prompt_rows.indices, dtype=torch.int64, device=self.device),
        )
        self.kv_cache.step_launched()
        drawn = iter(self.sampler.sample(logits[: len(rows)], rows, masks.result() if masks else None))
        result = RunResult({}, {}, prompt_rows.score(self.kernels, logits[len(rows) :]))
        for entry in sampling:
            own_drawn = list(islice(drawn, 1 + len(entry.draft_token_ids)))
            if isinstance(own_drawn[0], list):
                result.candidates[entry.request.request_id] = own_drawn[0]
            else:
                result.sampled[entry.request.request_id] = accept(entry.draft_token_ids, own_drawn)
        self.kv_cache.step_settled()
        return result
