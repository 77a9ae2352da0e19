"""Blocks between a device and the host, on stand-ins of streams that do nothing before somebody waits for it."""

from __future__ import annotations

import logging
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import xxhash

from relevo.core.block_hash import LayerShape
from relevo.engine.cache_memory import CacheMemory
from relevo.engine.gpu.block_streams import STAGED_BLOCKS, BlockStreams
from relevo.engine.kv_cache import KVCache
from relevo.models.layout import KVLayout
from tests.support.fake_cuda import FakeCuda

NUM_BLOCKS, BLOCK_SIZE = 40, 4
BLOCK_BYTES, SLOT_BYTES = 1024, 4096


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def cache(cuda: FakeCuda) -> KVCache:
    """Block i is full of i."""
    cache = make_cache()
    cache.streams = BlockStreams(cache.storage, cuda, cuda.hashing)
    return cache


@pytest.fixture
def arena() -> memoryview:
    """Room for NUM_BLOCKS, in shared memory."""
    return memoryview(mmap.mmap(-1, NUM_BLOCKS * SLOT_BYTES))


def slots_of(arena: memoryview, *slots: int) -> list[memoryview]:
    return [arena[slot * SLOT_BYTES : slot * SLOT_BYTES + BLOCK_BYTES] for slot in slots]


def checksums_of(cache: KVCache, *block_ids: int) -> list[int]:
    return [xxhash.xxh3_64_intdigest(cache.storage[block_id].numpy().data) for block_id in block_ids]


def make_cache(kv_heads: int = 2) -> KVCache:
    layout = KVLayout((LayerShape(kv_heads, 32, 32),), torch.float16, block_size=BLOCK_SIZE)
    cache = KVCache(layout, NUM_BLOCKS, torch.device("cpu"))
    cache.storage.copy_(torch.arange(NUM_BLOCKS, dtype=torch.uint8)[:, None].expand_as(cache.storage))
    return cache


def launch_write(cuda: FakeCuda, cache: KVCache, block_id: int, value: int) -> None:
    """A step that writes a block: at some time."""
    block = cache.storage[block_id].numpy()
    cuda.compute.enqueue(lambda: block.fill(value))
    cache.step_launched()


def test_many_blocks_leave_and_arrive_bit_for_bit(cuda: FakeCuda, cache: KVCache) -> None:
    other = make_cache()
    other.streams = BlockStreams(other.storage, cuda, cuda.hashing)
    other.storage.zero_()
    ids = list(range(0, 2 * STAGED_BLOCKS, 2))
    places = [block_id + 1 for block_id in ids]
    with cache.leaving(ids) as blocks, other.arriving(places, other.last_launch()) as into:
        for source, place in zip(blocks, into, strict=True):
            place[:] = source
    assert other.storage[places].equal(cache.storage[ids])
    assert not other.storage[ids].any()
    assert cuda.copied == 2 * len(ids), "one copy a block and direction"


def test_no_blocks_are_no_work(cuda: FakeCuda, cache: KVCache) -> None:
    with cache.leaving([]) as blocks, cache.arriving([], cache.last_launch()) as places:
        assert list(blocks) == list(places) == []
    assert cuda.copied == 0


def test_leaving_waits_for_the_step_that_is_settled_and_not_for_the_next(cuda: FakeCuda, cache: KVCache) -> None:
    launch_write(cuda, cache, block_id=3, value=100)
    launch_write(cuda, cache, block_id=4, value=101)  # launched before the first one's results were known
    cache.step_settled()
    with cache.leaving([3]) as blocks:
        assert (blocks[0] == 100).all()
    assert (cache.storage[4] == 4).all(), "the step in flight was waited for: the copy came after it"
    cache.step_settled()
    with cache.leaving([4]) as blocks:
        assert (blocks[0] == 101).all()


def test_arriving_waits_for_the_last_step_that_was_launched(cuda: FakeCuda, cache: KVCache) -> None:
    """It may write to a place for a request that has ended meanwhile."""
    for value in (100, 101):
        launch_write(cuda, cache, block_id=7, value=value)
    cache.step_settled()
    with cache.arriving([7], cache.last_launch()) as places:
        places[0][:] = 55
    cuda.compute.run(cuda.compute.num_enqueued)
    assert (cache.storage[7] == 55).all()


def test_addresses_are_told_when_no_step_writes_there_any_more(cuda: FakeCuda, cache: KVCache) -> None:
    """Who writes there by himself knows of no stream."""
    memory = CacheMemory(cache.storage, cache.streams)
    for value in (100, 101):
        launch_write(cuda, cache, block_id=7, value=value)
    cache.step_settled()
    reserved = cache.last_launch()
    launch_write(cuda, cache, block_id=9, value=102)
    addresses = [cache.storage[block_id].data_ptr() for block_id in (7, 1)]
    assert memory.addresses([7, 1], reserved) == addresses
    assert (cache.storage[9] == 9).all(), "a step that was launched since was waited for"
    cache.storage[7] = 55
    cuda.compute.run(cuda.compute.num_enqueued)
    assert (cache.storage[7] == 55).all()
    assert memory.checksums([7, 1]) == checksums_of(cache, 7, 1)


