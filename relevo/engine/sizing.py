"""Where an engine runs and how much it holds: device, blocks of KV, context."""

from __future__ import annotations

import logging

import psutil
import torch

from relevo.core.errors import StartupError
from relevo.engine.config import EngineConfig

logger = logging.getLogger(__name__)


def choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise StartupError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def count_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int:
    """block_bytes: the draft model's share included"""
    num_blocks = config.kv_cache_memory // block_bytes
    if num_blocks < 2:
        raise StartupError(
            f"kv_cache_memory of {config.kv_cache_memory} bytes holds {num_blocks} blocks of {block_bytes} "
            "bytes; at least 2 are needed"
        )
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if num_blocks * block_bytes > available:
        raise StartupError(
            f"kv_cache_memory of {config.kv_cache_memory / 2**30:.2f} GiB does not fit: "
            f"{available / 2**30:.2f} GiB are free on {device.type} after loading the model"
        )
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
            "raise kv_cache_memory or lower max_model_len"
        )
    if wanted > capacity:
        logger.warning("the KV cache holds %d tokens: max_model_len is %d instead of %d", capacity, capacity, wanted)
    return min(wanted, capacity)
