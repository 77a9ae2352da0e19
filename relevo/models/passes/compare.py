"""Is what a pass puts in equal to what it takes out? Asked with numbers, on rows made to tell them apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_ROWS = 4
# A row each: (scale, shift). Small enough for an eps in a norm to show, large enough for a clip to;
# not centred, so that a norm that subtracts the mean shows too.
_ROWS = ((0.002, 0.0), (1.0, 0.5), (1.0, -0.3), (8.0, 0.2))


class NotApplied(Exception):
    """A pass does not apply to a module; why, as a sentence's rest, and with which figures."""

    def __init__(self, why: str, figures: str = "") -> None:
        super().__init__(why)
        self.figures = figures


@dataclass(frozen=True, slots=True)
class Tolerance:
    """row: of the difference's norm to the expected row's; element: of a difference to rms(row) + |expected|."""

    row: float
    element: float


# Both sides compute in their own order and round at other places. 16-bit modules of transformers round after every
# operation, ours once: measured on random weights, rows differ by up to 0.5 % in bfloat16.
EQUAL = {
    torch.float32: Tolerance(1e-4, 1e-3),
    torch.bfloat16: Tolerance(2e-2, 8e-2),
    torch.float16: Tolerance(4e-3, 2e-2),
}
# A linear layer in int8 against itself: a weight is off by up to 1/254 of its row's largest.
QUANTIZED = dict.fromkeys(EQUAL, Tolerance(1e-1, 5e-1))
# The same modules called in another order, with the same places of rounding.
SAME_PARTS = {
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.bfloat16: Tolerance(4e-3, 3e-2),
    torch.float16: Tolerance(1e-3, 8e-3),
}


def random_rows(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, NUM_ROWS, size], the same for the same size."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randn(NUM_ROWS, size, generator=generator)
    scales, shifts = torch.tensor(_ROWS).unsqueeze(-1).unbind(1)
    return (scales * (noise + shifts)).to(device, dtype).unsqueeze(0)


def require_equal(what: str, found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, Tolerance]) -> None:
    """Compare row by row over the last dimension. Raises NotApplied that names the difference."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise NotApplied(
            f"{what} is {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
        )
    tolerance = tolerances[expected.dtype]
    row, element = difference(found, expected)
    if not (row <= tolerance.row and element <= tolerance.element):
        raise NotApplied(f"{what} differs", f"{row:.1e} of a row's norm, {element:.1e} in one element")


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest of the rows' and of the elements' differences, as `Tolerance` measures them; nan if one is not."""
    found, expected = found.double(), expected.double()
    error = found - expected
    norm = expected.norm(dim=-1, keepdim=True)
    rms = norm / expected.shape[-1] ** 0.5
    tiny = torch.finfo(torch.float64).tiny
    rows = error.norm(dim=-1, keepdim=True) / (norm + tiny)
    elements = error.abs() / (rms + expected.abs() + tiny)
    return rows.max().item(), elements.max().item()
