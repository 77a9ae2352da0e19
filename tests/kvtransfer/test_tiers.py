"""Agents with a directory below their arena: written behind, loaded when asked for; its faults are not the agent's."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Exhausted
from services.common.grpc import cancelling, make_channel
from services.kvtransfer.agent import Agent
from services.kvtransfer.client import KvAgentClient
from services.kvtransfer.metrics import StoreCollector
from services.kvtransfer.tiers import Tier, cascade, disk_files
from services.pb import kvtransfer_pb2_grpc, worker_pb2

from .blocks import (
    BLOCK_BYTES,
    NUM_SLOTS,
    fetch_all,
    names,
    publish_all,
    until,
    until_readers,
    until_unused,
    write_and_seal,
)
from .conftest import Connect, SpawnAgent, StartAgent

NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


def disk(agent: Agent) -> Tier:
    [tier] = agent.tiers.tiers
    return tier


async def publish_below(agent: Agent, client: KvAgentClient, *labels: object) -> None:
    """Publish blocks, and leave them in the directory alone."""
    before = disk(agent).counters.stored
    await publish_all(client, *labels)
    await until(lambda: disk(agent).counters.stored == before + len(labels))
    await until_unused(agent)
    agent.store.table.clear()


async def test_sealed_blocks_are_written_behind_and_loaded_when_asked_for(
    start: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b", "c")
    assert agent.store.table.audit().num_free == NUM_SLOTS
    assert await fetch_all(client, "a", "b", "c") == {}
    assert (disk(agent).counters.hits, disk(agent).counters.stored) == (3, 3), (
        "what came from there is not written again"
    )
    assert await fetch_all(client, "a", "b", "c") == {}
    assert (disk(agent).counters.hits, agent.store.counters.arena_hits) == (3, 3)


async def test_announcing_writer_is_told_what_is_loaded(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b")
    labels = ("a", "b", "c")
    async with client.publish(names(*labels)) as publication:
        assert publication.present == {0, 1}
        assert sorted(publication.granted) == [2]
        assert await fetch_all(client, "a", "b") == {}
        await write_and_seal(publication, labels, [2])
    assert await fetch_all(client, *labels) == {}


async def test_what_comes_after_a_gap_is_not_loaded(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "c")
    assert await fetch_all(client, "a", "b", "c") == {1: NOT_FOUND, 2: NOT_FOUND}


async def test_no_more_is_loaded_than_fits(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, *range(NUM_SLOTS))
    await publish_below(agent, client, "more")
    async with client.publish(names("x", "y")):
        missing = await fetch_all(client, *range(NUM_SLOTS), "more")
        assert missing == {NUM_SLOTS - 2: NOT_FOUND, NUM_SLOTS - 1: NOT_FOUND, NUM_SLOTS: NOT_FOUND}
    assert await fetch_all(client, "more") == {}


async def test_restarted_agent_has_what_the_directory_holds(
    spawn: SpawnAgent, connect: Connect, tmp_path: Path
) -> None:
    flags = ("--kv-disk", str(tmp_path / "kv"))
    first = spawn(*flags)
    client = await connect(first.address)
    await publish_all(client, "a", "b")
    await until(lambda: len(list(tmp_path.rglob("*.kv"))) == 2)
    first.end(signal.SIGKILL)
    second = spawn(*flags)
    again = await connect(second.address)
    await until_held(second.address, names("a", "b"))
    assert await fetch_all(again, "a", "b", "x") == {2: NOT_FOUND}
    audit = await again.audit()
    assert (audit.num_pinned, audit.num_granted, audit.num_free) == (0, 0, NUM_SLOTS - 2)


async def until_held(address: str, wanted: Sequence[BlockHash]) -> None:
    """As a router learns it: by watching."""
    held: set[BlockHash] = set()
    async with make_channel(address) as channel:
        with cancelling(
            kvtransfer_pb2_grpc.KvTransferStub(channel).WatchBlocks(worker_pb2.WatchBlocksRequest())
        ) as call:
            async with asyncio.timeout(10):
                while set(wanted) != held:
                    event = await call.read()
                    assert isinstance(event, worker_pb2.BlockEvents)
                    parts = (event.snapshot.block_hashes + event.delta.stored, event.delta.removed)
                    stored, removed = ([part[at : at + 32] for at in range(0, len(part), 32)] for part in parts)
                    held = (held | set(stored)) - set(removed)


async def test_watchers_learn_of_the_blocks_of_all_tiers(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv", kv_disk_bytes=1 << 16)
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b")
    await until_held(agent.address, names("a", "b"))
    await fetch_all(client, "a")
    await disk(agent).clear()
    await until_held(agent.address, names("a"))
    agent.store.table.clear()
    await until_held(agent.address, [])


def truncate_file(directory: Path, label: object) -> None:
    [path] = directory.rglob(f"{names(label)[0].hex()}*")
    os.truncate(path, 100)


async def test_damaged_file_is_missing_and_the_block_can_be_written_again(
    start: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b")
    truncate_file(tmp_path, "a")
    assert await fetch_all(client, "a", "b") == {0: NOT_FOUND}
    assert disk(agent).counters.damaged == 1
    await publish_all(client, "a")
    assert await fetch_all(client, "a", "b") == {}


async def test_block_that_changed_in_the_arena_is_not_written_but_dropped(
    start: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    async with client.publish(names("a")) as publication:
        publication.slot(0)[:] = bytes(BLOCK_BYTES)
        await publication.seal([(0, 12345)])
    await until(lambda: agent.store.counters.corrupt_blocks == 1)
    assert await fetch_all(client, "a") == {0: NOT_FOUND}
    assert disk(agent).num_blocks == 0


async def test_full_disk_is_not_the_agents_trouble(
    start: StartAgent, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, block: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_files, "_write", no_space)
    agent = await start(kv_disk=tmp_path / "kv", tier_retry_seconds=0.1)
    client = await connect(agent.address)
    await publish_all(client, "a", "b")
    await until(lambda: disk(agent).counters.dropped.total() == 2)
    await publish_all(client, "c")
    assert await fetch_all(client, "a", "b", "c") == {}
    await until(lambda: disk(agent).counters.dropped.total() == 3)
    monkeypatch.undo()
    await until(lambda: not disk(agent).writing.is_open)
    await publish_below(agent, client, "d")
    assert await fetch_all(client, "d") == {}


async def test_disk_that_hangs_is_not_waited_for(
    start: StartAgent, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers are told; the slots stay granted until the disk lets go of them; writers and other blocks go on."""
    go_on = threading.Event()
    agent = await start(kv_disk=tmp_path / "kv", tier_retry_seconds=60)
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b")
    read = disk_files._read
    monkeypatch.setattr(disk_files, "_read", lambda *each: (go_on.wait(20), read(*each))[1])
    monkeypatch.setattr(cascade, "READ_SECONDS", 0.2)
    assert await fetch_all(client, "a", "b", timeout_seconds=30) == {0: UNAVAILABLE, 1: UNAVAILABLE}
    assert agent.store.table.audit().num_granted == 2
    assert "takes longer" in disk(agent).reading.trouble
    await publish_all(client, "c")
    assert await fetch_all(client, "c") == {}
    go_on.set()
    await until_unused(agent)
    assert await fetch_all(client, "a", "b") == {}, "what it brought in the end is good"


