"""Blocks from cache to cache: what comes so, and every way in which it does not. Fake engines compare each block."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from relevo.engine.cache_memory import CacheMemory
from relevo.engine.gpu.block_streams import BlockStreams
from services.kvtransfer.client import DirectPlace
from services.pb.kvtransfer_pb2 import DirectMemory
from services.worker import direct_kv
from services.worker.transfers import Direction, Fallback, Transfers
from tests.support import triton_interpreter
from tests.support.agents import running_agent, until
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_engine import continuation
from tests.support.fake_nixl import FakeNixl, fake_nixl
from tests.workers.harness import decode_stream, prefill_stream, running_decode, running_prefill
from tests.workers.test_split import BLOCK_SIZE, MAX_TOKENS, FakePair

LENGTH = 30
NUM_BLOCKS = LENGTH // BLOCK_SIZE


def prompt(number: int) -> list[int]:
    """No two have a block in common."""
    return list(range(100 + number, 100 + number + LENGTH))


@pytest.fixture
def nixl() -> Iterator[FakeNixl]:
    with fake_nixl() as nixl:
        yield nixl


async def start(stack: AsyncExitStack, tmp_path: Path, *, writes: bool = True, reads: bool = True) -> FakePair:
    agent = await stack.enter_async_context(running_agent(tmp_path))
    prefill = await stack.enter_async_context(running_prefill(agent, direct_kv=writes))
    decode = await stack.enter_async_context(running_decode(agent, direct_kv=reads))
    to_prefill = await stack.enter_async_context(prefill_stream(prefill))
    to_decode = await stack.enter_async_context(decode_stream(decode))
    return FakePair(to_prefill, to_decode, agent, prefill, decode)


@pytest.fixture
async def pair(nixl: FakeNixl, tmp_path: Path) -> AsyncIterator[FakePair]:
    async with AsyncExitStack() as stack:
        pair = await start(stack, tmp_path)
        await connect(pair)
        yield pair


async def connect(pair: FakePair) -> None:
    """By a request whose first blocks go through the arena. What is counted begins after it."""
    await serve(pair, 100)
    await until(lambda: is_connected(pair))
    assert fell_back(pair, Fallback.APART) > 0
    assert copied(pair, Direction.IN) + copied(pair, Direction.DIRECT) == NUM_BLOCKS
    for counter in pair.decode.worker.transfers._blocks, pair.decode.worker.transfers._fallbacks:
        counter.clear()


def is_connected(pair: FakePair) -> bool:
    assert pair.decode.worker.direct_kv is not None
    return any(peer.is_connected for peer in pair.decode.worker.direct_kv._peers.values())


def copied(pair: FakePair, direction: Direction) -> float:
    return float(pair.decode.worker.transfers._blocks.labels(direction.value)._value.get())


def fell_back(pair: FakePair, reason: Fallback) -> float:
    return float(pair.decode.worker.transfers._fallbacks.labels(reason.value)._value.get())


async def serve(pair: FakePair, number: int) -> None:
    assert await pair.serve(number, prompt(number)) == continuation(prompt(number), MAX_TOKENS)


@pytest.mark.usefixtures("any_nixl")
async def test_blocks_come_out_of_the_writers_cache_once_it_is_connected(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        pair = await start(stack, tmp_path)
        await connect(pair)
        for number in range(1, 4):
            await serve(pair, number)
        assert copied(pair, Direction.DIRECT) == 3 * NUM_BLOCKS
        assert copied(pair, Direction.IN) == 0
        assert pair.agent.store.counters.sealed_blocks == 4 * NUM_BLOCKS  # they are in their slots all the same


@pytest.mark.parametrize(("writes", "reads"), [(True, False), (False, True)])
@pytest.mark.usefixtures("nixl")
async def test_both_must_have_the_option(tmp_path: Path, writes: bool, reads: bool) -> None:
    async with AsyncExitStack() as stack:
        pair = await start(stack, tmp_path, writes=writes, reads=reads)
        await serve(pair, 1)
        await serve(pair, 2)
        assert copied(pair, Direction.IN) == 2 * NUM_BLOCKS
        assert copied(pair, Direction.DIRECT) == fell_back(pair, Fallback.APART) == 0


async def test_bytes_that_are_others_by_now_are_copied_out_of_the_slot(pair: FakePair, nixl: FakeNixl) -> None:
    nixl.damage = lambda address: ctypes.memset(address + 7, 0xA5, 3)
    await serve(pair, 1)
    assert fell_back(pair, Fallback.CHANGED) == NUM_BLOCKS
    assert copied(pair, Direction.DIRECT) == 0
    nixl.damage = lambda _address: None
    await serve(pair, 2)  # nothing was wrong with the writer
    assert copied(pair, Direction.DIRECT) == NUM_BLOCKS


async def test_a_read_that_fails_is_told_once_and_tried_again_after_a_rest(
    pair: FakePair, nixl: FakeNixl, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    nixl.fails, num_transfers = True, nixl.num_transfers
    await serve(pair, 1)
    assert fell_back(pair, Fallback.FAILED) > 0
    await serve(pair, 2)
    assert nixl.num_transfers == num_transfers + 1
    assert copied(pair, Direction.IN) == 2 * NUM_BLOCKS
    assert [record.name for record in caplog.records if "do not come directly" in record.getMessage()] == [
        direct_kv.__name__
    ]
    assert pair.decode.worker.direct_kv is not None
    nixl.fails = False
    for peer in pair.decode.worker.direct_kv._peers.values():
        peer._rests_until = 0.0
    await serve(pair, 3)
    await until(lambda: is_connected(pair))
    before = copied(pair, Direction.DIRECT)
    await serve(pair, 4)
    assert copied(pair, Direction.DIRECT) == before + NUM_BLOCKS


async def test_a_read_that_hangs_is_ended_before_its_places_are_used(
    pair: FakePair, nixl: FakeNixl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_kv, "READ_SECONDS", 0.05)
    nixl.is_stuck = True
    nixl.damage = lambda address: ctypes.memset(address, 0xA5, 3)
    address = await pair.submit(1, prompt(1))
    await pair.fetch(address)
    await until(lambda: fell_back(pair, Fallback.FAILED) > 0)
    nixl.deliver()  # what comes now would be found by the engine
    first = await pair.relay_first_token()
    token_ids, _ = await pair.to_decode.rest(1)
    assert [first, *token_ids] == continuation(prompt(1), MAX_TOKENS)
    assert copied(pair, Direction.DIRECT) == 0


async def test_a_cancelled_reader_keeps_its_places_until_nobody_writes_there(
    pair: FakePair, nixl: FakeNixl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_kv, "READ_SECONDS", 0.3)
    nixl.is_stuck = True
    pool = pair.decode.engine.scheduler.pool
    await pair.fetch(await pair.submit(1, prompt(1)))
    await until(lambda: nixl.num_under_way == 1)
    await pair.cancel_decode()
    for _ in range(20):
        await asyncio.sleep(0.002)
        assert nixl.num_under_way == 0 or pool.num_free_blocks < pool.num_blocks
    assert nixl.num_under_way == 1, "0.04 s are not over yet"
    await pair.to_decode.rest(1)
    assert nixl.num_under_way == 0


async def test_a_writer_that_is_gone_costs_nothing_but_time(nixl: FakeNixl, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        pair = await start(stack, tmp_path)
        await connect(pair)
        assert pair.prefill.worker.direct_kv is not None
        await pair.prefill.worker.direct_kv.close()
        await serve(pair, 1)
        assert fell_back(pair, Fallback.FAILED) > 0
        assert copied(pair, Direction.DIRECT) == 0


@pytest.mark.usefixtures("any_nixl")
@pytest.mark.parametrize(
    "memory",
    [
        DirectMemory(metadata=b"", kind="DRAM"),
        DirectMemory(metadata=b"garbage" * 99, kind="VRAM", device=4_000_000_000),
    ],
)
async def test_garbage_instead_of_metadata_is_no_way(
    tmp_path: Path, memory: DirectMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_kv.DirectKV, "show", lambda _self: memory)
    async with AsyncExitStack() as stack:
        pair = await start(stack, tmp_path)
        await serve(pair, 1)
        assert pair.decode.worker.direct_kv is not None
        [peer] = pair.decode.worker.direct_kv._peers.values()
        await until(lambda: not peer._is_connecting)
        await serve(pair, 2)
        assert fell_back(pair, Fallback.APART) == copied(pair, Direction.IN) == 2 * NUM_BLOCKS


class TestOnGpu:
    """Two caches on a stand-in of a GPU: what is enqueued there happens when somebody waits for it."""

    @pytest.fixture
    def caches(self) -> tuple[FakeCuda, Tensor, BlockStreams, Tensor]:
        triton_interpreter.mend()
        cuda = FakeCuda()
        source = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 1024).contiguous()
        target = torch.zeros(8, 1024, dtype=torch.uint8)
        return cuda, target, BlockStreams(target, cuda, cuda.hashing), source

    async def test_a_step_in_flight_does_not_write_over_what_has_come(
        self, nixl: FakeNixl, caches: tuple[FakeCuda, Tensor, BlockStreams, Tensor]
    ) -> None:
        cuda, target, streams, source = caches
        async with asyncio.TaskGroup() as tasks:

            def make(memory: CacheMemory, name: str) -> direct_kv.DirectKV:
                return direct_kv.DirectKV(
                    memory, Transfers(), name, lambda work, _name: tasks.create_task(work), lambda: True
                )

            shows, reads = make(CacheMemory(source, None), "shows"), make(CacheMemory(target, streams), "reads")
            memory = shows.show()
            wanted = {
                key: direct_kv.WantedBlock(
                    DirectPlace(memory, key), key + 1, xxhash.xxh3_64_intdigest(source[key].numpy().data)
                )
                for key in (3, 4)
            }
            assert await reads.read(wanted, None) == set()
            await until(lambda: all(peer.is_connected for peer in reads._peers.values()))
            cuda.compute.enqueue(lambda: target[4].numpy().fill(77))  # for a request that has ended
            streams.step_launched()
            assert await reads.read(wanted, streams.last_launch) == {3, 4}
            cuda.compute.run(cuda.compute.num_enqueued)
            assert target[4:6].equal(source[3:5])
            await reads.close()
            await shows.close()
