"""What the probe refuses, on models that were bent to be what it must not let through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from relevo.core.errors import StartupError
from relevo.models.attention import PROBED, register_attention
from relevo.models.probe import probe_model
from tests.support.tiny_models import TinyModels

Bend = Callable[[Any], None]


class Shifted(nn.Module):
    """What a convolution over time does: a token's output depends on the one before."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.module(hidden_states)
        return output + hidden_states.roll(1, dims=1)


class WithoutPositions(nn.Module):
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*position_ids.shape, 16)
        return torch.ones(shape), torch.zeros(shape)


def mix_tokens(model: Any) -> None:
    model.model.layers[1].mlp = Shifted(model.model.layers[1].mlp)


def forget_positions(model: Any) -> None:
    model.model.rotary_emb = WithoutPositions()


def skip_attention(model: Any) -> None:
    model.model.layers[2] = model.model.layers[2].mlp
    model.model.layers[2].forward = lambda hidden_states, **_: hidden_states


def attend_twice(model: Any) -> None:
    model.model.layers[2] = model.model.layers[1]


def look_ahead(model: Any) -> None:
    model.model.layers[0].self_attn.is_causal = False


def say_another_window(model: Any) -> None:
    model.model.layers[0].self_attn.sliding_window = 5


@pytest.mark.parametrize(
    ("architecture", "bend", "why"),
    [
        ("llama", mix_tokens, "tokens influence one another outside of its attention"),
        ("llama", forget_positions, "it does not use the positions that it is given"),
        ("llama", skip_attention, "1 of its 3 layers have no attention over a KV cache of their own (layers 2)"),
        ("llama", attend_twice, "1 of its 3 layers have no attention over a KV cache of their own (layers 2)"),
        ("llama", look_ahead, "LlamaAttention is not causal"),
        ("gemma2", say_another_window, "Gemma2Attention masks keys in another way than causally with one window"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_is_refused(tiny_models: TinyModels, architecture: str, bend: Bend, why: str) -> None:
    model = loaded(tiny_models.path(architecture))
    bend(model)
    with pytest.raises(StartupError) as caught:
        probe(model)
    assert caught.value.message == f"architecture {type(model).__name__} is not supported: {why}"


def test_layers_are_as_the_model_calls_them(tiny_models: TinyModels) -> None:
    found = probe(loaded(tiny_models.path("gemma2")))
    assert [layer.sliding_window for layer in found.layers] == [16, None, 16, None]
    assert {layer.softcap for layer in found.layers} == {4.0}
    assert {layer.scale for layer in found.layers} == {24**-0.5}
    assert {(layer.heads, layer.shape.kv_heads) for layer in found.layers} == {(4, 2)}
    assert found.vocab_size == 416


def loaded(path: Path) -> Any:
    register_attention()
    auto_model: Any = AutoModelForCausalLM
    return auto_model.from_pretrained(path, attn_implementation=PROBED)


def probe(model: Any) -> Any:
    return probe_model(model, model.config.num_hidden_layers, 512, lambda attention: {"relevo": attention})
