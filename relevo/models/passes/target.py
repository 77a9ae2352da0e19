"""What a pass is, and what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from relevo.kernels import Kernels, PreparedLinear
from relevo.models.passes.compare import NotApplied
from relevo.models.passes.trace import LINEAR_TYPES, ModelKwargs, Trace
from relevo.models.quantization import Quantization, dequantize_rows, quantize_rows


@dataclass(frozen=True, slots=True)
class Target:
    """A model on its way through the passes, and what it did before the first of them.

    inputs: of the run that was traced
    quantization: of the linear layers that are prepared
    """

    model: nn.Module
    kernels: Kernels
    trace: Trace
    model_kwargs: ModelKwargs
    inputs: Mapping[str, Tensor]
    max_model_len: int
    quantization: Quantization = "none"

    def prepare(self, layers: Sequence[nn.Module]) -> PreparedLinear:
        """Linear layers of the same input as one product. Raises NotApplied if one of them is not what it seems.

        If they are quantized, so are the layers' own weights, in place: what a replacement is compared with is then
        equal to it, up to rounding. Weights that an embedding shares stay as they are.
        """
        weights, biases = [], []
        for layer in layers:
            if type(layer) not in LINEAR_TYPES:
                raise NotApplied(f"{type(layer).__name__} is not a linear layer")
            assert isinstance(layer.weight, Tensor)
            weights.append(layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t())
            biases.append(layer.bias.detach() if isinstance(layer.bias, Tensor) else None)
        if len({(weight.dtype, weight.shape[1]) for weight in weights}) > 1:
            raise NotApplied("its linear layers differ in dtype or input")
        if self.quantization == "none":
            return self.kernels.prepare_linear(weights, biases)
        quantized = [quantize_rows(weight) for weight in weights]
        for layer, weight, (rows, scales) in zip(layers, weights, quantized, strict=True):
            if not self.is_tied(layer):
                weight.copy_(dequantize_rows(rows, scales, weight.dtype))
        return self.kernels.prepare_linear([rows for rows, _ in quantized], biases, [scales for _, scales in quantized])

    def is_tied(self, layer: nn.Module) -> bool:
        """Whether an embedding has the same weight."""
        return any(
            isinstance(module, nn.Embedding) and module.weight is layer.weight for module in self.model.modules()
        )

    def require_unread(self, name: str) -> None:
        """Raises NotApplied if the weight of a linear layer in (or called) `name` is read by other modules' code."""
        prefix = f"{name}."
        if any(layer == name or layer.startswith(prefix) for layer in self.trace.read_weights):
            raise NotApplied("its weights are read from outside")


class Pass(Protocol):
    """Recognises a structure and replaces it by an equal one.

    name: for logs and reports; does: the same in a few words
    """

    name: str
    does: str

    def candidates(self, target: Target) -> Iterable[str]:
        """Names of the modules that it could be about; "" is the model itself. None of them inside of another."""
        ...

    def replacement(self, target: Target, name: str) -> nn.Module:
        """What to put in the place of a module, compared with it on random rows. Changes nothing.

        Raises NotApplied with the reason if the module is to stay what it is.
        """
        ...
