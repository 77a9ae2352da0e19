"""A model with passes says what it says without them, for each pass, dtype and kernel backend."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM
from relevo.models.loader import load_model
from relevo.models.passes import PASSES
from relevo.models.passes.decoder import FusedModel
from tests.models.passes.models import load_with, logits_of
from tests.support.tiny_models import TinyModels

RECOGNISED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt_oss")
# Of logits whose standard deviation is about one; both sides in float32, in another order.
TOLERANCE = 1e-4


@cache
def plain(path: Path, dtype: str) -> CausalLM:
    return load_model(resolve_model(str(path)), dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("architecture", RECOGNISED)
def test_all_passes_apply_and_change_nothing(tiny_models: TinyModels, architecture: str, backend: str) -> None:
    path = tiny_models.path(architecture)
    fused = load_with(path, backend)
    assert isinstance(fused.module, FusedModel)
    num_layers = len(fused.layers)
    applied = {record.name: record.applied for record in fused.passes}
    assert applied["attention"] == [f"model.layers.{i}.self_attn" for i in range(num_layers)]
    if architecture in ("mixtral", "gpt_oss"):
        assert not applied["gated_mlp"]
    else:
        assert applied["gated_mlp"] == [f"model.layers.{i}.mlp" for i in range(num_layers)]
    assert applied["packed_linear"] == ["lm_head"]
    assert applied["decoder"] == [""]
    assert not [left for record in fused.passes for left in record.left_alone if record.name != "gated_mlp"]
    torch.testing.assert_close(
        logits_of(fused, backend), logits_of(plain(path, "float32"), backend), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("num_passes", range(1, len(PASSES)))
def test_each_pass_changes_nothing(tiny_models: TinyModels, architecture: str, num_passes: int, backend: str) -> None:
    """The first of them, the first two, …: what a pass puts in works in the model's own code."""
    path = tiny_models.path(architecture)
    model = load_with(path, backend, passes=PASSES[:num_passes])
    assert model.passes[-1].applied or (architecture == "mixtral" and model.passes[-1].name == "gated_mlp")
    torch.testing.assert_close(
        logits_of(model, backend), logits_of(plain(path, "float32"), backend), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
def test_bfloat16_is_no_further_from_float32_with_passes(
    tiny_models: TinyModels, architecture: str, backend: str
) -> None:
    """The median token's error: a rounding that makes a token take another expert changes that token's logits a lot."""
    path = tiny_models.path(architecture)
    fused = load_with(path, backend, dtype="bfloat16")
    assert isinstance(fused.module, FusedModel)
    exact = logits_of(plain(path, "float32"), "reference")
    error = error_of(logits_of(fused, backend), exact)
    assert error <= 1.2 * error_of(logits_of(plain(path, "bfloat16"), "reference"), exact)
    assert error < 0.1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_without_logits_are_not_computed_to_the_end(tiny_models: TinyModels, backend: str) -> None:
    path = tiny_models.path("gemma2")
    chosen = torch.tensor([17, 3, 40])
    fused = load_with(path, backend)
    expected = logits_of(plain(path, "float32"), backend)[chosen]
    torch.testing.assert_close(logits_of(fused, backend, chosen), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert logits_of(fused, backend, chosen[:0]).shape == (0, fused.vocab_size)


def test_passes_can_be_switched_off(tiny_models: TinyModels) -> None:
    files = resolve_model(str(tiny_models.path("llama")))
    model = load_model(files, kernels=load_backend("cpu", "cpu"), passes=False)
    assert type(model.module).__name__ == "LlamaForCausalLM"
    assert not model.passes


def error_of(logits: Tensor, exact: Tensor) -> float:
    errors: Tensor = (logits - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(errors.median())
