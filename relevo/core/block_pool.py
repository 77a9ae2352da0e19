"""Who owns which block of the KV cache, and which names can be found in it.

A block is *held* (ref_cnt > 0: at least one request has it in its block_ids) or *free* (in the LRU list). A free block
that has a name is still cache: it can be found and taken again until it is evicted for somebody who needs the room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from relevo.core.block_hash import BlockHash


class BlockPool:
    """Blocks 0 … num_blocks - 1: reference counts, names, and eviction of the least recently used."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._ref_cnt = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        # First in, first evicted. Blocks without a name are put in front: evicting them loses nothing.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def find_prefix(self, block_hashes: Iterable[BlockHash]) -> list[int]:
        """Block ids of the longest run of names, from the first on, that are here. Changes nothing."""
        found = []
        for block_hash in block_hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def find(self, block_hash: BlockHash) -> int | None:
        """The block with this name."""
        return self._block_of.get(block_hash)

    def num_free_among(self, block_ids: Sequence[int]) -> int:
        """How many of these nobody holds: share() takes them out of the free list."""
        return sum(self._ref_cnt[block_id] == 0 for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that were found: one more reference each."""
        for block_id in block_ids:
            if self._ref_cnt[block_id] == 0:
                del self._free[block_id]
            self._ref_cnt[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hold this many empty blocks, evicting names if need be; None, and nothing done, if too few are free."""
        if num_blocks > len(self._free):
            return None
        taken = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            self._forget_name(block_id)
            self._ref_cnt[block_id] = 1
            taken.append(block_id)
        return taken

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back one reference each. Of a request's blocks the last are evicted first: no other name needs them."""
        for block_id in reversed(block_ids):
            assert self._ref_cnt[block_id] > 0, f"block {block_id} freed twice"
            self._ref_cnt[block_id] -= 1
            if self._ref_cnt[block_id] == 0:
                self._free[block_id] = None
                if self._hash_of[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def name(self, block_id: int, block_hash: BlockHash) -> None:
        """This held, full and computed block can be found under this name from now on.

        If another block has the name already (two requests computed the same at once), this one stays nameless.
        """
        assert self._ref_cnt[block_id] > 0 and self._hash_of[block_id] in (None, block_hash)
        if block_hash in self._block_of:
            return
        self._hash_of[block_id] = block_hash
        self._block_of[block_hash] = block_id
        _record(block_hash, self._stored, self._removed)

    def drain_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Names (stored, removed) since the last call: the net change, so the two are disjoint and in no order."""
        events = list(self._stored), list(self._removed)
        self._stored, self._removed = {}, {}
        return events

    def check(self) -> None:
        """Prove the invariants; AssertionError says which one does not hold."""
        for block_id, ref_cnt in enumerate(self._ref_cnt):
            assert ref_cnt >= 0, f"block {block_id}: ref_cnt {ref_cnt}"
            assert (ref_cnt == 0) == (block_id in self._free), (
                f"block {block_id}: ref_cnt {ref_cnt}, free list disagrees"
            )
            block_hash = self._hash_of[block_id]
            assert block_hash is None or self._block_of.get(block_hash) == block_id, f"block {block_id}: name not found"
        assert sum(block_hash is not None for block_hash in self._hash_of) == len(self._block_of), "stale names"
        assert not self._stored.keys() & self._removed.keys(), "a name both stored and removed"

    def _forget_name(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            self._hash_of[block_id] = None
            del self._block_of[block_hash]
            _record(block_hash, self._removed, self._stored)


def _record(block_hash: BlockHash, events: dict[BlockHash, None], opposite: dict[BlockHash, None]) -> None:
    if block_hash in opposite:
        del opposite[block_hash]
    else:
        events[block_hash] = None
