"""Which worker holds which blocks, as the workers' events told.

Names are chained, so a block's name stands for the whole prefix up to its end; what a worker can reuse of a prompt is
its leading blocks up to the first that it lacks. Eviction may leave holes, hence a scan and no bisection.

One dictionary for all workers, name → bit mask of who holds it: one pass over a prompt's names answers for the whole
fleet, and a block that everybody holds is stored once. Masks are interned, so that a million names share a few
integers. To forget a worker retires its bit at once; masks are cleaned of it little by little, as others store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat

from relevo.core.block_hash import HASH_BYTES, BlockHash

_MIN_SWEEP = 1024  # names cleaned of retired bits with each change, at least


class _Masks(dict[int, int]):
    """old → new for one operation on one bit: computed once for each mask that occurs, and always the same object."""

    def __init__(self, interned: dict[int, int], keep: int, add: int) -> None:
        super().__init__()
        self._interned = interned
        self._keep = keep
        self._add = add

    def __missing__(self, mask: int) -> int:
        new = mask & self._keep | self._add
        new = self[mask] = self._interned.setdefault(new, new)
        return new


class PrefixIndex:
    """Sets of block names by worker. Workers are named by whatever the caller knows them by, such as addresses."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, int] = {}
        self._bit: dict[str, int] = {}
        self._num_blocks: dict[str, int] = {}
        self._interned: dict[int, int] = {}
        self._retired = 0  # bits of forgotten workers; some masks may still have them
        self._num_bits = 0
        self._free_bits: list[int] = []
        self._unswept: list[BlockHash] = []
        self._sweeping = 0  # of the retired bits, those that the sweep in progress removes

    def store(self, worker: str, hashes: Iterable[BlockHash]) -> None:
        """Storing what is there already changes nothing."""
        names = list(dict.fromkeys(hashes))
        bit = self._bit_of(worker)
        holders = self._holders
        before = list(map(holders.get, names, repeat(0)))
        masks = _Masks(self._interned, ~self._sweeping, bit)
        holders.update(zip(names, map(masks.__getitem__, before), strict=True))
        self._num_blocks[worker] += sum(count for mask, count in Counter(before).items() if not mask & bit)
        self._sweep(len(names))

    def remove(self, worker: str, hashes: Iterable[BlockHash]) -> None:
        """Removing what is not there changes nothing."""
        bit = self._bit.get(worker)
        if bit is None:
            return
        holders = self._holders
        masks = _Masks(self._interned, ~(bit | self._sweeping), 0)
        num_removed = num_seen = 0
        for name in hashes:
            num_seen += 1
            mask = holders.get(name, 0)
            if not mask & bit:
                continue
            num_removed += 1
            if rest := masks[mask]:
                holders[name] = rest
            else:
                del holders[name]
        self._num_blocks[worker] -= num_removed
        self._sweep(num_seen)

    def forget(self, worker: str) -> None:
        """Everything known of a worker goes."""
        bit = self._bit.pop(worker, None)
        if bit is not None and self._num_blocks.pop(worker):
            self._retired |= bit
        elif bit is not None:
            self._free_bits.append(bit)
        if not self._bit:  # nobody is left: what is there is all retired
            self._holders, self._unswept, self._free_bits = {}, [], []
            self._retired = self._sweeping = self._num_bits = 0

    def num_blocks(self, worker: str) -> int:
        return self._num_blocks.get(worker, 0)

    def num_cached_blocks(self, worker: str, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of a prompt, named `hashes`, the worker holds."""
        return self.lookup(hashes).get(worker, 0)

    def lookup(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """How many leading blocks of a prompt each worker holds; workers that hold none are left out."""
        # Masks hardly change along a prompt: run by run, and no further than somebody holds all blocks so far.
        holding = sum(self._bit.values())
        runs: list[tuple[int, int]] = []  # who holds all blocks up to one → how many blocks this is true of
        for mask, run in groupby(map(self._holders.get, hashes, repeat(0))):
            holding &= mask
            if not holding:
                break
            runs.append((holding, len(list(run))))
        if not runs:
            return {}
        found = {}
        for worker, bit in self._bit.items():
            if num_blocks := sum([count for holding, count in runs if holding & bit]):
                found[worker] = num_blocks
        return found

    def _bit_of(self, worker: str) -> int:
        bit = self._bit.get(worker)
        if bit is None:
            if self._free_bits:
                bit = self._free_bits.pop()
            else:
                bit = 1 << self._num_bits
                self._num_bits += 1
            self._bit[worker] = bit
            self._num_blocks[worker] = 0
        return bit

    def _sweep(self, num_changed: int) -> None:
        """Clean some masks of retired bits; when all are clean the bits are free for new workers."""
        if not self._retired:
            return
        if not self._unswept:
            if self._sweeping:
                self._free_bits += _bits(self._sweeping)
                self._retired &= ~self._sweeping
                self._sweeping = 0
            if not self._retired:
                return
            self._sweeping = self._retired
            self._unswept = list(self._holders)
        start = max(0, len(self._unswept) - max(_MIN_SWEEP, 4 * num_changed))
        names = self._unswept[start:]
        del self._unswept[start:]
        masks = _Masks(self._interned, ~self._sweeping, 0)
        holders = self._holders
        for name in names:
            mask = holders.get(name, 0)
            if mask & self._sweeping:
                if rest := masks[mask]:
                    holders[name] = rest
                else:
                    del holders[name]


def split_names(names: bytes) -> list[BlockHash]:
    """Names as they come over the wire, concatenated. Raises ValueError if the last one is cut off."""
    if len(names) % HASH_BYTES:
        raise ValueError(f"{len(names)} bytes are no whole number of block names of {HASH_BYTES} bytes each")
    return [names[start : start + HASH_BYTES] for start in range(0, len(names), HASH_BYTES)]


def _bits(mask: int) -> list[int]:
    return [1 << index for index in range(mask.bit_length()) if mask >> index & 1]
