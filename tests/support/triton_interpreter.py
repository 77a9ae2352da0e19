"""Triton 3.6's interpreter, made to do what a GPU does, where it does not.

- A float32 becomes the nearest bfloat16, of two the even one. (It cuts the lower bits off.)
- A float32 becomes the nearest float8_e4m3fn. (It loses what a rounded mantissa carries.)
- bfloat16 are multiplied, and made of whole numbers, as what they stand for. (It takes their bits for integers.)
- A scalar may bound a loop with NumPy 2.4 too. (It takes an array of one element for a number.)
- inf - inf is NaN, without a warning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot
_run = interpreter.GridExecutor.__call__
_cast = interpreter.InterpreterBuilder.cast_impl


def mend() -> None:
    """For this process; repeating it is harmless."""
    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = _patch
    interpreter.GridExecutor.__call__ = _run_without_warnings
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.cast_impl = _cast_by_value


def _convert(values: npt.NDArray[Any], source: Any, target: Any, rounding_mode: Any) -> npt.NDArray[Any]:
    if source == tl.float32 and target == tl.float8e4nv:
        eight = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.float8_e4m3fn)
        return np.asarray(eight.view(torch.uint8).numpy())
    if source != tl.float32 or target != tl.bfloat16:
        converted: npt.NDArray[Any] = _convert_float(values, source, target, rounding_mode)
        return converted
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


def _patch(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *others)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    values = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def _cast_by_value(self: Any, source: Any, target: Any) -> Any:
    if source.dtype.scalar.is_int() and target.scalar == tl.bfloat16:
        source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
    return _cast(self, source, target)


def _run_without_warnings(self: Any, *arguments: Any, **options: Any) -> None:
    with np.errstate(all="ignore"):
        _run(self, *arguments, **options)


def takes_long(kernels: object) -> bool:
    """Whether a test had better bring few rows: the interpreter takes a millisecond and more for a program."""
    return getattr(kernels, "__name__", "") == "relevo.kernels.triton"
