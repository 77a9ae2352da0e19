"""Decoder layers, found by who calls attention, and what each of them calls in which order."""

from __future__ import annotations

from dataclasses import dataclass

from relevo.models.passes.trace import Trace

# Leave no mark on what they are given, at inference.
_WITHOUT_EFFECT = ("dropout", "identity")


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """name: of the layer; steps: its children in the order of their calls, without those that do nothing

    Children are named in full; attention and mlp are among steps, mlp being None if it is not exactly one.
    """

    name: str
    attention: str
    steps: tuple[str, ...]
    mlp: str | None


def decoder_layers(trace: Trace) -> list[DecoderLayer]:
    """In order."""
    return [_layer(trace, attention) for attention in trace.attends]


def _layer(trace: Trace, attending: str) -> DecoderLayer:
    # A layer is what has a number: "layers.3" of "layers.3.self_attn", "h.3" of "h.3.attn.attention".
    parts = attending.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    name, attention = ".".join(parts[: number + 1]), ".".join(parts[: number + 2])
    called = dict.fromkeys(call.module for call in trace.children_called(name))
    steps = tuple(child for child in called if not child.lower().endswith(_WITHOUT_EFFECT))
    rest = [child for child in steps if child != attention and "norm" not in child.rpartition(".")[2].lower()]
    return DecoderLayer(name, attention, steps, rest[0] if len(rest) == 1 else None)
