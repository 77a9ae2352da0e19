"""What an engine is made of: loaded, sized and put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from relevo.allocator import keep_freed_memory
from relevo.engine.config import EngineConfig, EngineInfo
from relevo.engine.forward_pass import ForwardPass
from relevo.engine.gpu.graphs import CudaCapture, draft_graph_shapes, graph_shapes
from relevo.engine.gpu.largest_step import Loaded, profile_steps
from relevo.engine.gpu.memory import GpuMemory, MemoryProfile, keep_for_steps
from relevo.engine.kv_cache import KVCache
from relevo.engine.loading import kv_dtype, load_configured
from relevo.engine.model_runner import ModelRunner
from relevo.engine.sampler import Sampler
from relevo.engine.sizing import count_blocks, find_max_model_len
from relevo.engine.spec_decode.make import load_draft_model, make_speculator
from relevo.engine.spec_decode.speculator import Speculator
from relevo.engine.threads import set_num_threads
from relevo.kernels import Kernels, load_backend
from relevo.model_files import ModelFiles, generation_defaults, resolve_model
from relevo.models.layout import KVLayout


@dataclass(frozen=True, slots=True)
class EngineParts:
    """draft: the draft model and its own KV cache, if there is one; profile: on a GPU"""

    files: ModelFiles
    info: EngineInfo
    kv_cache: KVCache
    runner: ModelRunner
    draft: ForwardPass | None
    profile: MemoryProfile | None

    def make_speculator(self, config: EngineConfig) -> Speculator | None:
        """None unless the configuration wants one. No request may be there: its cost is measured."""
        return make_speculator(config, self.runner, self.draft) if config.speculative is not None else None

    def capture_graphs(self, config: EngineConfig) -> None:
        """On a GPU, unless config.enforce_eager. What is set up lazily should have been."""
        device = self.runner.forward.device
        if device.type != "cuda" or config.enforce_eager:
            return
        capture = CudaCapture(device)
        shapes = graph_shapes(config.max_num_seqs, config.max_drafts)
        self.runner.forward.capture_graphs(capture, shapes, self.info.max_model_len)
        if self.draft is not None:
            shapes = draft_graph_shapes(config.max_num_seqs)
            self.draft.capture_graphs(capture, shapes, self.info.max_model_len)

    def keep_for_steps(self, memory: GpuMemory | None) -> None:
        """When all else is there, on a GPU: what the largest step needs. memory: as load_parts had it"""
        if memory is not None and self.profile is not None:
            keep_for_steps(memory, self.profile)


def load_parts(config: EngineConfig, device: torch.device, memory: GpuMemory | None) -> EngineParts:
    """memory: of a GPU. Raises StartupError."""
    files = resolve_model(config.model, weights=config.load_format != "dummy")
    set_num_threads(config.threads)
    kernels = load_backend(config.attention_backend, device.type)
    model = load_configured(config, files, kernels, device)
    keep_freed_memory()
    target = Loaded(model, KVLayout(model.layout_layers, kv_dtype(config, model), config.block_size))
    draft = _load_draft(config, kernels, device)
    profile = profile_steps(memory, config, target, draft, kernels) if memory is not None else None
    block_bytes = target.layout.block_bytes + (draft.layout.block_bytes if draft else 0)
    num_blocks = count_blocks(config, block_bytes, profile)
    info = EngineInfo(
        model_name=files.name,
        fingerprint=target.layout.fingerprint(*model.fingerprint_parts),
        block_size=config.block_size,
        block_bytes=target.layout.block_bytes,
        num_blocks=num_blocks,
        max_model_len=find_max_model_len(config, model.max_model_len, num_blocks),
        vocab_size=model.vocab_size,
        eos_token_ids=generation_defaults(files).eos_token_ids,
        max_num_seqs=config.max_num_seqs,
    )
    kv_cache = KVCache(target.layout, num_blocks, device)
    sampler = Sampler(model.vocab_size, device, kernels)
    runner = ModelRunner(model, kv_cache, kernels, sampler, info.eos_token_ids)
    drafting = ForwardPass(draft.model, KVCache(draft.layout, num_blocks, device), kernels) if draft else None
    return EngineParts(files, info, kv_cache, runner, drafting, profile)


def _load_draft(config: EngineConfig, kernels: Kernels, device: torch.device) -> Loaded | None:
    model = load_draft_model(config, kernels, device)
    return None if model is None else Loaded(model, KVLayout(model.layout_layers, model.dtype, config.block_size))
