"""What passes leave alone: models of other kinds, and models that are not what they look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM
from relevo.models.loader import load_model
from relevo.models.passes import PassRecord
from relevo.models.passes.compare import NotApplied
from relevo.models.passes.rms_norm import RMSNormPass
from relevo.models.passes.target import Target
from relevo.models.passes.trace import Trace
from tests.models.passes import bends
from tests.models.passes.models import load_with, logits_of
from tests.support.tiny_models import TinyModels

TOLERANCE = 1e-4
EVERY = (0, 1, 2)
SHOWS_RARELY = (bends.WeightReader, bends.Clipped, bends.OtherEps)  # not in a usual run, that is


@pytest.mark.parametrize(
    ("architecture", "attention", "gated_mlp"),
    [
        ("gpt2", (), ()),
        ("opt", (), ()),
        ("gpt_neox", (), ()),
        ("gpt_neo", (), ()),
        ("cohere", (), EVERY),
        ("glm", (), EVERY),
        ("granite", EVERY, EVERY),
        ("olmo", (), EVERY),
        ("olmo2", EVERY, EVERY),
        ("smollm3", (0, 2), EVERY),
    ],
)
def test_other_kinds_of_models_run_as_before(
    tiny_models: TinyModels, architecture: str, attention: tuple[int, ...], gated_mlp: tuple[int, ...]
) -> None:
    path = tiny_models.path(architecture)
    model = load_with(path, "cpu")
    found = by_name(model)
    assert found["attention"].applied == [f"model.layers.{i}.self_attn" for i in attention]
    assert found["gated_mlp"].applied == [f"model.layers.{i}.mlp" for i in gated_mlp]
    assert not found["decoder"].applied
    assert found["packed_linear"].applied
    has_rms_norm = architecture in ("glm", "granite", "olmo2", "smollm3")
    assert bool(found["rms_norm"].applied) == has_rms_norm
    assert_same(model, load_model(resolve_model(str(path)), dtype="float32"))


@pytest.mark.parametrize(
    ("name", "bend", "why"),
    [
        ("decoder", bends.SmallerResidual, "attention's query differs"),
        ("decoder", bends.Parallel, "attention's query differs"),
        ("decoder", bends.OtherPositions, "where cos and sin come from is not known"),
        ("decoder", bends.CappedLogits, "its output differs"),
        ("decoder", bends.WithEmbeddingBias, "attention's query differs"),
        ("attention", bends.WeightReader, "its weights are read from outside"),
        ("attention", bends.Gated, "its output differs"),
        ("attention", bends.Clipped, "attention's query differs"),
        ("gated_mlp", bends.Swapped, "its output differs"),
        ("gated_mlp", bends.Limited, "its output differs"),
        ("rms_norm", bends.OtherEps, "its output differs"),
    ],
)
def test_impostor_is_found_out(tiny_models: TinyModels, name: str, bend: type[nn.Module], why: str) -> None:
    """Bent in its second layer only, or as a whole; runs as it was bent to."""
    path = tiny_models.path("llama")

    def apply(model: Any) -> None:
        layer = model.model.layers[1]
        places = {
            "LlamaForCausalLM": model,
            "LlamaDecoderLayer": layer,
            "LlamaAttention": layer.self_attn,
            "LlamaMLP": layer.mlp,
            "LlamaRMSNorm": layer.post_attention_layernorm,
        }
        places[bend.__bases__[0].__name__].__class__ = bend

    model = load_with(path, "cpu", bend=apply)
    record = by_name(model)[name]
    assert [left.why for left in record.left_alone] == [why]
    assert not any("1" in module for module in record.applied if bend.__bases__[0].__name__[5:] in module)
    assert bool(by_name(model)["decoder"].applied) == (name == "gated_mlp")  # which runs inside of it as it is
    plain = load_model(resolve_model(str(path)), dtype="float32")
    straight = logits_of(plain, "cpu")
    apply(plain.module)
    assert_same(model, plain)
    if bend not in SHOWS_RARELY:
        assert not torch.allclose(logits_of(plain, "cpu"), straight, atol=TOLERANCE), "it is not bent"


class Norm(nn.Module):
    """y = (x - shift · mean) / rms · (weight + offset)"""

    def __init__(self, dim: int, *, shift: float = 0.0, offset: float = 0.0, used_eps: float = 1e-6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(dim)
        self.weight = nn.Parameter((0.1 * torch.randn(dim, generator=generator) + 1.0 - offset).bfloat16())
        self.eps = 1e-6
        self._shift, self._offset, self._used_eps = shift, offset, used_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - self._shift * wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._used_eps)
        return (wide * (self.weight.float() + self._offset)).to(x.dtype)


@pytest.mark.parametrize("dim", [64, 896, 8192])
def test_norm_is_told_from_others_in_bfloat16_at_any_width(dim: int) -> None:
    for offset in (0.0, 1.0):
        replacement = norm_replacement(Norm(dim, offset=offset))
        assert replacement.weight_offset == offset
    for other in (Norm(dim, shift=1.0), Norm(dim, shift=0.3), Norm(dim, used_eps=2e-6), Norm(dim, offset=0.5)):
        with pytest.raises(NotApplied, match="its output differs"):
            norm_replacement(other)


def norm_replacement(norm: nn.Module) -> Any:
    model = nn.ModuleDict({"norm": norm})
    target = Target(model, load_backend("cpu", "cpu"), Trace([], {}, frozenset()), lambda _: {}, {}, max_model_len=512)
    return RMSNormPass().replacement(target, "norm")


def by_name(model: CausalLM) -> dict[str, PassRecord]:
    return {record.name: record for record in model.passes}


def assert_same(model: CausalLM, plain: CausalLM) -> None:
    torch.testing.assert_close(logits_of(model, "cpu"), logits_of(plain, "cpu"), atol=TOLERANCE, rtol=TOLERANCE)
