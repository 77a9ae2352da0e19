"""Triton 3.6's interpreter, made to do what a GPU does: two places where it does not.

A float32 becomes the nearest bfloat16, of two the even one (it cuts the lower bits off). A scalar may bound a loop with
NumPy 2.4 too, which no longer takes an array of one element for a number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor


def mend() -> None:
    """For this process; repeating it is harmless."""
    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = _patch


def _convert(values: npt.NDArray[Any], source: Any, target: Any, rounding_mode: Any) -> npt.NDArray[Any]:
    if source != tl.float32 or target != tl.bfloat16:
        converted: npt.NDArray[Any] = _convert_float(values, source, target, rounding_mode)
        return converted
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


def _patch(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
