"""Models with some of the passes, and bent ones; and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM
from relevo.models.loader import load_model
from relevo.models.passes import PASSES, apply_passes
from relevo.models.passes.target import Pass
from tests.models.paged import PagedModel

LENGTH = 48


def load_with(
    path: Path,
    backend: str,
    *,
    dtype: str = "float32",
    passes: tuple[Pass, ...] = PASSES,
    bend: Callable[[Any], None] | None = None,
) -> CausalLM:
    """A model with these passes; `bend` changes it before."""
    model = load_model(resolve_model(str(path)), dtype=dtype)
    if bend is not None:
        bend(model.module)
    return with_passes(model, backend, passes)


def with_passes(model: CausalLM, backend: str, passes: tuple[Pass, ...] = PASSES) -> CausalLM:
    """`model` itself is changed too."""
    module, records = apply_passes(
        model.module,
        load_backend(backend, "cpu"),
        model.model_kwargs,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        passes=passes,
    )
    return replace(model, module=module, passes=tuple(records))


def logits_of(model: CausalLM, backend: str, chosen: Tensor | None = None) -> Tensor:
    """[LENGTH, vocab_size] or those rows of it that are chosen; over a paged cache, in two chunks and a token."""
    tokens: list[int] = torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    paged = PagedModel(model, backend=backend)
    if chosen is not None:
        return paged.forward({"a": tokens}, chosen)
    return torch.cat([paged.step({"a": tokens[begin:end]})["a"] for begin, end in ((0, 20), (20, 47), (47, LENGTH))])
