"""A prompt and the names of its blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from relevo.core.block_hash import BlockHash, hash_blocks, root_hash
from services.pb import messages_pb2, worker_pb2

LONG_PROMPT_TOKENS = 4096  # take some 0.3 ms to hash: from here on the event loop does not wait for it
_SLICE_BLOCKS = 1024  # some 1 ms of hashing
_PAUSE_SECONDS = 1e-4

Layout = tuple[bytes, int]


class Prompt:
    """The names depend on the layout of whoever holds the blocks: one list for each layout in the fleet."""

    def __init__(self, request: messages_pb2.GenerationRequest) -> None:
        self._request = request
        self._hashes: dict[Layout, list[BlockHash]] = {}

    async def hash_for(self, infos: Iterable[worker_pb2.WorkerInfo]) -> None:
        """Compute the names for these workers, long prompts' in a thread."""
        missing = {_layout(info) for info in infos} - self._hashes.keys()
        for layout in missing:
            if len(self._request.prompt_token_ids) < LONG_PROMPT_TOKENS:
                self._hashes[layout] = self._hash(layout, pause_seconds=0)
            else:
                self._hashes[layout] = await asyncio.to_thread(self._hash, layout, pause_seconds=_PAUSE_SECONDS)

    def hashes(self, info: worker_pb2.WorkerInfo) -> list[BlockHash]:
        """Of the full blocks, for this worker, for which hash_for() was called."""
        return self._hashes[_layout(info)]

    @property
    def affinity(self) -> bytes:
        """The first block's name, b"" for prompts shorter than a block."""
        return next((hashes[0] for hashes in self._hashes.values() if hashes), b"")

    def _hash(self, layout: Layout, pause_seconds: float) -> list[BlockHash]:
        """pause_seconds: after each slice. A thread that only computes keeps the interpreter for 5 ms at a time, and
        the event loop waits for it; one that sleeps hands it over."""
        fingerprint, block_size = layout
        token_ids = self._request.prompt_token_ids
        parent = root_hash(fingerprint, cache_salt=self._request.cache_salt)
        hashes: list[BlockHash] = []
        slice_tokens = _SLICE_BLOCKS * block_size
        for start in range(0, len(token_ids), slice_tokens):
            if hashes:
                parent = hashes[-1]
                time.sleep(pause_seconds)
            hashes += hash_blocks(parent, token_ids, block_size, start, min(start + slice_tokens, len(token_ids)))
        return hashes


def _layout(info: worker_pb2.WorkerInfo) -> Layout:
    return info.layout_fingerprint, info.block_size
