"""For architectures whose attention transformers does not route through its attention interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from relevo.models.adapters.gpt_neo import GPTNeoAdapter
from relevo.models.attention import Attention


class Adapter(Protocol):
    """How one architecture gets paged attention."""

    def prepare(self, model: nn.Module) -> None:
        """Replace the attention of a model that was loaded with attn_implementation="eager"."""
        ...

    def model_kwargs(self, attention: Attention) -> Mapping[str, Any]:
        """Keywords for the model's forward, through which `attention` reaches what `prepare` put in."""
        ...


def find_adapter(architecture: str) -> Adapter | None:
    """architecture: the class's name."""
    return GPTNeoAdapter() if architecture == "GPTNeoForCausalLM" else None
