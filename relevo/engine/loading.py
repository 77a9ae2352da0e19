"""A model as the engine's configuration wants it: the target, or a draft model beside it."""

from __future__ import annotations

import torch

from relevo.engine.config import EngineConfig
from relevo.engine.shortage import LOADING_ADVICE, explain_shortage
from relevo.kernels import Kernels
from relevo.model_files import ModelFiles
from relevo.models.causal_lm import CausalLM
from relevo.models.loader import load_model


def kv_dtype(config: EngineConfig, model: CausalLM) -> torch.dtype:
    """Of the target's KV cache; a draft model's is its own."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8_e4m3" else model.dtype


def load_configured(config: EngineConfig, files: ModelFiles, kernels: Kernels, device: torch.device) -> CausalLM:
    """Raises StartupError if it can't be loaded."""
    with explain_shortage(device, f"the model {files.name!r}", LOADING_ADVICE):
        return load_model(
            files,
            dtype=config.dtype,
            device=device,
            load_format=config.load_format,
            seed=config.seed,
            kernels=kernels,
            passes=config.passes,
            quantization=config.quantization,
        )
