"""WatchBlocks: a snapshot, numbered deltas, and what happens to watchers that don't keep up."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import pytest

from relevo.core.errors import Unavailable
from services.common import block_events
from services.common.block_events import BlockEvents, TooSlow
from services.pb import messages_pb2, worker_pb2, worker_pb2_grpc
from tests.workers.harness import decode_stream, running_local_decode, submit_decode


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def split(names: bytes) -> set[bytes]:
    return {names[start : start + 32] for start in range(0, len(names), 32)}


def make_events(**limits: Any) -> BlockEvents:
    return BlockEvents(lambda: messages_pb2.Load(num_free_blocks=3), **limits)


async def snapshot(watching: AsyncGenerator[worker_pb2.BlockEvents, None]) -> tuple[int, set[bytes], int]:
    """Sequence, names and number of parts."""
    names: set[bytes] = set()
    num_parts = 0
    async for event in watching:
        assert event.WhichOneof("events") == "snapshot"
        assert event.snapshot.first == (num_parts == 0)
        num_parts += 1
        names |= split(event.snapshot.block_hashes)
        if event.snapshot.last:
            return event.sequence, names, num_parts
    raise AssertionError("no last part")


async def test_empty_snapshot_is_one_part() -> None:
    async with aclosing(make_events().watch()) as watching:
        assert await snapshot(watching) == (0, set(), 1)


async def test_deltas_follow_the_snapshot_without_a_gap() -> None:
    events = make_events()
    events.apply([], [name(1), name(2)])
    async with aclosing(events.watch()) as watching:
        sequence, names, _ = await snapshot(watching)
        assert names == {name(1), name(2)}
        events.apply([name(1)], [name(3)])
        events.apply([], [name(4)])
        for number in range(3):
            event = await anext(watching)
            assert event.sequence == sequence + 1 + number
            assert event.load.num_free_blocks == 3
            names -= split(event.delta.removed)
            names |= split(event.delta.stored)
        assert names == {name(2), name(3), name(4)}


async def test_snapshot_and_deltas_come_in_parts_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_events, "MAX_NAMES_PER_MESSAGE", 10)
    events = make_events()
    events.apply([], [name(number) for number in range(25)])
    assert events.sequence == 3
    async with aclosing(events.watch()) as watching:
        assert await snapshot(watching) == (3, {name(number) for number in range(25)}, 3)


async def test_change_during_the_snapshot_is_a_delta_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_events, "MAX_NAMES_PER_MESSAGE", 1)
    events = make_events()
    events.apply([], [name(1), name(2)])
    async with aclosing(events.watch()) as watching:
        first = await anext(watching)
        events.apply([name(1)], [])
        last = await anext(watching)
        assert first.sequence == last.sequence == 2 and last.snapshot.last
        delta = await anext(watching)
        assert delta.sequence == 3 and delta.delta.removed == name(1)


async def test_load_comes_alone_when_nothing_changes() -> None:
    events = make_events(load_interval_seconds=0.01)
    async with aclosing(events.watch()) as watching:
        await snapshot(watching)
        event = await anext(watching)
        assert event.WhichOneof("events") is None
        assert event.sequence == 0 and event.load.num_free_blocks == 3


async def test_load_is_told_at_once_when_asked() -> None:
    events = make_events(load_interval_seconds=3600)
    async with aclosing(events.watch()) as watching:
        await snapshot(watching)
        events.tell_load()
        assert (await anext(watching)).WhichOneof("events") is None
        events.apply([], [name(1)])
        events.tell_load()
        assert (await anext(watching)).delta.stored == name(1)


async def test_slow_watcher_is_cut_off_alone() -> None:
    events = make_events(max_pending_events=2)
    async with aclosing(events.watch()) as slow, aclosing(events.watch()) as quick:
        await snapshot(slow)
        await snapshot(quick)
        for number in range(3):
            events.apply([], [name(number)])
            await anext(quick)
        with pytest.raises(TooSlow, match="more than 2"):
            await anext(slow)
        events.apply([], [name(9)])
        assert (await anext(quick)).delta.stored == name(9)


async def test_shutdown_ends_watchers() -> None:
    events = make_events()
    async with aclosing(events.watch()) as watching:
        await snapshot(watching)
        events.close()
        with pytest.raises(Unavailable):
            await anext(watching)
    with pytest.raises(Unavailable):
        await anext(events.watch())


async def test_watch_follows_the_pool_over_grpc() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        stub: Any = worker_pb2_grpc.WorkerStub(running.channel)
        info = await stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=5)
        assert info.block_size == 4
        call = stub.WatchBlocks(worker_pb2.WatchBlocksRequest(), timeout=10)
        first = await call.read()
        assert first.snapshot.first and first.snapshot.last
        await stream.send(submit_decode(1, list(range(1, 10)), max_tokens=1))
        names: set[bytes] = set()
        while len(names) < 2:
            event = await call.read()
            names |= split(event.delta.stored)
        assert names == set(running.engine.scheduler.pool._block_of)
        running.worker.block_events.close()
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        await stream.rest(1)
