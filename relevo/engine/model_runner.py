"""Runs the model over what the scheduler chose: one flat batch, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from relevo.core.scheduler import ScheduledRequest
from relevo.engine.grammar_masks import GrammarMasks
from relevo.engine.kv_cache import KVCache
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.logprobs import TokenLogprobs
from relevo.engine.prompt_logprobs import PromptRows
from relevo.engine.sampler import Sampled, Sampler
from relevo.kernels import Kernels
from relevo.kernels.metadata import AttentionMetadata
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class RunResult:
    """By request id.

    sampled: of each request whose known tokens are all computed, what follows them
    prompt_logprobs: of those prompts' tokens that a step has computed and that are asked for
    """

    sampled: dict[str, Sampled]
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
        last_rows: list[int] = []  # of the requests that sample: where their last token is in the flat batch
        rows: list[SamplingRow] = []
        names: list[str] = []
        prompt_rows = PromptRows()
        for entry in scheduled:
            request = entry.request
            start = request.num_computed_tokens
            prompt_rows.add(entry, len(token_ids))
            token_ids += request.token_ids[start : start + entry.num_scheduled_tokens]
            if entry.samples:
                names.append(request.request_id)
                last_rows.append(len(token_ids) - 1)
                rows.append(
                    SamplingRow(
                        request.sampling,
                        request.token_ids,
                        request.num_prompt_tokens,
                        self.eos_token_ids,
                        request.grammar,
                    )
                )
        masks = self._grammar_masks.begin(rows)
        positions, metadata = self._metadata(scheduled)
        logits = self.model.forward(
            torch.tensor(token_ids, device=self.device),
            positions,
            AttentionContext(metadata=metadata, layers=self.kv_cache.layers, kernels=self.kernels),
            torch.tensor(last_rows + prompt_rows.indices, dtype=torch.int64, device=self.device),
        )
        sampled = self.sampler.sample(logits[: len(rows)], rows, masks.result() if masks else None)
        prompt_logprobs = prompt_rows.score(self.kernels, logits[len(rows) :])
        return RunResult(dict(zip(names, sampled, strict=True)), prompt_logprobs)

    def _metadata(self, scheduled: Sequence[ScheduledRequest]) -> tuple[torch.Tensor, AttentionMetadata]:
        counts = np.array([entry.num_scheduled_tokens for entry in scheduled], dtype=np.int32)
        starts = np.array([entry.request.num_computed_tokens for entry in scheduled], dtype=np.int32)
        cu_seqlens_q = np.zeros(len(scheduled) + 1, dtype=np.int32)
        np.cumsum(counts, out=cu_seqlens_q[1:])
        positions = np.arange(cu_seqlens_q[-1], dtype=np.int64) + np.repeat(starts - cu_seqlens_q[:-1], counts)

        block_table = np.zeros((len(scheduled), max(len(e.request.block_ids) for e in scheduled)), dtype=np.int32)
        for row, entry in enumerate(scheduled):
            block_table[row, : len(entry.request.block_ids)] = entry.request.block_ids
        block_ids = block_table[np.repeat(np.arange(len(scheduled)), counts), positions // self.block_size]
        slot_mapping = block_ids.astype(np.int64) * self.block_size + positions % self.block_size

        seq_lens = starts + counts
        metadata = AttentionMetadata(
            block_table=torch.from_numpy(block_table).to(self.device),
            slot_mapping=torch.from_numpy(slot_mapping).to(self.device),
            seq_lens=torch.from_numpy(seq_lens).to(self.device),
            cu_seqlens_q=torch.from_numpy(cu_seqlens_q).to(self.device),
            max_query_len=int(counts.max()),
            max_seq_len=int(seq_lens.max()),
        )
        return torch.from_numpy(positions).to(self.device), metadata
