"""What a model's modules do in one run of a few tokens: who is called, in which order, with what.

Passes read off it how modules hang together, instead of guessing from their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relevo.kernels import Kernels
from relevo.models.attention import Attention
from relevo.models.passes.capture import AttendCall, CapturingAttention
from relevo.models.passes.compare import NUM_ROWS

ModelKwargs = Callable[[Attention], Mapping[str, Any]]
LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(slots=True)
class Call:
    """One call of one module."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass(frozen=True, slots=True)
class Trace:
    """calls: in order of their beginnings
    attends: by the name of the module that called attention
    read_weights: linear layers whose weights others read: those must stay what they are
    """

    calls: list[Call]
    attends: dict[str, AttendCall]
    read_weights: frozenset[str]
    _by_module: dict[str, list[Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for call in self.calls:
            self._by_module.setdefault(call.module, []).append(call)

    def calls_of(self, module: str) -> list[Call]:
        return self._by_module.get(module, [])

    def children_called(self, parent: str) -> list[Call]:
        """Calls of the direct children of a module, in order. `parent` is "" for the model itself."""
        prefix = f"{parent}." if parent else ""
        begin = len(prefix)
        return [c for c in self.calls if c.module.startswith(prefix) and c.module and "." not in c.module[begin:]]


def example_inputs(vocab_size: int, max_model_len: int, device: torch.device) -> dict[str, Tensor]:
    """NUM_ROWS tokens at positions that are neither the first nor neighbours; logits of all of them."""
    ids = torch.arange(1, NUM_ROWS + 1, device=device) * (vocab_size - 1) // (NUM_ROWS + 1)
    positions = torch.arange(1, NUM_ROWS + 1, device=device) * (min(max_model_len, 4096) - 1) // (NUM_ROWS + 1)
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "logits_to_keep": torch.arange(NUM_ROWS, device=device),
    }


def trace_model(model: nn.Module, kernels: Kernels, model_kwargs: ModelKwargs, inputs: Mapping[str, Tensor]) -> Trace:
    """Run the model once over `inputs`, see `example_inputs`, with a CapturingAttention."""
    names = {module: name for name, module in model.named_modules()}
    attention = CapturingAttention(kernels)
    calls: list[Call] = []
    open_calls: list[Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(names[module], args, kwargs))
        open_calls.append(calls[-1])

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        open_calls.pop().output = output

    linears = [module for module in names if type(module) in LINEAR_TYPES]
    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        for module in linears:
            module.__class__ = _watched(type(module))
        model(**inputs, use_cache=False, **model_kwargs(attention))
    finally:
        for handle in handles:
            handle.remove()
        for module in linears:
            module.__class__ = type(module).__mro__[1]
    # Whoever keeps the calls, with the attention in their keywords, must not keep the modules.
    modules, attention.modules = attention.modules, []
    read = frozenset(names[module] for module in linears if module.__dict__.pop("relevo_was_read", False))
    attends = {names[module]: call for module, call in zip(modules, attention.calls, strict=True)}
    return Trace(calls, attends, read)


def _watched(kind: type[Any]) -> type[Any]:
    """The same layer, noting whether anybody but itself reads its weight."""

    class Watched(kind):  # type: ignore[misc]  # a class made of another that is only known now
        def forward(self, *args: Any) -> Any:
            self.__dict__["relevo_computes"] = True
            try:
                return super().forward(*args)
            finally:
                del self.__dict__["relevo_computes"]

        def __getattr__(self, name: str) -> Any:
            if name == "weight" and "relevo_computes" not in self.__dict__:
                self.__dict__["relevo_was_read"] = True
            return super().__getattr__(name)

    return Watched
