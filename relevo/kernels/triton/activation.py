"""SiLU or GELU of the gate, times the rest.

dtypes: float32, bfloat16 and float16; others go to `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import Activation, reference
from relevo.kernels.triton.launch import FLOATS

BLOCK = 1024

SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KINDS: dict[str, tl.constexpr] = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}


@triton.jit
def gated_activation_kernel(x, out, features, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    start = x + row * 2 * features + column
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + features, mask=inside, other=0.0).to(tl.float32)
    if KIND == SILU:
        share = _sigmoid(gate)
    elif KIND == GELU:
        share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    else:
        # (1 + tanh(u)) / 2 is the sigmoid of 2u. Far from zero it is 0 or 1, long before the cube overflows.
        near = tl.minimum(tl.maximum(gate, -1000.0), 1000.0)
        share = _sigmoid(1.5957691216057308 * (near + 0.044715 * near * near * near))
    tl.store(out + row * features + column, (gate * share * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid(x):
    """Without overflow, whatever x."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


def gated_activation(x: Tensor, activation: Activation) -> Tensor:
    """See `Kernels.gated_activation`."""
    if x.dtype not in FLOATS:
        return reference.gated_activation(x, activation)
    assert x.is_contiguous(), x.stride()
    rows, features = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (rows, triton.cdiv(features, BLOCK))
        gated_activation_kernel[grid](x, out, features, KIND=_KINDS[activation], BLOCK=BLOCK)
    return out
