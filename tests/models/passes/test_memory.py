"""Weights exist once: what is replaced is let go, one module at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from relevo.kernels import Kernels, PreparedLinear, reference
from relevo.model_files import resolve_model
from relevo.models.loader import load_model
from relevo.models.passes import apply_passes
from tests.support.tiny_models import TinyModels


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_oss"])
def test_replaced_weights_are_freed(tiny_models: TinyModels, architecture: str) -> None:
    """All matrices of linear layers, but those that an embedding shares."""
    model = load_model(resolve_model(str(tiny_models.path(architecture))), dtype="float32")
    embeddings = {id(p) for name, p in model.module.named_parameters() if "embed" in name or name.endswith("te.weight")}
    linear = ("proj.weight", "c_attn.weight", "c_fc.weight", "lm_head.weight")
    replaced = {
        name: weakref.ref(parameter)
        for name, parameter in model.module.named_parameters()
        if name.endswith(linear) and id(parameter) not in embeddings
    }
    assert len(replaced) > len(model.layers)
    passed, records = apply_passes(
        model.module, copying_kernels(), model.model_kwargs, vocab_size=model.vocab_size, max_model_len=512
    )
    del model
    assert [name for name, parameter in replaced.items() if parameter() is not None] == []
    assert records
    assert passed is not None


def test_no_two_copies_of_more_than_one_module(tiny_models: TinyModels) -> None:
    """At every moment in which weights are prepared, by kernels that copy all of them."""
    model = load_model(resolve_model(str(tiny_models.path("llama"))), dtype="float32")
    originals = [(weakref.ref(p), p.numel() * p.element_size()) for p in model.module.parameters()]
    total = sum(size for _, size in originals)
    layer = sum(p.numel() * p.element_size() for p in model.module.model.layers[0].parameters())  # type: ignore[index, union-attr]
    head = model.module.lm_head.weight.nbytes  # type: ignore[union-attr]
    peaks: list[int] = []

    def measure(prepared: Sequence[weakref.ref[Any]]) -> None:
        alive = sum(size for reference, size in originals if reference() is not None)
        peaks.append(alive + sum(linear().num_bytes for linear in prepared if linear() is not None))  # type: ignore[union-attr]

    apply_passes(
        model.module,
        copying_kernels(measure),
        model.model_kwargs,
        vocab_size=model.vocab_size,
        max_model_len=512,
    )
    assert len(peaks) > 2 * len(model.layers)
    assert max(peaks) <= total + max(layer, cast(int, head))


def copying_kernels(measure: Callable[[Sequence[weakref.ref[Any]]], None] | None = None) -> Kernels:
    """The reference kernels, with copies of all weights."""
    prepared: list[weakref.ref[Any]] = []

    def prepare_linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> PreparedLinear:
        linear = reference.prepare_linear([weight.clone() for weight in weights], biases)
        prepared.append(weakref.ref(linear))
        if measure is not None:
            measure(prepared)
        return linear

    functions = {name: value for name, value in vars(reference).items() if not name.startswith("__")}
    return cast(Kernels, SimpleNamespace(**{**functions, "prepare_linear": prepare_linear}))
