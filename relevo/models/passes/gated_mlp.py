"""down(activation(gate(x)) * up(x)) in three kernels: gate and up are one product (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from relevo.kernels import Activation, Kernels, PreparedLinear
from relevo.models.passes.compare import EQUAL, NotApplied, random_rows, require_equal
from relevo.models.passes.layers import decoder_layers
from relevo.models.passes.target import Target

# Linear layers by name; which is which is checked with numbers.
_GATE_UP_DOWN = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
)
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "activation", "act")


class GatedMLP(nn.Module):
    """[..., hidden] to [..., hidden]."""

    def __init__(self, gate_up: PreparedLinear, down: PreparedLinear, activation: Activation, kernels: Kernels) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.reshape(-1, x.shape[-1]).contiguous()).view(x.shape)

    def compute(self, x: Tensor) -> Tensor:
        """x: [n, hidden], contiguous. Returns the same."""
        return self.down(self._kernels.gated_activation(self.gate_up(x), self.activation))

    def extra_repr(self) -> str:
        return f"{self.gate_up.in_features}, {self.down.in_features}, {self.activation}"


class GatedMLPPass:
    name = "gated_mlp"
    does = "gate and up merged, activation fused"

    def candidates(self, target: Target) -> Iterable[str]:
        """What has such linear layers, and whatever stands for the MLP in a decoder layer."""
        names = [name for name, module in target.model.named_modules() if _find(module) is not None]
        names += [layer.mlp for layer in decoder_layers(target.trace) if layer.mlp]
        return dict.fromkeys(names)

    def replacement(self, target: Target, name: str) -> nn.Module:
        mlp = target.model.get_submodule(name)
        found = _find(mlp)
        if found is None:
            raise NotApplied(f"{type(mlp).__name__} has no gate, up and down projections")
        gate_up, down = found
        target.require_unread(name)
        activation = _activation(mlp)
        fused = GatedMLP(target.prepare(gate_up), target.prepare([down]), activation, target.kernels)
        if fused.gate_up.out_features != 2 * fused.down.in_features:
            raise NotApplied("its projections do not fit together")
        weight = down.weight
        assert isinstance(weight, Tensor)
        x = random_rows(fused.gate_up.in_features, weight.dtype, weight.device)
        require_equal("its output", fused(x), mlp(x), EQUAL)
        return fused


def _find(module: nn.Module) -> tuple[list[nn.Module], nn.Module] | None:
    children = dict(module.named_children())
    for gate_up, down in _GATE_UP_DOWN:
        if all(isinstance(children.get(name), nn.Linear) for name in (*gate_up, down)):
            return [children[name] for name in gate_up], children[down]
    return None


def _activation(mlp: nn.Module) -> Activation:
    """Which of the kernels' activations it is: told apart in float32, where tanh's approximation of GELU shows."""
    function = next((getattr(mlp, name) for name in _ACTIVATION_NAMES if callable(getattr(mlp, name, None))), None)
    if function is None:
        raise NotApplied(f"{type(mlp).__name__} has no activation by a known name")
    x = torch.linspace(-8, 8, 401)
    output = function(x)
    known: dict[Activation, Tensor] = {
        "silu": functional.silu(x),
        "gelu": functional.gelu(x),
        "gelu_tanh": functional.gelu(x, approximate="tanh"),
    }
    for name, expected in known.items():
        if torch.allclose(output, expected, rtol=1e-5, atol=1e-6):
            return name
    raise NotApplied(f"its activation {type(function).__name__} is none that the kernels have")
