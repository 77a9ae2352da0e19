"""The model's rotary embeddings, found by which of its modules made the cos and sin that its layers were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relevo.models.passes.compare import NotApplied
from relevo.models.passes.trace import Call, Trace

# What is looked up instead of computed: 4 MiB at 128 dimensions in float32. Beyond, attention takes far longer.
TABLE_POSITIONS = 4096

Adapt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Rotary:
    """cos and sin as the model makes them and as attention wants them, [n, rot_dim].

    For low positions on a CPU they come from a table, which the model made too.
    """

    def __init__(self, module: nn.Module, call: Call, adapt: Adapt, max_model_len: int) -> None:
        """call: one of module's; what it was given beside hidden states and positions says which kind is wanted."""
        self._module = module
        self._args = call.args[2:]
        self._kwargs = {name: value for name, value in call.kwargs.items() if name != "position_ids"}
        self._adapt = adapt
        hidden, positions = call.args[0], _positions(call)
        self._table: tuple[Tensor, Tensor] | None = None
        if hidden.device.type == "cpu":
            size = min(max_model_len, TABLE_POSITIONS)
            self._table = self._compute(hidden, torch.arange(size)[None])
            expected = adapt(call.output[0], call.output[1])
            # Where it is not by its position alone that a token's rotation goes.
            if not all(torch.equal(t[positions[0]], e) for t, e in zip(self._table, expected, strict=True)):
                self._table = None

    def __call__(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """hidden: [1, n, hidden], for its dtype; position_ids: [1, n]."""
        if self._table is not None:
            cos, sin = self._table
            try:
                return cos.index_select(0, position_ids[0]), sin.index_select(0, position_ids[0])
            except IndexError:
                pass  # a position beyond the table
        return self._compute(hidden, position_ids)

    def _compute(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._adapt(*self._module(hidden, position_ids, *self._args, **self._kwargs))


def rotary_calls(trace: Trace, attentions: Sequence[str]) -> tuple[list[Call], list[int]]:
    """The calls that made cos and sin, and which of them each attention module was given. Raises NotApplied."""
    calls: list[Call] = []
    kinds = []
    for attention in attentions:
        given = trace.calls_of(attention)[0].kwargs.get("position_embeddings")
        made = (call for call in trace.calls if isinstance(call.output, tuple) and len(call.output) == 2)
        maker = next((call for call in made if given is not None and call.output[0] is given[0]), None)
        if maker is None:
            raise NotApplied("where cos and sin come from is not known")
        if not maker.args or not isinstance(_positions(maker), Tensor):
            raise NotApplied("its rotary embedding takes something else than hidden states and positions")
        if not any(maker is call for call in calls):
            calls.append(maker)
        kinds.append(next(i for i, call in enumerate(calls) if call is maker))
    return calls, kinds


def _positions(call: Call) -> Any:
    return call.args[1] if len(call.args) > 1 else call.kwargs.get("position_ids")
