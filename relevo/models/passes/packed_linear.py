"""Linear layers as the kernels' own product; the unpacked weight goes, unless an embedding shares it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from relevo.kernels import PreparedLinear
from relevo.models.passes.compare import EQUAL, QUANTIZED, NotApplied, random_rows, require_equal
from relevo.models.passes.target import Target
from relevo.models.passes.trace import LINEAR_TYPES


class PackedLinear(nn.Module):
    """[..., in_features] to [..., out_features]."""

    def __init__(self, prepared: PreparedLinear) -> None:
        super().__init__()
        self.prepared = prepared

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self.prepared(rows).view(*x.shape[:-1], self.prepared.out_features)

    def extra_repr(self) -> str:
        return f"{self.prepared.in_features}, {self.prepared.out_features}"


class PackedLinearPass:
    name = "packed_linear"
    does = "weights laid out for the kernels' product"

    def candidates(self, target: Target) -> Iterable[str]:
        for name, module in target.model.named_modules():
            if type(module) in LINEAR_TYPES:
                yield name

    def replacement(self, target: Target, name: str) -> nn.Module:
        linear = target.model.get_submodule(name)
        assert isinstance(linear.weight, Tensor)
        if not linear.weight.is_floating_point():
            raise NotApplied(f"its weights are {linear.weight.dtype}")
        if not target.trace.calls_of(name):
            raise NotApplied("it was not called")
        target.require_unread(name)
        packed = PackedLinear(target.prepare([linear]))
        x = random_rows(packed.prepared.in_features, linear.weight.dtype, linear.weight.device)
        # A weight that an embedding shares was not quantized in place: that difference shows here.
        quantized = target.quantization != "none" and target.is_tied(linear)
        require_equal("its output", packed(x), linear(x), QUANTIZED if quantized else EQUAL)
        return packed
