"""Copies between host and device that nobody waits for before somebody needs them.

On a GPU, a tensor made of a Python list or of pageable memory stops the host until everything before it on the stream
is done. So what a step needs is packed into one pinned buffer, and copied from there behind the work that is enqueued;
and what it brings is copied to pinned memory, and read when the device has got there. torch's allocator of pinned
memory gives a buffer to nobody else before the copy out of it is through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes

Array = NDArray[Any]


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The same arrays on the device, on the current stream. On a CPU they are the arrays' own memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpack(pack(arrays, device).to(device, non_blocking=True), arrays)


def upload_ints(values: Sequence[int], device: torch.device) -> Tensor:
    """[len(values)] int64"""
    return upload([np.array(values, dtype=np.int64)], device)[0]


def pack(arrays: Sequence[Array], device: torch.device) -> Tensor:
    """[num_bytes] uint8 in host memory, pinned where the device is a GPU."""
    num_bytes = sum(_padded(array.nbytes) for array in arrays)
    packed = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = packed.numpy()
    for array, offset in zip(arrays, _offsets(arrays), strict=True):
        view[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed


def unpack(packed: Tensor, like: Sequence[Array]) -> list[Tensor]:
    """Views of what pack() made of arrays of these shapes and dtypes, wherever it was copied to."""
    return [
        packed[offset : offset + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for array, offset in zip(like, _offsets(like), strict=True)
    ]


class Download:
    """Tensors on their way to host memory, behind what the current stream has enqueued. On a CPU they are there."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if device.type == "cuda":
            self._tensors = [_to_pinned(tensor) for tensor in tensors]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[Tensor]:
        """When they are there, and all that was enqueued before them is done."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _offsets(arrays: Sequence[Array]) -> list[int]:
    """Where each begins, in bytes."""
    ends = np.cumsum([0, *(_padded(array.nbytes) for array in arrays)])
    return [int(end) for end in ends[:-1]]


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _torch_dtype(array: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
