"""Passes quantize what they replace, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from relevo.core.errors import StartupError
from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM
from relevo.models.loader import load_model
from relevo.models.passes.decoder import FusedModel
from relevo.models.quantization import dequantize_rows, quantize_rows
from tests.models.passes.models import logits_of
from tests.support.tiny_models import TinyModels


def load(path: Path, backend: str = "cpu", **options: Any) -> CausalLM:
    return load_model(resolve_model(str(path)), dtype="float32", kernels=load_backend(backend, "cpu"), **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
def test_equals_a_model_whose_weights_were_rounded(tiny_models: TinyModels, architecture: str, backend: str) -> None:
    path = tiny_models.path(architecture)
    quantized = load(path, backend, quantization="int8")
    assert isinstance(quantized.module, FusedModel)
    plain = load(path, backend, passes=False)
    unrounded = logits_of(plain, backend)
    for module in plain.module.modules():
        if isinstance(module, nn.Linear):
            rounded = dequantize_rows(*quantize_rows(module.weight.detach()), torch.float32)
            module.weight = nn.Parameter(rounded)  # a new one: an embedding that shared it keeps its own
    torch.testing.assert_close(logits_of(quantized, backend), logits_of(plain, backend), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(quantized, backend), unrounded, atol=1e-3)


def test_embedding_stays_exact(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen2")  # tied
    embeddings = [load(path, **options).module.get_parameter(name) for options, name in (
        ({"quantization": "int8"}, "model.model.embed_tokens.weight"), ({"passes": False}, "model.embed_tokens.weight")
    )]  # fmt: skip
    assert torch.equal(*embeddings)


def test_blocks_of_quantized_models_are_others(tiny_models: TinyModels) -> None:
    """Their keys and values differ: the fingerprint says so."""
    path = tiny_models.path("llama")
    parts, plain = (load(path, quantization=name).fingerprint_parts for name in ("int8", "none"))
    assert parts[:2] == plain[:2]
    assert parts[2] == "int8"
    assert plain[2] == ""


def test_needs_passes(tiny_models: TinyModels) -> None:
    with pytest.raises(StartupError, match="quantization int8 is done by passes, which are off"):
        load(tiny_models.path("llama"), passes=False, quantization="int8")
