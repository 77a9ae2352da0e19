"""Random checkpoints of a few architectures, too small to matter, whose greedy text is not one token over and over."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

MAX_POSITIONS = 512
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": MAX_POSITIONS,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "gemma2": (
        "Gemma2Config",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
ARCHITECTURES = tuple(_CONFIGS)


def save_tiny_model(architecture: str, folder: Path) -> Path:
    """Returns where it is; float32, no tokenizer."""
    path = folder / architecture
    if (path / "config.json").is_file():
        return path
    class_name, values = _CONFIGS[architecture]
    config_class: Callable[..., Any] = getattr(transformers, class_name)
    config = config_class(**_SHAPE | values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.dtype = torch.float32
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_config(config).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(architecture.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                # Embeddings smaller: where they are the head too, a token's own row would win every time.
                parameter.copy_(noise * (0.1 if name.endswith("embed_tokens.weight") else 0.25))
            else:
                parameter.copy_(1 + 0.2 * noise)
    library_logging: Any = transformers_logging
    library_logging.disable_progress_bar()
    model.save_pretrained(path)
    return path
