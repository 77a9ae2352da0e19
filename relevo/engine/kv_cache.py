"""The paged KV cache: one tensor, seen per layer through strided views."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from relevo.engine.cache_memory import CacheMemory
from relevo.engine.gpu.block_streams import BlockStreams
from relevo.engine.shortage import KV_ADVICE, explain_shortage, gib
from relevo.models.layout import KVLayout

HostBlocks = AbstractContextManager[Sequence[NDArray[Any]]]


class KVCache:
    """storage: [num_blocks, block_bytes] uint8 on `device`; a block is contiguous over all layers: one copy moves it.

    layers: for every layer its (k_cache, v_cache), views of storage:
            [num_blocks, block_size, kv_heads, k_dim] and [num_blocks, block_size, kv_heads, v_dim]
    memory: for those who reach it by themselves
    streams: on a GPU, over which blocks leave and arrive while steps compute; None on a CPU

    Raises StartupError if the memory is not to be had.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        num_bytes = num_blocks * layout.block_bytes
        with explain_shortage(device, f"a KV cache of {gib(num_bytes)}", KV_ADVICE):
            # Not zeroed: a page is touched when a block is first written, and no kernel reads what was not written.
            self.storage = torch.empty((num_blocks, layout.block_bytes), dtype=torch.uint8, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = layout.views(self.storage)
        self.streams = BlockStreams(self.storage) if device.type == "cuda" else None
        self.memory = CacheMemory(self.storage, self.streams)

    def pin(self, view: memoryview) -> None:
        """Make memory that others write to, too, the arena, one that send and receive reach; the one before it no more.

        Blocking, any thread. Where it cannot be, that is logged, and blocks go by leaving and arriving.
        """
        if self.streams is not None:
            self.streams.pin(view)

    def send(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> list[int] | None:
        """Copy held blocks to slots in pinned memory; their checksums, xxh3-64, whatever others have written there.

        None, and nothing was done, where slots are elsewhere, or on a CPU. block_bytes each, at most STAGED_BLOCKS.
        Any thread.
        """
        return None if self.streams is None else self.streams.send(block_ids, slots)

    def last_launch(self) -> object:
        """What blocks that have been reserved by now may still be written by, for `after`. Any thread."""
        return None if self.streams is None else self.streams.last_launch

    def receive(self, block_ids: Sequence[int], slots: Sequence[memoryview], after: object) -> list[int] | None:
        """Copy slots into reserved blocks; the checksums of what is there now. Else as send.

        after: last_launch() at any time since they were reserved
        """
        return None if self.streams is None else self.streams.receive(block_ids, slots, after)

    def leaving(self, block_ids: Sequence[int]) -> HostBlocks:
        """Held blocks in host memory, [block_bytes] uint8 each, as long as the context lasts: the blocks themselves on
        a CPU, else copies, made when the steps that wrote them are done. At most STAGED_BLOCKS. Any thread.
        """
        return nullcontext(self._on_host(block_ids)) if self.streams is None else self.streams.leaving(block_ids)

    def arriving(self, block_ids: Sequence[int], after: object) -> HostBlocks:
        """Where to write blocks that are reserved, likewise; they are in the cache when the context has ended.

        after: as for receive
        """
        return (
            nullcontext(self._on_host(block_ids)) if self.streams is None else self.streams.arriving(block_ids, after)
        )

    def step_launched(self) -> None:
        """A step that writes blocks has been given to the device. By the engine's thread, as the next ones."""
        if self.streams is not None:
            self.streams.step_launched()

    def step_settled(self) -> None:
        """The results of the oldest step that was launched and not settled are known, and told after this."""
        if self.streams is not None:
            self.streams.step_settled()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """(from, to) each, between two steps."""
        for source, target in pairs:
            self.storage[target].copy_(self.storage[source])
        if pairs and self.streams is not None:
            self.streams.written()

    def _on_host(self, block_ids: Sequence[int]) -> list[NDArray[Any]]:
        return [self.storage[block_id].numpy() for block_id in block_ids]
