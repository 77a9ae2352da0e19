"""The whole model's forward: residual sums fused with the norms after them, across layers, and nothing in between.

transformers' forward makes masks, checks arguments and hands keywords down: at a token a step on a CPU that is a large
part of a small model's time. Here is what is left of it: embed, layers, norm, head. In the last layer what comes after
attention is computed only for the tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from relevo.kernels import Kernels
from relevo.models.attention import RotaryAttention
from relevo.models.passes.attention import FusedAttention
from relevo.models.passes.capture import CapturingAttention, require_same_calls
from relevo.models.passes.compare import NUM_ROWS, SAME_PARTS, NotApplied, require_equal
from relevo.models.passes.gated_mlp import GatedMLP
from relevo.models.passes.layers import DecoderLayer, decoder_layers
from relevo.models.passes.rms_norm import FusedRMSNorm
from relevo.models.passes.rotary import Rotary, rotary_calls
from relevo.models.passes.target import Target

# What the last hidden states of a row are multiplied by for the comparison: what is done to logits, such as capping
# them, must show also in models whose logits are small.
_GAINS = (1.0, 1.0, 32.0, 64.0)
assert len(_GAINS) == NUM_ROWS


@dataclass(frozen=True, slots=True)
class Norm:
    """A FusedRMSNorm without its module."""

    weight: Tensor
    eps: float
    weight_offset: float


@dataclass(frozen=True, slots=True)
class Layer:
    """hidden += attention_norm(attention(norm(hidden))); hidden += mlp_norm(mlp(norm(hidden))); norms but the first
    and third are Gemma's.

    mlp: [n, hidden] to [n, hidden]
    rotary: which of the model's rotary embeddings
    """

    input_norm: Norm
    attention: FusedAttention
    attention_norm: Norm | None
    middle_norm: Norm
    mlp: Callable[[Tensor], Tensor]
    mlp_norm: Norm | None
    rotary: int


class FusedModel(nn.Module):
    """In the place of a ...ForCausalLM, for flat batches over a paged cache.

    rotaries: one a kind of rotary embedding, see Layer.rotary
    softcap: of the logits: softcap * tanh(logits / softcap)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        rotaries: list[Rotary],
        embed: nn.Module,
        last_norm: Norm,
        head: nn.Module,
        softcap: float | None,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.model = model  # for its parameters and names; its forward is not called
        self._layers = layers
        self._rotaries = rotaries
        self._embed: Callable[[Tensor], Tensor] = embed.__call__
        self._head: Callable[[Tensor], Tensor] = head.__call__
        self._last_norm = last_norm
        self._softcap = softcap
        self._kernels = kernels
        # The norm at the end of each layer is the first of the next one.
        self._next_norms = [*(layer.input_norm for layer in layers[1:]), last_norm]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, *, logits_to_keep: Tensor, relevo: RotaryAttention, **_: Any
    ) -> SimpleNamespace:
        """input_ids, position_ids: [1, n]. Returns logits [1, len(logits_to_keep), vocab_size]."""
        hidden = self._embed(input_ids)
        rotaries = [rotary(hidden, position_ids) for rotary in self._rotaries]
        hidden = hidden[0]
        normed = self._norm(hidden, self._layers[0].input_norm)
        last = self._layers[-1]
        for layer, next_norm in zip(self._layers, self._next_norms, strict=True):
            output = layer.attention.compute(normed, *rotaries[layer.rotary], relevo)
            if layer is last:
                output, hidden = output.index_select(0, logits_to_keep), hidden.index_select(0, logits_to_keep)
            normed, hidden = self._add(output, hidden, layer.attention_norm, layer.middle_norm)
            normed, hidden = self._add(layer.mlp(normed), hidden, layer.mlp_norm, next_norm)
        return SimpleNamespace(logits=self._logits(normed)[None])

    def _logits(self, normed: Tensor) -> Tensor:
        logits = self._head(normed)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._kernels.rms_norm(x, norm.weight, norm.eps, norm.weight_offset)

    def _add(self, output: Tensor, hidden: Tensor, own_norm: Norm | None, next_norm: Norm) -> tuple[Tensor, Tensor]:
        """(the sum normed for what comes next, the sum)."""
        if own_norm is not None:
            output = self._norm(output, own_norm)
        return self._kernels.add_rms_norm(output, hidden, next_norm.weight, next_norm.eps, next_norm.weight_offset)


