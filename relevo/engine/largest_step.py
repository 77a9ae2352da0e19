"""The largest step that an engine's settings allow, made up: for finding out what memory it takes.

All sequences share one block of a scratch cache: what they compute is nonsense, and as large as it can get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import ScheduledRequest
from relevo.engine.config import EngineConfig
from relevo.engine.forward_pass import ForwardPass
from relevo.engine.gpu_memory import GpuMemory, MemoryProfile, profile_memory
from relevo.engine.graphs import draft_graph_shapes, graph_bytes, graph_shapes
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


def profile_steps(
    memory: GpuMemory,
    config: EngineConfig,
    target: Loaded,
    draft: Loaded | None,
    kernels: Kernels,
) -> MemoryProfile:
    """Compute the largest step, and see what is taken then. Raises OutOfMemory if there is not even room for that."""
    device = memory.device
    max_model_len = min(config.max_model_len or target.model.max_model_len, target.model.max_model_len)
    entries = largest_step(config, max_model_len, target.model.vocab_size)
    sampler = Sampler(target.model.vocab_size, device, kernels)
    runner = ModelRunner(target.model, _scratch(target, memory), kernels, sampler, ())
    proposer = None
    if draft is not None:
        proposer = DraftModelProposer(
            ForwardPass(draft.model, _scratch(draft, memory), kernels),
            (),
            vocab_size=target.model.vocab_size,
            max_rows=config.max_num_batched_tokens,
        )

    def compute() -> None:
        runner.run(entries)  # first: the draft model finds room in what torch keeps of it
        if proposer is not None:
            proposer.propose(entries)

    what = f"a step of {config.max_num_batched_tokens} tokens of {config.max_num_seqs} requests"
    with explain_shortage(device, what, STEP_ADVICE):
        return profile_memory(
            memory,
            compute,
            lambda: runner.run(graph_step(config, max_model_len)),
            0 if config.enforce_eager else _graph_bytes(config, target, draft, max_model_len),
        )


def _graph_bytes(config: EngineConfig, target: Loaded, draft: Loaded | None, max_model_len: int) -> int:
    max_blocks = -(-max_model_len // config.block_size)
    num_bytes = graph_bytes(graph_shapes(config.max_num_seqs, config.max_drafts), target.model.vocab_size, max_blocks)
    if draft is not None:
        num_bytes += graph_bytes(draft_graph_shapes(config.max_num_seqs), draft.model.vocab_size, max_blocks)
    return num_bytes


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


def graph_step(config: EngineConfig, max_model_len: int) -> list[ScheduledRequest]:
    """One token each of max_num_seqs requests, the first of which has the longest context, and all their drafts."""
    num_drafts = max(0, min(config.max_drafts, max_model_len - 2))
    entries = []
    for at in range(config.max_num_seqs):
        num_tokens = max(1, max_model_len - num_drafts - 1) if at == 0 else 1
        request = _request(f"decode-{at}", num_tokens, num_tokens + num_drafts, config.block_size)
        request.num_computed_tokens = num_tokens - 1
        entries.append(ScheduledRequest(request, 1 + num_drafts, (0,) * num_drafts, num_drafts))
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


def _scratch(loaded: Loaded, memory: GpuMemory) -> KVCache:
    cache = KVCache(loaded.layout, SCRATCH_BLOCKS, memory.device)
    cache.storage.zero_()  # not NaN, of which no token is drawn
    return cache
