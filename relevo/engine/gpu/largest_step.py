"""The largest step that an engine's settings allow, made up: for finding out what memory it takes.

All sequences share one block of a scratch cache: what they compute is nonsense, and as large as it can get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import ScheduledRequest
from relevo.engine.config import EngineConfig
from relevo.engine.forward_pass import ForwardPass
from relevo.engine.gpu.graphs import GRAPH_BYTES, Replay, draft_graph_shapes, graph_shapes
from relevo.engine.gpu.memory import GpuMemory, MemoryProfile, profile_memory
from relevo.engine.kv_cache import KVCache
from relevo.engine.model_runner import ModelRunner
from relevo.engine.prompt_logprobs import max_rows
from relevo.engine.sampler import Sampler
from relevo.engine.shortage import STEP_ADVICE, explain_shortage
from relevo.engine.spec_decode.draft_model import DraftModelProposer
from relevo.kernels import Kernels
from relevo.models.causal_lm import CausalLM
from relevo.models.layout import KVLayout

SCRATCH_BLOCKS = 1

# Everything that makes copies of logits: drawn by all filters, penalized, with logprobs.
_SAMPLING = SamplingParams(
    max_tokens=None,
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    seed=0,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logprobs=1,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is loaded, and how its KV is to lie."""

    model: CausalLM
    layout: KVLayout


class Rehearsal:
    """In the place of a capture: only computes, and only what comes first, the largest."""

    def __init__(self) -> None:
        self._is_over = False

    def __call__(self, compute: Callable[[], None]) -> Replay:
        if not self._is_over:
            compute()
        self._is_over = True
        return compute


def profile_steps(
    memory: GpuMemory, config: EngineConfig, target: Loaded, draft: Loaded | None, kernels: Kernels
) -> MemoryProfile:
    """Compute the largest step, and what CUDA graphs are made of, and see what is taken then. Raises OutOfMemory if
    there is not even room for that.
    """
    model, device = target.model, memory.device
    max_model_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
    entries = largest_step(config, max_model_len, model.vocab_size)
    sampler = Sampler(model.vocab_size, device, kernels)
    runner = ModelRunner(model, _scratch(target, device), kernels, sampler, ())
    graphs = [(runner.forward, graph_shapes(config.max_num_seqs, config.max_drafts))]
    proposer = None
    if draft is not None:
        drafting = ForwardPass(draft.model, _scratch(draft, device), kernels)
        budget = config.max_num_batched_tokens
        proposer = DraftModelProposer(drafting, (), vocab_size=model.vocab_size, max_rows=budget)
        graphs.append((drafting, draft_graph_shapes(config.max_num_seqs)))

    def compute() -> None:
        runner.run(entries)  # first: the draft model finds room in what torch keeps of it
        if proposer is not None:
            proposer.propose(entries)

    def rehearse() -> int:
        for forward, shapes in graphs:
            forward.capture_graphs(Rehearsal(), shapes, max_model_len)
        for forward, _ in graphs:
            forward.graphs = None
        return sum(len(shapes) for _, shapes in graphs) * GRAPH_BYTES

    what = f"a step of {config.max_num_batched_tokens} tokens of {config.max_num_seqs} requests"
    with explain_shortage(device, what, STEP_ADVICE):
        return profile_memory(memory, compute, None if config.enforce_eager else rehearse)


def largest_step(config: EngineConfig, max_model_len: int, vocab_size: int) -> list[ScheduledRequest]:
    """max_num_batched_tokens of max_num_seqs requests, each of which has as many drafts as fit and chooses its tokens.

    The first ones have what is left as their prompts; the very first has the longest context, and prompt logprobs.
    """
    num_seqs = config.max_num_seqs
    num_drafts = max(0, min(config.max_drafts, config.max_num_batched_tokens // num_seqs - 1, max_model_len - 2))
    room = max(1, max_model_len - num_drafts - 1)  # for known tokens; one more is drawn behind the drafts
    left = config.max_num_batched_tokens - num_seqs * (1 + num_drafts)
    entries = []
    for at in range(num_seqs):
        num_known = 1 + min(left, room - 1)
        left -= num_known - 1
        num_tokens = room if at == 0 else num_known
        request = _request(f"largest-{at}", num_tokens, num_tokens + num_drafts, config.block_size)
        request.num_computed_tokens = num_tokens - num_known
        if at == 0:
            request.sampling = replace(_SAMPLING, prompt_logprobs=1)
            request.num_prompt_logprobs = max(request.num_computed_tokens, num_tokens - 1 - max_rows(vocab_size))
        entries.append(ScheduledRequest(request, num_known + num_drafts, (0,) * num_drafts, num_drafts))
    return entries


def _request(request_id: str, num_tokens: int, num_slots: int, block_size: int) -> Request:
    """A prompt. num_slots: tokens that its blocks hold"""
    return Request(
        request_id=request_id,
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=_SAMPLING,
        max_tokens=num_slots + 1,
        stop_token_ids=frozenset(),
        root_hash=bytes(32),
        block_size=block_size,
        block_ids=[0] * (-(-num_slots // block_size)),
    )


def _scratch(loaded: Loaded, device: torch.device) -> KVCache:
    cache = KVCache(loaded.layout, SCRATCH_BLOCKS, device)
    cache.storage.zero_()  # not NaN, of which no token is drawn
    return cache
