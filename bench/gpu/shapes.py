"""Models by shape alone, and what computing them takes at least."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent.parent / "shapes"
TINY = "llama-8m-32k"
TINY_MOE = "moe-tiny"
BYTES = 2  # of a weight and of an element of KV: bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and gated MLPs, dense or of experts."""

    folder: Path
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the MLP, or of one expert
    vocab: int
    experts: int  # 0: dense
    experts_per_token: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES

    @property
    def num_weights(self) -> int:
        """Head and table of embeddings counted apart, though tied ones are one: a bound on memory."""
        mlps = self._mlp_weights * max(1, self.experts)
        return self.layers * (self._attention_weights + mlps) + 2 * self.vocab * self.hidden

    def decode_bytes(self, batch: int, context: float) -> float:
        """What a step of `batch` requests with `context` tokens each must read, at least.

        The head, but not the table of embeddings; of the experts as many as are expected if tokens choose at random.
        """
        touched = 1.0
        if self.experts:
            touched = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** batch)
        weights = self.layers * (self._attention_weights + touched * self._mlp_weights) + self.vocab * self.hidden
        return weights * BYTES + batch * context * self.kv_bytes_per_token

    def prefill_operations(self, tokens: int) -> float:
        """Products with weights, and causal attention; the head for one token."""
        mlp = self._mlp_weights * (self.experts_per_token if self.experts else 1)
        products = 2.0 * tokens * self.layers * (self._attention_weights + mlp)
        attention = 2.0 * self.layers * self.heads * self.head_dim * tokens**2
        return products + attention + 2.0 * self.vocab * self.hidden

    @property
    def _attention_weights(self) -> int:
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + self.hidden * self.experts

    @property
    def _mlp_weights(self) -> int:
        return 3 * self.hidden * self.intermediate


def load_shape(name: str, *, tiny: bool) -> Shape:
    """tiny: one of the same kind, small enough for any machine."""
    if tiny:
        name = TINY_MOE if name.startswith("moe") else TINY
    folder = SHAPES / name
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    experts = int(values.get("num_experts", 0))
    return Shape(
        folder=folder,
        hidden=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        intermediate=values["moe_intermediate_size" if experts else "intermediate_size"],
        vocab=values["vocab_size"],
        experts=experts,
        experts_per_token=int(values.get("num_experts_per_tok", 0)),
    )
