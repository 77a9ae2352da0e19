"""Host memory that is not ours to allocate, made known to CUDA: so the GPU copies to and from it by itself."""

from __future__ import annotations

from typing import Any

import numpy as np

_PORTABLE = 1  # for all devices


class PinnedMemory:
    """Keeps the view's memory mapped until it is released. Raises RuntimeError if CUDA refuses.

    Blocking: some tenths of a second a GiB.
    cuda: torch.cuda, or what stands in for it
    """

    def __init__(self, view: memoryview, cuda: Any) -> None:
        self._view = view
        self._cudart = cuda.cudart()
        self._begin = _address(view)
        result = self._cudart.cudaHostRegister(self._begin, len(view), _PORTABLE)
        if int(result):
            raise RuntimeError(f"cudaHostRegister of {len(view)} bytes: {self._cudart.cudaGetErrorString(result)}")

    def holds(self, part: memoryview) -> bool:
        return 0 <= _address(part) - self._begin <= len(self._view) - len(part)

    def release(self) -> None:
        """Nobody may be copying. The memory stays readable and writable, only slower."""
        self._cudart.cudaHostUnregister(self._begin)


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