def test_settling_is_the_end_of_all_that_the_device_does(cuda: FakeCuda, cache: KVCache) -> None:
    cuda.Stream(cache.storage.device).enqueue(lambda: cache.storage[7].numpy().fill(9))  # a library's own
    CacheMemory(cache.storage, cache.streams).settle()
    assert (cache.storage[7] == 9).all()


def test_arriving_does_not_wait_for_steps_that_were_launched_since(
    cuda: FakeCuda, cache: KVCache, arena: memoryview
) -> None:
    """Else each copy of a long prompt would wait for a step of others, which know whose the places are."""
    cache.pin(arena)
    launch_write(cuda, cache, block_id=7, value=100)
    reserved = cache.last_launch()
    launch_write(cuda, cache, block_id=9, value=101)
    cache.send([1], slots_of(arena, 0))
    assert cache.receive([7], slots_of(arena, 0), reserved) == checksums_of(cache, 1)
    with cache.arriving([8], reserved) as places:
        places[0][:] = 55
    assert (cache.storage[9] == 9).all(), "the later step was waited for"
    cuda.compute.run(cuda.compute.num_enqueued)
    assert cache.storage[7:10, 0].tolist() == [1, 55, 101]


def test_arriving_waits_for_copies_of_blocks_between_steps(cuda: FakeCuda, cache: KVCache) -> None:
    """As beams make them."""
    with cuda.stream(cuda.compute):
        cache.copy_blocks([(1, 7)])
    with cache.arriving([7], cache.last_launch()) as places:
        places[0][:] = 55
    cuda.compute.run(cuda.compute.num_enqueued)
    assert (cache.storage[7] == 55).all()


def test_a_step_that_is_launched_meanwhile_is_not_waited_for_by_what_leaves(cuda: FakeCuda, cache: KVCache) -> None:
    launch_write(cuda, cache, block_id=3, value=100)
    cache.step_settled()
    with cache.leaving([3]) as blocks:
        launch_write(cuda, cache, block_id=3, value=101)  # by a bug: the block is held
        cuda.compute.run(cuda.compute.num_enqueued)
        assert (blocks[0] == 100).all(), "what has left changes no more"


def test_more_threads_than_lanes_take_turns(cuda: FakeCuda, cache: KVCache) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def out(block_id: int) -> bool:
        nonlocal inside, most
        with cache.leaving([block_id, block_id + 1]) as blocks:
            with lock:
                inside += 1
                most = max(most, inside)
            right = (blocks[0] == block_id).all() and (blocks[1] == block_id + 1).all()
            with lock:
                inside -= 1
        with cache.arriving([block_id], cache.last_launch()) as places:
            places[0][:] = block_id
        return bool(right)

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(out, range(NUM_BLOCKS - 1)))
    assert 1 <= most <= 2
    assert cache.storage.equal(make_cache().storage)


def test_an_error_leaves_no_copy_under_way_and_the_lane_free(cuda: FakeCuda, cache: KVCache) -> None:
    for _ in range(3):  # more often than there are lanes
        cuda.fail_after = 1
        with pytest.raises(RuntimeError, match="CUDA error"), cache.leaving([1, 2]):
            raise AssertionError("blocks that have not left")
        assert cuda.is_idle
    cuda.fail_after = 1
    with pytest.raises(RuntimeError, match="CUDA error"), cache.arriving([1, 2], cache.last_launch()) as places:
        places[0][:] = 1
    assert cuda.is_idle
    before = cuda.copied
    with pytest.raises(ValueError, match="by the host"), cache.arriving([3], cache.last_launch()) as places:
        places[0][:] = 78
        raise ValueError("by the host")
    assert cuda.copied == before
    assert cache.storage.equal(make_cache().storage)
    with cache.leaving([1]) as blocks:
        assert (blocks[0] == 1).all()


def test_blocks_go_straight_between_cache_and_pinned_slots(cuda: FakeCuda, cache: KVCache, arena: memoryview) -> None:
    cache.pin(arena)
    assert list(cuda.registered.values()) == [len(arena)]
    slots = slots_of(arena, 3, 0, 39)
    assert cache.send([5, 6, 7], slots) == checksums_of(cache, 5, 6, 7)
    assert [bytes(slot) for slot in slots] == [bytes([block_id]) * BLOCK_BYTES for block_id in (5, 6, 7)]
    assert cache.receive([20, 10, 30], slots, cache.last_launch()) == checksums_of(cache, 5, 6, 7)
    assert cache.storage[[20, 10, 30]].equal(cache.storage[[5, 6, 7]])
    assert cuda.copied == 6


