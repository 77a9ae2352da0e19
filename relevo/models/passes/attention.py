"""Attention modules with merged QKV, rotation (Su et al. 2021, arXiv 2104.09864) and cache write in one kernel.

Heads, scale, window, soft-capping and sinks are those of the module's own call of attention. What a module does beyond
(clipping, gates, other rotations, multipliers) shows in the comparison: then it stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from relevo.kernels import Kernels, PreparedLinear
from relevo.models.attention import RotaryAttention
from relevo.models.passes.capture import AttendCall, CapturingAttention, require_same_calls
from relevo.models.passes.compare import EQUAL, NotApplied, random_rows, require_equal
from relevo.models.passes.rms_norm import FusedRMSNorm
from relevo.models.passes.target import Target
from relevo.models.passes.trace import Call

# Linear layers and norms by name; what they do is checked with numbers.
_QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
_OUTPUT = ("o_proj", "dense", "out_proj")
_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))

Norms = tuple[FusedRMSNorm, FusedRMSNorm]


class FusedAttention(nn.Module):
    """Called as the module that it replaces, or by `compute` without detours."""

    def __init__(
        self,
        qkv: PreparedLinear,
        output: PreparedLinear,
        norms: Norms | None,
        call: AttendCall,
        *,
        halves: bool,
        kernels: Kernels,
    ) -> None:
        """halves: cos and sin come for half of the rotated dimensions, to be used for both halves."""
        super().__init__()
        self.qkv = qkv
        self.output = output
        self.norms = None if norms is None else [(norm.weight.detach(), norm.eps, norm.weight_offset) for norm in norms]
        self.halves = halves
        self._kernels = kernels
        self._k_dim, self._v_dim = call.key.shape[2], call.value.shape[2]
        self._heads = [call.query.shape[1], call.key.shape[1], call.value.shape[1]]
        self._sizes = [call.query[0].numel(), call.key[0].numel(), call.value[0].numel()]
        self._options: dict[str, Any] = {
            name: getattr(call, name) for name in ("layer_idx", "scale", "sliding_window", "softcap", "sinks")
        }

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        relevo: RotaryAttention,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, n, hidden]; position_embeddings: cos and sin, [1, n, rot_dim]."""
        cos, sin = self.rotary(*position_embeddings)
        return self.compute(hidden_states[0].contiguous(), cos, sin, relevo)[None], None

    def rotary(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The model's cos and sin, [1, n, …], as `compute` takes them."""
        if self.halves:
            return torch.cat((cos[0], cos[0]), dim=-1), torch.cat((sin[0], sin[0]), dim=-1)
        return cos[0], sin[0]

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, attention: RotaryAttention) -> Tensor:
        """x: [n, hidden], contiguous; cos, sin: [n, rot_dim]. Returns [n, hidden]."""
        num_tokens = x.shape[0]
        if self._k_dim == self._v_dim:
            query, key, value = self.qkv(x).view(num_tokens, -1, self._k_dim).split_with_sizes(self._heads, 1)
        else:
            query, key, value = (
                states.view(num_tokens, heads, -1)
                for states, heads in zip(self.qkv(x).split_with_sizes(self._sizes, 1), self._heads, strict=True)
            )
        if self.norms is not None:
            query, key = self._norm(query, *self.norms[0]), self._norm(key, *self.norms[1])
        output = attention.attend_rotary(query, key, value, cos, sin, **self._options)
        return self.output(output.view(num_tokens, -1))

    def _norm(self, states: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
        if weight.shape[0] == states.shape[2]:
            return self._kernels.rms_norm(states, weight, eps, weight_offset)
        # over all heads at once (OLMo 2)
        return self._kernels.rms_norm(states.flatten(1), weight, eps, weight_offset).view(states.shape)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self._options.items() if name != "sinks")
        return f"heads={self._heads}, dims=({self._k_dim}, {self._v_dim}), {options}"


class FusedAttentionPass:
    name = "attention"
    does = "QKV merged, rotary embedding and cache write in one kernel"

    def candidates(self, target: Target) -> Iterable[str]:
        return target.trace.attends

    def replacement(self, target: Target, name: str) -> nn.Module:
        module = target.model.get_submodule(name)
        call = _single_call(target.trace.calls_of(name))
        attended = target.trace.attends[name]
        qkv, output = _projections(module)
        target.require_unread(name)
        norms = _norms(module)
        prepared = target.prepare(qkv), target.prepare([output])
        _check_sizes(*prepared, attended, norms)
        rot_dim = call.kwargs["position_embeddings"][0].shape[-1]
        whole, halves = (
            FusedAttention(*prepared, norms, attended, halves=value, kernels=target.kernels) for value in (False, True)
        )
        try:
            _require_same(module, whole, call, target)
        except NotApplied:
            if 2 * rot_dim > attended.key.shape[2]:
                raise
            _require_same(module, halves, call, target)
            return halves
        return whole


def _single_call(calls: list[Call]) -> Call:
    if len(calls) != 1:
        raise NotApplied(f"it is called {len(calls)} times")
    call = calls[0]
    embeddings = call.kwargs.get("position_embeddings")
    if not (
        isinstance(embeddings, tuple | list)
        and len(embeddings) == 2
        and all(isinstance(states, Tensor) and states.dim() == 3 for states in embeddings)
    ):
        raise NotApplied("it takes no cos and sin from its layer")
    if "relevo" not in call.kwargs or (not call.args and "hidden_states" not in call.kwargs):
        raise NotApplied("it is called in another way than decoder layers of transformers do")
    if not isinstance(call.output, tuple) or len(call.output) != 2 or call.output[1] is not None:
        raise NotApplied("it returns something beside its output")
    return call


def _projections(module: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    children = dict(module.named_children())
    output = next((children[name] for name in _OUTPUT if name in children), None)
    for names in _QKV:
        if output is not None and all(name in children for name in names):
            return [children[name] for name in names], output
    raise NotApplied(f"{type(module).__name__} has no query, key, value and output projections by a known name")


def _norms(module: nn.Module) -> Norms | None:
    for names in _NORMS:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(norm, FusedRMSNorm) for norm in found):
            return tuple(found)  # type: ignore[return-value]  # two of them
    return None


def _check_sizes(qkv: PreparedLinear, output: PreparedLinear, call: AttendCall, norms: Norms | None) -> None:
    sizes = [states[0].numel() for states in (call.query, call.key, call.value)]
    if qkv.out_features != sum(sizes) or output.in_features != call.query.shape[1] * call.value.shape[2]:
        raise NotApplied("its projections have other sizes than its queries, keys and values")
    for norm, states in zip(norms or (), (call.query, call.key), strict=False):
        if len(norm.weight) not in (states.shape[2], states[0].numel()):
            raise NotApplied("its norms are over something else than heads")


def _require_same(module: nn.Module, fused: FusedAttention, call: Call, target: Target) -> None:
    """Run both as the layer did, on random rows."""
    ours, theirs = CapturingAttention(target.kernels), CapturingAttention(target.kernels)
    hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
    x = random_rows(hidden.shape[-1], hidden.dtype, hidden.device)
    others = {name: value for name, value in call.kwargs.items() if name not in ("hidden_states", "relevo")}
    found, _ = fused(x, **others, relevo=ours)
    expected, _ = module(hidden_states=x, **others, relevo=theirs)
    require_same_calls(ours, theirs, EQUAL)
    require_equal("its output", found, expected, EQUAL)
