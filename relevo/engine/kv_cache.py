"""The paged KV cache: one tensor, seen per layer through strided views."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relevo.engine.shortage import KV_ADVICE, explain_shortage, gib
from relevo.models.layout import KVLayout


class KVCache:
    """storage: [num_blocks, block_bytes] uint8 on `device`; a block is contiguous over all layers: one copy moves it.

    layers: for every layer its (k_cache, v_cache), views of storage:
            [num_blocks, block_size, kv_heads, k_dim] and [num_blocks, block_size, kv_heads, v_dim]

    Raises StartupError if the memory is not to be had.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        num_bytes = num_blocks * layout.block_bytes
        with explain_shortage(device, f"a KV cache of {gib(num_bytes)}", KV_ADVICE):
            # Not zeroed: a page is touched when a block is first written, and no kernel reads what was not written.
            self.storage = torch.empty((num_blocks, layout.block_bytes), dtype=torch.uint8, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = layout.views(self.storage)

    def host_view(self, block_id: int) -> NDArray[Any] | None:
        """A block's own bytes, writable, where the host can reach them: [block_bytes] uint8. None: it cannot."""
        return self.storage[block_id].numpy() if self.storage.device.type == "cpu" else None

    def read_block(self, block_id: int, into: NDArray[Any] | memoryview) -> None:
        """Copy a held block out. into: [block_bytes] uint8, writable. Any thread; the GIL is released for the copy."""
        _as_tensor(into).copy_(self.storage[block_id])

    def write_block(self, block_id: int, source: NDArray[Any] | memoryview) -> None:
        """Copy a block in, into a place reserved for it. source: [block_bytes] uint8. Any thread, like read_block."""
        self.storage[block_id].copy_(_as_tensor(source))


def _as_tensor(buffer: NDArray[Any] | memoryview) -> Tensor:
    array = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, dtype=np.uint8)
    if not array.flags.writeable:
        # torch only warns that it can't enforce read-only; we read from it.
        array = np.lib.stride_tricks.as_strided(array, writeable=True) if array.base is None else array
    return torch.from_numpy(array)
