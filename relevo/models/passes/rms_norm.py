"""RMSNorm in one kernel (Zhang & Sennrich 2019, arXiv 1910.07467), Gemma's with 1 + weight included."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from relevo.kernels import Kernels
from relevo.models.passes.compare import EQUAL, NotApplied, random_rows, require_equal
from relevo.models.passes.target import Target

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


class FusedRMSNorm(nn.Module):
    """The whole norm as one call. `weight_offset` is added to the weight in float32, as Gemma does."""

    def __init__(self, weight: nn.Parameter, eps: float, weight_offset: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.weight_offset = weight_offset
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim], any shape."""
        rows = x.reshape(-1, x.shape[-1])
        return self._kernels.rms_norm(rows, self.weight, self.eps, self.weight_offset).view(x.shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, weight_offset={self.weight_offset}"


class RMSNormPass:
    name = "rms_norm"
    does = "each RMSNorm in one kernel"

    def candidates(self, target: Target) -> Iterable[str]:
        """Whatever is named a norm, or is of a class that is, and has no modules in it."""
        for name, module in target.model.named_modules():
            kind = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
            if "norm" in kind and not any(True for _ in module.children()):
                yield name

    def replacement(self, target: Target, name: str) -> nn.Module:
        norm = target.model.get_submodule(name)
        weight = getattr(norm, "weight", None)
        eps = next((value for key in _EPS_NAMES if isinstance(value := getattr(norm, key, None), float)), None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or eps is None:
            raise NotApplied(f"{type(norm).__name__} has no weight, or no eps")
        if getattr(norm, "bias", None) is not None:
            raise NotApplied(f"{type(norm).__name__} has a bias")
        x = random_rows(len(weight), weight.dtype, weight.device)
        expected = norm(x)
        plain, offset = (FusedRMSNorm(weight, eps, value, target.kernels) for value in (0.0, 1.0))
        try:
            require_equal("its output", plain(x), expected, EQUAL)
        except NotApplied as why:
            try:
                require_equal("its output", offset(x), expected, EQUAL)
            except NotApplied:
                raise why from None
            return offset
        return plain
