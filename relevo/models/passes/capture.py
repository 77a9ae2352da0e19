"""An attention that notes what a module asks of it and answers with noise.

The noise is the same for the same layer, so that two runs of what should be equal see the same answers; and it is not
attention's, so that a difference in queries or keys cannot hide behind weights that are nearly uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relevo.kernels import Kernels
from relevo.models.passes.compare import SAME_PARTS, NotApplied, Tolerance, require_equal


@dataclass(frozen=True, slots=True)
class AttendCall:
    """What one layer asked for.

    query, key, value: [n, heads, dim], rotated
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layer_idx: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None


class CapturingAttention:
    """In the place of AttentionContext.

    calls: in order; modules: who made them
    """

    def __init__(self, kernels: Kernels) -> None:
        self.calls: list[AttendCall] = []
        self.modules: list[nn.Module] = []
        self._kernels = kernels

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See relevo.models.attention.Attention."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        self.modules.append(module)
        return self._answer(AttendCall(query, key, value, layer_idx, scale, sliding_window, softcap, sinks))[None]

    def attend_rotary(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See relevo.models.attention.RotaryAttention. Keys and values are read back from a cache of one block."""
        num_tokens = len(query)
        k_cache = key.new_zeros(1, num_tokens, *key.shape[1:])
        v_cache = value.new_zeros(1, num_tokens, *value.shape[1:])
        slots = torch.arange(num_tokens, device=query.device)
        query = self._kernels.rotary_store_kv(query, key, value, cos, sin, k_cache, v_cache, slots)
        return self._answer(AttendCall(query, k_cache[0], v_cache[0], layer_idx, scale, sliding_window, softcap, sinks))

    def _answer(self, call: AttendCall) -> Tensor:
        self.calls.append(call)
        generator = torch.Generator().manual_seed(call.layer_idx)
        shape = (*call.query.shape[:2], call.value.shape[2])
        return torch.randn(shape, generator=generator).to(call.query)


def require_same_calls(
    found: CapturingAttention, expected: CapturingAttention, tolerances: dict[torch.dtype, Tolerance] = SAME_PARTS
) -> None:
    """Raises NotApplied, naming what differs."""
    if len(found.calls) != len(expected.calls):
        raise NotApplied(f"attention is called {len(found.calls)} times instead of {len(expected.calls)}")
    for ours, theirs in zip(found.calls, expected.calls, strict=True):
        for name in ("layer_idx", "scale", "sliding_window", "softcap"):
            if getattr(ours, name) != getattr(theirs, name):
                raise NotApplied(f"attention's {name} is {getattr(ours, name)} instead of {getattr(theirs, name)}")
        if ours.sinks is not theirs.sinks:
            raise NotApplied("attention's sinks are others")
        for name in ("query", "key", "value"):
            require_equal(f"attention's {name}", getattr(ours, name), getattr(theirs, name), tolerances)
