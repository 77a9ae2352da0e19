from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relevo.core.block_pool import BlockPool

NUM_BLOCKS = 6


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_freed_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1) or []
    pool.name(block_id, name(1))
    pool.free([block_id])
    assert pool.find_prefix([name(1), name(2)]) == [block_id]
    pool.allocate(2)
    assert pool.find_prefix([name(1)]) == []


def test_least_recently_freed_goes_first_and_a_requests_tail_before_its_head() -> None:
    pool = BlockPool(4)
    old = pool.allocate(2) or []
    young = pool.allocate(2) or []
    for number, block_id in enumerate(old + young):
        pool.name(block_id, name(number))
    pool.free(old)
    pool.free(young)
    assert pool.allocate(1) == [old[1]]
    assert pool.allocate(1) == [old[0]]
    assert pool.allocate(1) == [young[1]]


def test_nameless_blocks_are_used_before_any_name_is_evicted() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3) or []
    pool.name(blocks[0], name(0))
    pool.free([blocks[0]])
    pool.free(blocks[1:])
    assert set(pool.allocate(2) or []) == set(blocks[1:])
    assert pool.find_prefix([name(0)]) == [blocks[0]]


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    assert pool.allocate(2) is None
    assert pool.num_free_blocks == 1


def test_events_are_the_net_change() -> None:
    pool = BlockPool(1)
    for number in (1, 2):
        blocks = pool.allocate(1) or []
        pool.name(blocks[0], name(number))
        pool.free(blocks)
    assert pool.drain_events() == ([name(2)], [])
    blocks = pool.allocate(1) or []
    pool.name(blocks[0], name(2))
    assert pool.drain_events() == ([], [])
    pool.free(blocks)
    pool.allocate(1)
    assert pool.drain_events() == ([], [name(2)])


def test_freeing_twice_is_caught() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Random operations against a plain model: who holds what, and which names a watcher of the events believes in."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[list[int]] = []
        self.known: set[bytes] = set()

    @rule(num_blocks=st.integers(0, NUM_BLOCKS))
    def allocate(self, num_blocks: int) -> None:
        free = self.pool.num_free_blocks
        blocks = self.pool.allocate(num_blocks)
        assert (blocks is None) == (num_blocks > free)
        if blocks is not None:
            assert not set(blocks) & {block_id for holder in self.holders for block_id in holder}
            self.holders.append(blocks)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), number=st.integers(0, 9))
    def name_block(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from([b for holder in self.holders for b in holder]))
        if self.pool._hash_of[block_id] is None:
            self.pool.name(block_id, name(number))
            assert self.pool.find_prefix([name(number)])

    @rule(numbers=st.lists(st.integers(0, 9), max_size=4, unique=True))
    def share(self, numbers: list[int]) -> None:
        found = self.pool.find_prefix([name(number) for number in numbers])
        assert [self.pool._hash_of[block_id] for block_id in found] == [name(n) for n in numbers[: len(found)]]
        free = self.pool.num_free_blocks
        taken = self.pool.num_free_among(found)
        self.pool.share(found)
        assert self.pool.num_free_blocks == free - taken
        self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule()
    def drain(self) -> None:
        stored, removed = self.pool.drain_events()
        assert not set(stored) & self.known and set(removed) <= self.known
        self.known = (self.known - set(removed)) | set(stored)
        assert self.known == set(self.pool._block_of)

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        held = {block_id for holder in self.holders for block_id in holder}
        assert self.pool.num_free_blocks == NUM_BLOCKS - len(held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
