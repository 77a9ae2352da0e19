"""Runs the model over what the scheduler chose: one flat batch, no padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from relevo.core.errors import RelevoError
from relevo.core.schedule import ScheduledRequest
from relevo.engine.batch import Span, flat_batch
from relevo.engine.beams import BeamCandidates
from relevo.engine.forward_pass import ForwardPass, LateTokens
from relevo.engine.grammar_masks import GrammarMasks
from relevo.engine.kv_cache import KVCache
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.logprobs import TokenLogprobs
from relevo.engine.prompt_logprobs import PromptRows
from relevo.engine.sampler import EnqueuedTokens, SampledToken, Sampler
from relevo.engine.spec_decode.verification import accept, sampling_rows
from relevo.kernels import Kernels
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


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device may not be through with.

    sampling: what choose tokens, in the order of tokens' rows
    read_prompts: see PromptRows.enqueue
    settled: to be called when its results are known
    """

    sampling: Sequence[ScheduledRequest]
    tokens: EnqueuedTokens
    read_prompts: Callable[[], dict[str, list[TokenLogprobs]]]
    settled: Callable[[], None]

    def wait(self) -> RunResult:
        drawn = iter(self.tokens.read())
        result = RunResult({}, {}, self.read_prompts())
        self.settled()
        for entry in self.sampling:
            own_drawn = list(islice(drawn, 1 + len(entry.draft_token_ids)))
            if isinstance(own_drawn[0], list):
                result.candidates[entry.request.request_id] = own_drawn[0]
            else:
                result.sampled[entry.request.request_id] = accept(entry.draft_token_ids, own_drawn)
        return result

    def late_tokens(self, scheduled: Sequence[ScheduledRequest]) -> LateTokens | None:
        """The tokens of a step after this one, scheduled before this one's are known, that are this one's."""
        row_of = {id(entry.request): row for row, entry in enumerate(self.sampling)}
        at: list[int] = []
        of: list[int] = []
        num_tokens = 0
        for entry in scheduled:
            num_tokens += entry.num_scheduled_tokens
            if entry.request.num_pending_tokens and entry.samples:
                at.append(num_tokens - 1)
                of.append(row_of[id(entry.request)])
        if not at:
            return None
        return LateTokens(np.array(at, dtype=np.int64), np.array(of, dtype=np.int64), self.tokens.token_ids)


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
        self.forward = ForwardPass(model, kv_cache, kernels)
        self._grammar_masks = GrammarMasks(sampler.vocab_size)

    def run(self, scheduled: Sequence[ScheduledRequest]) -> RunResult:
        """Compute the scheduled tokens."""
        return self.launch(scheduled).wait()

    def launch(self, scheduled: Sequence[ScheduledRequest], before: LaunchedStep | None = None) -> LaunchedStep:
        """Enqueue the scheduled tokens. before: the step that pending tokens are to be taken from"""
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
        spans = [Span(e.request.block_ids, e.start, e.num_scheduled_tokens) for e in scheduled]
        batch = flat_batch(token_ids, spans, sampled_rows + prompt_rows.indices, self.kv_cache.layout.block_size)
        logits = self.forward(batch, before.late_tokens(scheduled) if before else None)
        tokens = self.sampler.enqueue(logits[: len(rows)], rows, masks.result() if masks else None)
        read_prompts = prompt_rows.enqueue(self.kernels, logits[len(rows) :])
        self.kv_cache.step_launched()
        return LaunchedStep(sampling, tokens, read_prompts, self.kv_cache.step_settled)
