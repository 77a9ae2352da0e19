"""Tiny random checkpoints of many architectures; made on first use, then kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

BOS, EOS, PAD = 1, 2, 0
MAX_POSITIONS = 512

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_GQA: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GQA, "vocab_size": 320}),
    "qwen2": ("Qwen2Config", {**_SHAPE, "num_key_value_heads": 2, "vocab_size": 384, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_GQA, "vocab_size": 352, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GQA, "vocab_size": 320, "sliding_window": 24}),
    "gemma2": (
        "Gemma2Config",
        {
            **_GQA,
            "vocab_size": 416,
            "num_hidden_layers": 4,
            "layer_types": _ALTERNATING,
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GQA, "vocab_size": 416, "num_hidden_layers": 4, "layer_types": _ALTERNATING, "sliding_window": 12},
    ),
    "phi3": ("Phi3Config", {**_SHAPE, "num_key_value_heads": 2, "vocab_size": 320}),
    "mixtral": (
        "MixtralConfig",
        {**_GQA, "vocab_size": 320, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_GQA,
            "vocab_size": 320,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 20,
            "layer_types": _ALTERNATING[:2],
            # Its own default, yarn, with the original length of the real model.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS, "vocab_size": 384}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            "max_position_embeddings": MAX_POSITIONS,
            "vocab_size": 320,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_SHAPE, "vocab_size": 320, "rotary_pct": 0.5}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 14,
            "max_position_embeddings": MAX_POSITIONS,
            "vocab_size": 320,
        },
    ),
    # Rotates neighbouring dimensions, not halves; norms subtract the mean; logits are scaled.
    "cohere": ("CohereConfig", {**_GQA, "vocab_size": 320}),
    # Rotates neighbouring dimensions, and only half of them.
    "glm": ("GlmConfig", {**_GQA, "vocab_size": 320}),
    # Multiplies what is added to the residual stream, embeddings and logits.
    "granite": (
        "GraniteConfig",
        {
            **_GQA,
            "vocab_size": 320,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.05,
        },
    ),
    # Clips queries, keys and values; its norms have no weights.
    "olmo": ("OlmoConfig", {**_GQA, "vocab_size": 320, "clip_qkv": 8.0}),
    # Norms come after attention and MLP, and over all heads at once.
    "olmo2": ("Olmo2Config", {**_GQA, "vocab_size": 320}),
    # Every second layer does not rotate.
    "smollm3": ("SmolLM3Config", {**_GQA, "vocab_size": 320, "no_rope_layers": [1, 0, 1]}),
    # Recurrent: no KV at all.
    "mamba": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 300}),
    # A bias by distance (ALiBi) is added to its attention.
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}),
}

_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight", "wte.weight", "wpe.weight")
REFUSED = ("mamba", "bloom")
# What passes must leave alone, in part or altogether.
UNUSUAL = ("cohere", "glm", "granite", "olmo", "olmo2", "smollm3")
ARCHITECTURES = tuple(name for name in _CONFIGS if name not in (*REFUSED, *UNUSUAL))


class TinyModels:
    """Folders under `root`, one an architecture.

    Weights are float32, random from a seed that is the name's, and large enough that greedy output is not one token
    over and over; biases and norms are random too. No tokenizer.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, architecture: str) -> Path:
        folder = self._root / architecture
        if not (folder / "config.json").is_file():
            _save(_build(architecture), folder)
        return folder


def tiny_config(architecture: str) -> PreTrainedConfig:
    class_name, values = _CONFIGS[architecture]
    config_class: Callable[..., PreTrainedConfig] = getattr(transformers, class_name)
    config = config_class(**values, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    config.dtype = torch.float32
    return config


def _build(architecture: str) -> Any:
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_config(tiny_config(architecture)).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(architecture.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                # Embeddings smaller: where they are the head too, a token's own row would win every time.
                parameter.copy_(noise * (0.1 if name.endswith(_EMBEDDINGS) else 0.25))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    generation_config: Any = GenerationConfig
    model.generation_config = generation_config(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return model


def _save(model: Any, folder: Path) -> None:
    library_logging: Any = transformers_logging
    library_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        library_logging.enable_progress_bar()
