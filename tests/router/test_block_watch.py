from __future__ import annotations

import pytest

from relevo.core.prefix_index import PrefixIndex
from services.pb.worker_pb2 import BlockEvents, Delta, Snapshot
from services.router.block_watch import BlockWatch, EventGap

A, B, C = (bytes([number]) * 32 for number in range(3))


def snapshot(sequence: int, names: bytes, *, first: bool = True, last: bool = True) -> BlockEvents:
    return BlockEvents(sequence=sequence, snapshot=Snapshot(block_hashes=names, first=first, last=last))


def delta(sequence: int, *, stored: bytes = b"", removed: bytes = b"") -> BlockEvents:
    return BlockEvents(sequence=sequence, delta=Delta(stored=stored, removed=removed))


def test_snapshot_in_parts_replaces_what_was_known_and_deltas_follow() -> None:
    index = PrefixIndex()
    index.store("w", [C])
    watch = BlockWatch(index, "w")
    watch.apply(snapshot(7, A, last=False))
    assert not watch.is_complete
    watch.apply(snapshot(7, B, first=False))
    watch.apply(BlockEvents(sequence=7))
    watch.apply(delta(8, stored=C, removed=B))
    watch.apply(BlockEvents(sequence=8))
    watch.apply(delta(9, removed=C))
    assert index.num_cached_blocks("w", [A, B]) == 1
    assert index.num_blocks("w") == 1


def test_block_that_is_removed_and_stored_in_one_delta_stays() -> None:
    index = PrefixIndex()
    watch = BlockWatch(index, "w")
    watch.apply(snapshot(0, A))
    watch.apply(delta(1, removed=A, stored=A))
    assert index.num_blocks("w") == 1


@pytest.mark.parametrize(
    "event",
    [
        delta(5, stored=B),
        delta(4, stored=B),
        delta(7, stored=B),
        BlockEvents(sequence=6),
        snapshot(5, B, first=False),
        delta(6, stored=B[:5]),
    ],
)
def test_what_does_not_follow_is_a_gap(event: BlockEvents) -> None:
    watch = BlockWatch(PrefixIndex(), "w")
    watch.apply(snapshot(5, A))
    with pytest.raises(EventGap):
        watch.apply(event)


@pytest.mark.parametrize("event", [delta(0, stored=A), delta(1, stored=A), snapshot(0, A, first=False)])
def test_nothing_comes_before_the_snapshot(event: BlockEvents) -> None:
    with pytest.raises(EventGap):
        BlockWatch(PrefixIndex(), "w").apply(event)
