"""The KV cache's memory, for those who read it and write into it by themselves: NIXL, which knows no streams."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from relevo.engine.gpu.block_streams import BlockStreams


class CacheMemory:
    """storage: [num_blocks, block_bytes] uint8. streams: None on a CPU

    device: the GPU's index; None on a CPU

    Any thread; CUDA's errors are RuntimeErrors.
    """

    def __init__(self, storage: Tensor, streams: BlockStreams | None) -> None:
        self.address = storage.data_ptr()
        self.num_blocks, self.block_bytes = storage.shape
        self.device: int | None = None if streams is None else storage.get_device()
        self._storage = storage
        self._streams = streams

    def check(self) -> None:
        """Raises if blocks cannot be verified where they are."""
        if self._streams is not None:
            self._streams.check_hashing()

    def enter_thread(self) -> None:
        """The calling thread may use the device's memory, by libraries that look for CUDA's context, too."""
        if self._streams is not None:
            self._streams.enter_thread()

    def addresses(self, block_ids: Sequence[int], after: object) -> list[int]:
        """Of reserved blocks, when no step writes there any more: to be written into from elsewhere.

        after: KVCache.last_launch() at any time since they were reserved
        """
        if self._streams is not None:
            self._streams.wait_for(after)
        return [self.address + block_id * self.block_bytes for block_id in block_ids]

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        """xxh3-64 of blocks as they are in the cache. At most STAGED_BLOCKS."""
        if self._streams is not None:
            return self._streams.checksums(block_ids)
        import xxhash  # a bare machine with a GPU needs none

        return [xxhash.xxh3_64_intdigest(self._storage[block_id].numpy().data) for block_id in block_ids]

    def settle(self) -> None:
        """Wait for all that the device is doing, also for others: copies that a library has left on it."""
        if self._streams is not None:
            self._streams.settle()