def test_slots_that_are_not_pinned_are_not_touched(cuda: FakeCuda, cache: KVCache, arena: memoryview) -> None:
    [slot] = slots_of(arena, 0)
    assert cache.send([5], [slot]) is cache.receive([5], [slot], cache.last_launch()) is None
    cache.pin(arena)
    other = memoryview(bytearray(BLOCK_BYTES))
    assert cache.send([5, 6], [slot, other]) is cache.receive([5, 6], [slot, other], cache.last_launch()) is None
    assert cuda.copied == 0
    assert not any(slot)


def test_what_goes_to_slots_waits_for_steps_as_the_rest(cuda: FakeCuda, cache: KVCache, arena: memoryview) -> None:
    cache.pin(arena)
    launch_write(cuda, cache, block_id=3, value=100)
    launch_write(cuda, cache, block_id=4, value=101)
    cache.step_settled()
    assert cache.send([3], slots_of(arena, 0)) == checksums_of(cache, 3)
    assert (cache.storage[4] == 4).all(), "the step in flight was waited for"
    assert cache.receive([4], slots_of(arena, 0), cache.last_launch()) == checksums_of(cache, 3)
    cuda.compute.run(cuda.compute.num_enqueued)
    assert (cache.storage[4] == 100).all()


def test_what_others_write_to_a_slot_gets_into_no_checksum(cuda: FakeCuda, cache: KVCache, arena: memoryview) -> None:
    """A writer whose lease has ended and who has not noticed."""
    cache.pin(arena)
    [slot] = slots_of(arena, 0)

    def scribble(byte: int) -> None:
        slot[500] = byte

    cuda.before_hashing = partial(scribble, 99)
    right = checksums_of(cache, 5)
    assert cache.send([5], [slot]) == right
    assert cache.receive([6], [slot], cache.last_launch()) != right, "what is here is not what was sealed"
    slot[500] = 5
    assert cache.receive([6], [slot], cache.last_launch()) == right, "and what was written since then is not here"
    assert slot[500] == 99


def test_a_new_arena_takes_the_place_of_the_one_before(cuda: FakeCuda, cache: KVCache, arena: memoryview) -> None:
    cache.pin(arena)
    new = memoryview(mmap.mmap(-1, SLOT_BYTES))
    cache.pin(new)
    assert list(cuda.registered.values()) == [SLOT_BYTES]
    assert cache.send([5], slots_of(arena, 0)) is None
    assert cache.send([5], slots_of(new, 0)) == checksums_of(cache, 5)


def test_arenas_that_are_pinned_at_once_do_not_wait_for_each_other(cuda: FakeCuda, cache: KVCache) -> None:
    arenas = [memoryview(mmap.mmap(-1, SLOT_BYTES)) for _ in range(6)]
    with ThreadPoolExecutor(len(arenas)) as threads:
        list(threads.map(cache.pin, arenas))
    assert list(cuda.registered.values()) == [SLOT_BYTES]


def test_memory_that_cannot_be_pinned_is_told(
    cuda: FakeCuda, cache: KVCache, arena: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses_memory = True
    with caplog.at_level(logging.WARNING):
        cache.pin(arena)
    assert "out of memory" in caplog.text
    assert cache.send([5], slots_of(arena, 0)) is None


def test_blocks_too_small_to_be_hashed_on_the_device_are_told(
    cuda: FakeCuda, arena: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(kv_heads=1)
    cache.streams = BlockStreams(cache.storage, cuda)
    with caplog.at_level(logging.WARNING):
        cache.pin(arena)
    assert "512 bytes" in caplog.text
    assert not cuda.registered


def test_an_error_on_the_way_to_a_slot(cuda: FakeCuda, cache: KVCache, arena: memoryview) -> None:
    cache.pin(arena)
    for copy in (cache.send, partial(cache.receive, after=cache.last_launch())) * 2:
        cuda.fail_after = 1
        with pytest.raises(RuntimeError, match="CUDA error"):
            copy([1, 2], slots_of(arena, 0, 1))
        assert cuda.is_idle
    assert cache.send([3], slots_of(arena, 0)) == checksums_of(cache, 3)


def test_on_a_cpu_they_are_the_blocks_themselves() -> None:
    cache = make_cache()
    assert cache.streams is None
    with cache.leaving([5]) as blocks, cache.arriving([6], cache.last_launch()) as places:
        assert np.shares_memory(blocks[0], cache.storage.numpy())
        places[0][:] = 66
    assert (cache.storage[6] == 66).all()
    cache.step_launched()
    cache.step_settled()
    cache.pin(memoryview(bytearray(BLOCK_BYTES)))
    assert cache.send([5], [memoryview(bytearray(BLOCK_BYTES))]) is None