class FusedModelPass:
    name = "decoder"
    does = "residual sums fused with norms across layers, in place of the model's own forward"

    def candidates(self, target: Target) -> Iterable[str]:
        return ("",)

    def replacement(self, target: Target, name: str) -> nn.Module:
        model = target.model
        found = decoder_layers(target.trace)
        if "position_ids" not in target.trace.calls[0].kwargs or "relevo" not in target.trace.calls[0].kwargs:
            raise NotApplied("it is called through an adapter")
        parents = {layer.name.rpartition(".")[0].rpartition(".")[0] for layer in found}
        if len(parents) != 1:
            raise NotApplied("its layers are not in one list")
        decoder = parents.pop()
        calls, kinds = rotary_calls(target.trace, [layer.attention for layer in found])
        layers = [_layer(model, layer, kind) for layer, kind in zip(found, kinds, strict=True)]
        embed, last_norm = _ends(target, decoder)
        head = _head(target, decoder)
        softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma's name; see _GAINS for all others
        adapt = {layer.rotary: layer.attention.rotary for layer in layers}
        rotaries = [
            Rotary(model.get_submodule(call.module), call, adapt[i], target.max_model_len)
            for i, call in enumerate(calls)
        ]
        fused = FusedModel(
            model,
            layers,
            rotaries,
            embed,
            last_norm,
            head,
            softcap,
            target.kernels,
        )
        _require_same(model, fused, head, target)
        return fused


def _layer(model: nn.Module, layer: DecoderLayer, rotary: int) -> Layer:
    modules = [model.get_submodule(step) for step in layer.steps]
    letters = {layer.attention: "A", layer.mlp: "M"}
    kinds = "".join(
        "N" if isinstance(module, FusedRMSNorm) else letters.get(step, "?")
        for step, module in zip(layer.steps, modules, strict=True)
    )
    if kinds not in ("NANM", "NANNMN"):
        raise NotApplied("its layers are not norm, attention, norm, MLP, or those with a norm more after each")
    attention = modules[1]
    if not isinstance(attention, FusedAttention):
        raise NotApplied("its attention was left alone")
    norms = [_bare(module) for module in modules if isinstance(module, FusedRMSNorm)]
    sandwich = kinds == "NANNMN"
    mlp = modules[4 if sandwich else 3]
    return Layer(
        input_norm=norms[0],
        attention=attention,
        attention_norm=norms[1] if sandwich else None,
        middle_norm=norms[2 if sandwich else 1],
        mlp=mlp.compute if isinstance(mlp, GatedMLP) else _Unfused(mlp),
        mlp_norm=norms[3] if sandwich else None,
        rotary=rotary,
    )


@dataclass(frozen=True, slots=True)
class _Unfused:
    """A module that takes and gives [1, n, hidden], such as a mixture of experts; its scores are dropped."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        output = self.module(x[None])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden.view(x.shape)


def _bare(norm: FusedRMSNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.eps, norm.weight_offset)


def _ends(target: Target, decoder: str) -> tuple[nn.Module, Norm]:
    """The embedding and the last norm: what is called first and last in the decoder."""
    calls = [c for c in target.trace.children_called(decoder) if "norm" in c.module or "embed" in c.module]
    if not calls:
        raise NotApplied("it has no embedding or last norm")
    first, last = (target.model.get_submodule(call.module) for call in (calls[0], calls[-1]))
    if not isinstance(first, nn.Embedding) or not isinstance(last, FusedRMSNorm):
        raise NotApplied("it does not begin with an embedding and end with an RMSNorm")
    return first, _bare(last)


def _head(target: Target, decoder: str) -> nn.Module:
    outermost = decoder.partition(".")[0]
    calls = [call for call in target.trace.children_called("") if call.module != outermost]
    if len(calls) != 1:
        raise NotApplied("beside its decoder it has not exactly one module, the head")
    return target.model.get_submodule(calls[0].module)


def _require_same(model: nn.Module, fused: FusedModel, head: nn.Module, target: Target) -> None:
    """Run both on the inputs of the trace: the same modules with other glue between them."""
    ours, theirs = CapturingAttention(target.kernels), CapturingAttention(target.kernels)
    gains = torch.tensor(_GAINS, device=target.inputs["input_ids"].device)[:, None]
    with head.register_forward_pre_hook(lambda _, args: (args[0] * gains.to(args[0].dtype),)):
        found = fused(**target.inputs, use_cache=False, **target.model_kwargs(ours)).logits
        expected = model(**target.inputs, use_cache=False, **target.model_kwargs(theirs)).logits
    require_same_calls(ours, theirs)
    require_equal("its output", found, expected, SAME_PARTS)