async def test_reader_that_leaves_does_not_stop_a_load(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b")
    async with client.fetch(names("a", "b"), timeout_seconds=5):
        pass
    await until_unused(agent)
    assert agent.store.table.audit().num_sealed == 2


async def test_writes_are_dropped_when_the_queue_is_full(
    start: StartAgent, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = disk_files._write
    monkeypatch.setattr(disk_files, "_write", lambda *each: (go_on.wait(20), write(*each))[1])
    monkeypatch.setattr(cascade, "_MAX_QUEUED", 2)
    monkeypatch.setattr(cascade, "_BATCH_BLOCKS", 1)
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_all(client, "a")
    await until(lambda: agent.store.table.audit().num_pinned == 1)  # being written
    for label in "bcdef":
        await publish_all(client, label)
    assert disk(agent).counters.dropped == {"queue_full": 3}
    assert agent.store.table.audit().num_pinned == 1, "what waits to be written is not kept from eviction"
    for number in range(NUM_SLOTS - 1):
        await publish_all(client, number)
    go_on.set()
    await until(lambda: disk(agent).counters.dropped["evicted"] == 2)
    await until(lambda: disk(agent).counters.stored == 1)


async def test_arena_is_cut_anew_between_loads(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_below(agent, client, "a")
    other = await connect(agent.address, "other", block_bytes=BLOCK_BYTES + 1)
    async with other.fetch(names("a"), timeout_seconds=5) as fetch:
        assert [block.code for block in (await anext(fetch)).missing] == [NOT_FOUND], "a block of another size"
    assert await fetch_all(client, "a") == {}


async def test_pulling_agent_gets_what_the_source_has_below(
    start: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    source, target = await start(kv_disk=tmp_path / "source"), await start(kv_disk=tmp_path / "target")
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_below(source, prefill, "a", "b")
    async with decode.fetch(names("a", "b"), source.address, timeout_seconds=5) as fetch:
        arrived = [block.index async for batch in fetch for block in batch.arrived]
    assert sorted(arrived) == [0, 1]
    await until(lambda: disk(target).counters.stored == 2)
    await until_unused(target)
    target.store.table.clear()
    source.store.table.clear()
    await disk(source).clear()
    async with decode.fetch(names("a", "b"), source.address, timeout_seconds=5) as fetch:
        arrived = [block.index async for batch in fetch for block in batch.arrived]
    assert sorted(arrived) == [0, 1], "from its own directory"


async def test_loads_and_writers_at_the_same_time(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    """More blocks than slots, by several at once: everybody gets right bytes or is told so; nothing is left over."""
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)

    async def visit(first: int) -> None:
        for label in range(first, first + 12):
            labels = [(label + offset) % 30 for offset in range(3)]
            missing = await fetch_all(client, *labels)
            if missing:
                with suppress(Exhausted):
                    await publish_all(client, *labels)

    async with asyncio.TaskGroup() as tasks:
        for first in (0, 7, 14, 21):
            tasks.create_task(visit(first))
    await until_unused(agent)
    await until_readers(agent, 0)
    assert disk(agent).counters.hits > 0
    assert disk(agent).counters.damaged == 0


async def test_metrics_tell_tiers_apart(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv", pin_seconds=0.1)
    client = await connect(agent.address)
    await publish_below(agent, client, "a", "b")
    truncate_file(tmp_path, "b")
    assert await fetch_all(client, "a", "b") == {1: NOT_FOUND}
    async with client.fetch(names("a"), timeout_seconds=5) as fetch:
        await anext(fetch)
        await until(lambda: agent.store.counters.pins_expired == 1)
    async with client.publish(names("c"), lease_ms=50):
        await until(lambda: agent.store.counters.leases_expired == 1)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in StoreCollector(agent.store, agent.tiers.tiers).collect()
        for sample in metric.samples
    }
    expected = {
        ("relevo_kv_slots", "cached"): 1,
        ("relevo_kv_slots", "free"): NUM_SLOTS - 1,
        ("relevo_kv_tier_blocks", "arena"): 1,
        ("relevo_kv_tier_bytes", "arena"): BLOCK_BYTES,
        ("relevo_kv_tier_blocks", "disk"): 1,
        ("relevo_kv_tier_hits_total", "arena"): 1,
        ("relevo_kv_tier_hits_total", "disk"): 1,
        ("relevo_kv_tier_stored_blocks_total", "disk"): 2,
        ("relevo_kv_tier_checksum_failures_total", "disk"): 1,
        ("relevo_kv_tier_stopped", "disk"): 0,
        ("relevo_kv_expired_total", "lease"): 1,
        ("relevo_kv_expired_total", "pin"): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
