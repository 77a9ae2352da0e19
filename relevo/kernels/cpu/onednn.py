"""Linear layers by oneDNN, which torch carries, for CPUs whose instructions our kernels do not use.

Its weights are laid out anew for the CPU, once. A row of a result may depend, in its last bits, on the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relevo.kernels import reference


class PackedLinear:
    """Layers of one dtype, joined and laid out for oneDNN; see `Kernels.prepare_linear`."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        weight = (weights[0] if len(weights) == 1 else torch.cat(list(weights))).detach()
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.numel() * weight.element_size()
        self._dtype = weight.dtype
        bias = reference.joined_biases(weights, biases)
        self._bias = None if bias is None else bias.detach().to(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.in_features:
            raise ValueError(f"x has {x.shape[1]} features, the weights have {self.in_features}")
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._weight, self._bias, "none", [], "")
        return output.to(x.dtype)


def is_faster(dtype: torch.dtype, capabilities: Mapping[str, object], supports_bfloat16: bool) -> bool:
    """Whether oneDNN beats our kernels, which know vectors of eight float32 only.

    capabilities: torch.cpu.get_capabilities(); what it does not name, the CPU does not have
    """
    if dtype == torch.bfloat16:
        return supports_bfloat16 and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return dtype == torch.float32 and bool(capabilities.get("avx512_f"))


def supports_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU."""
    return is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_available() -> bool:
    """Whether this torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's
