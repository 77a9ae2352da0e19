"""Where an engine runs and how much it holds: device, blocks of KV, context."""

from __future__ import annotations

import logging

import torch

from relevo.core.errors import StartupError
from relevo.engine.config import DEFAULT_KV_CACHE_MEMORY, EngineConfig
from relevo.engine.gpu.memory import MemoryProfile, no_room
from relevo.engine.shortage import gib
from relevo.models.checkpoint import available_memory

logger = logging.getLogger(__name__)

MIN_BLOCKS = 2


def choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise StartupError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def count_blocks(config: EngineConfig, block_bytes: int, profile: MemoryProfile | None) -> int:
    """Raises StartupError if there is no room for two.

    block_bytes: the draft model's share included; profile: of a GPU
    """
    if config.kv_cache_memory is None and profile is not None:
        return _blocks_that_fit(profile, config.gpu_memory_utilization, block_bytes)
    kv_cache_memory = config.kv_cache_memory or DEFAULT_KV_CACHE_MEMORY
    num_blocks = kv_cache_memory // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise StartupError(
            f"kv_cache_memory of {kv_cache_memory} bytes holds {num_blocks} blocks of {block_bytes} "
            f"bytes; at least {MIN_BLOCKS} are needed"
        )
    if profile is not None:
        available: int | None = profile.free_left
        where = f"are free on the GPU beside what else it needs ({profile})"
    else:
        memory = available_memory()
        available = None if memory is None else memory.available
        where = "are free after loading the model"
    if available is not None and num_blocks * block_bytes > available:
        raise StartupError(f"kv_cache_memory of {gib(kv_cache_memory)} does not fit: {gib(max(0, available))} {where}")
    return num_blocks


def _blocks_that_fit(profile: MemoryProfile, utilization: float, block_bytes: int) -> int:
    kv_bytes = profile.kv_bytes(utilization)
    num_blocks = kv_bytes // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise no_room(profile, utilization, MIN_BLOCKS * block_bytes)
    missing = profile.share_left(utilization) - kv_bytes
    if missing > 0:
        logger.warning(
            "others hold so much of the GPU that the KV cache gets %s less than gpu_memory_utilization %g allows",
            gib(missing),
            utilization,
        )
    logger.info("KV cache: %d blocks, %s", num_blocks, gib(num_blocks * block_bytes))
    return num_blocks


def find_max_model_len(config: EngineConfig, model_limit: int, num_blocks: int) -> int:
    """The least of what was asked for, what the model knows positions for, and what the cache holds for a request."""
    if config.max_model_len is not None and config.max_model_len > model_limit:
        raise StartupError(
            f"max_model_len {config.max_model_len} is beyond the model's context of {model_limit} tokens"
        )
    wanted = config.max_model_len or model_limit
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise StartupError(
            f"max_model_len {config.max_model_len} does not fit the KV cache, which holds {capacity} tokens; "
            "raise kv_cache_memory (on a GPU gpu_memory_utilization) or lower max_model_len"
        )
    if wanted > capacity:
        logger.warning("the KV cache holds %d tokens: max_model_len is %d instead of %d", capacity, capacity, wanted)
    return min(wanted, capacity)
