"""An old writer whose lease has ended wakes up and writes on, into a slot that belongs to another block by now."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash

from relevo.core.block_hash import BlockHash
from relevo.core.errors import DeadlineExceeded, Unavailable
from relevo.kernels.xxh3 import MIN_BYTES
from services.kvtransfer import mapping
from services.kvtransfer.agent import Agent
from services.kvtransfer.client import KvAgentClient, Publication, read_block, write_block
from services.kvtransfer.tiers import record
from tests.support.agents import running_agent, until

BLOCK_BYTES = 4096
FINGERPRINT = bytes(32)
OLD, NEW = (bytes([number]) * 32 for number in (1, 2))  # names
OLD_BYTES, NEW_BYTES = (np.random.default_rng(number).bytes(BLOCK_BYTES) for number in (1, 2))
NEW_CHECKSUM = xxhash.xxh3_64_intdigest(NEW_BYTES)
HALF = BLOCK_BYTES // 2
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
DATA_LOSS = grpc.StatusCode.DATA_LOSS.value[0]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def agent(stack: AsyncExitStack, tmp_path: Path) -> Agent:
    """With room for one block."""
    return await stack.enter_async_context(running_agent(tmp_path, num_blocks=1))


async def connect(stack: AsyncExitStack, agent: Agent, name: str) -> KvAgentClient:
    client = KvAgentClient(agent.address, name, "incarnation")
    stack.push_async_callback(client.close)
    await client.attach(FINGERPRINT, BLOCK_BYTES)
    return client


class LateWriter:
    """It was stopped in mid-copy for longer than its lease."""

    def __init__(self, agent: Agent, slot: memoryview, publication: Publication) -> None:
        self._slot = slot
        self._publication = publication
        self._agent = agent

    def go_on(self) -> None:
        """The rest of its copy."""
        self._slot[HALF:] = OLD_BYTES[HALF:]

    async def seal(self) -> None:
        await self._publication.seal([(0, xxhash.xxh3_64_intdigest(OLD_BYTES))])


async def make_late_writer(stack: AsyncExitStack, agent: Agent) -> LateWriter:
    """Its slot is free again when this returns."""
    client = await connect(stack, agent, "old")
    publication = await stack.enter_async_context(client.publish([OLD], lease_ms=50))
    slot = publication.slot(0)
    slot[:HALF] = OLD_BYTES[:HALF]
    await until(lambda: agent.store.table.audit().num_free == 1)
    assert agent.store.counters.leases_expired == 1
    return LateWriter(agent, slot, publication)


async def fetch(client: KvAgentClient, name: BlockHash, source: str = "") -> bytes | int:
    """The block's bytes; or the code with which it is missing, DATA_LOSS if it is refused here."""
    async with client.fetch([name], source, timeout_seconds=5) as fetching:
        async for batch in fetching:
            if batch.missing:
                return batch.missing[0].code
            [block] = batch.arrived
            into = bytearray(BLOCK_BYTES)
            good = read_block(fetching.slot(block), into, block.checksum)
            await fetching.release([0] if good else [], corrupt=[] if good else [0])
            return bytes(into) if good else DATA_LOSS
    raise AssertionError("the block was not answered")


async def publish_new(client: KvAgentClient, late: LateWriter | None = None) -> None:
    """late: goes on when the new block is written and not sealed yet."""
    async with client.publish([NEW]) as publication:
        checksum = write_block(publication.slot(0), NEW_BYTES)
        if late is not None:
            late.go_on()
        await publication.seal([(0, checksum)])


async def test_its_seal_is_refused(stack: AsyncExitStack, agent: Agent) -> None:
    late = await make_late_writer(stack, agent)
    with pytest.raises((DeadlineExceeded, Unavailable)):  # the latter if the stream ends at this very moment
        await late.seal()
    assert not agent.store.table.is_here(OLD)


async def test_its_seal_is_refused_when_its_slot_belongs_to_another(stack: AsyncExitStack, agent: Agent) -> None:
    late = await make_late_writer(stack, agent)
    new = await connect(stack, agent, "new")
    await publish_new(new)
    late.go_on()
    with pytest.raises((DeadlineExceeded, Unavailable)):
        await late.seal()
    assert await fetch(new, OLD) == NOT_FOUND


@pytest.mark.parametrize("moment", ["before the new one writes", "before the seal", "after the seal"])
async def test_readers_get_the_block_or_nothing(stack: AsyncExitStack, agent: Agent, moment: str) -> None:
    """A damaged block is dropped, and can be written anew."""
    late = await make_late_writer(stack, agent)
    new = await connect(stack, agent, "new")
    if moment == "before the new one writes":
        late.go_on()
    await publish_new(new, late if moment == "before the seal" else None)
    if moment == "after the seal":
        assert await fetch(new, NEW) == NEW_BYTES
        late.go_on()
    if moment == "before the new one writes":
        assert await fetch(new, NEW) == NEW_BYTES
    else:
        assert await fetch(new, NEW) == DATA_LOSS
        assert await fetch(new, NEW) == NOT_FOUND
        await publish_new(new)
        assert await fetch(new, NEW) == NEW_BYTES


async def test_reader_in_mid_copy_sees_it(stack: AsyncExitStack, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is checked, not the slot: what was right before the copy, or is again after it, does not count."""
    late = await make_late_writer(stack, agent)
    new = await connect(stack, agent, "new")
    await publish_new(new)
    copy = np.copyto

    def disturbed_copy(target: Any, source: Any) -> None:
        late.go_on()
        copy(target, source)
        np.frombuffer(agent.store.arena.view, np.uint8)[:BLOCK_BYTES] = np.frombuffer(NEW_BYTES, np.uint8)

    monkeypatch.setattr(mapping, "_checked_copy", None)
    monkeypatch.setattr(np, "copyto", disturbed_copy)
    assert await fetch(new, NEW) == DATA_LOSS


@pytest.mark.parametrize("moment", ["before the seal", "after the seal"])
async def test_another_agent_gets_the_block_or_nothing(
    stack: AsyncExitStack, agent: Agent, tmp_path: Path, moment: str
) -> None:
    other = await stack.enter_async_context(running_agent(tmp_path, num_blocks=4))
    far = await connect(stack, other, "far")
    late = await make_late_writer(stack, agent)
    new = await connect(stack, agent, "new")
    await publish_new(new, late if moment == "before the seal" else None)
    late.go_on()
    assert await fetch(far, NEW, agent.address) == DATA_LOSS
    assert not other.store.table.is_here(NEW)
    await until(lambda: not agent.store.table.is_here(NEW))  # dropped at both ends
    await publish_new(new)
    assert await fetch(far, NEW, agent.address) == NEW_BYTES


@pytest.mark.parametrize("moment", ["before the check", "before the file"])
async def test_no_damaged_block_is_served_from_the_disk(
    stack: AsyncExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Written behind: what is checked in the arena may change until it is in the file, and then the file tells."""
    agent = await stack.enter_async_context(running_agent(tmp_path, num_blocks=1, kv_disk=tmp_path / "disk"))
    late = await make_late_writer(stack, agent)
    new = await connect(stack, agent, "new")
    if moment == "before the file":

        def slow_check(block: memoryview, checksum: int) -> bool:
            good = record.is_intact(block, checksum)
            late.go_on()
            return good

        monkeypatch.setattr("services.kvtransfer.tiers.disk_files.is_intact", slow_check)
        await publish_new(new)
    else:
        await publish_new(new, late)
    [disk] = agent.tiers.tiers
    damaged = agent.store.counters
    await until(lambda: disk.counters.stored + damaged.corrupt_blocks == 1)
    agent.store.table.clear()
    assert await fetch(new, NEW) == NOT_FOUND
    monkeypatch.undo()
    await publish_new(new)
    await until(lambda: agent.tiers.tiers[0].counters.stored >= 1)
    assert await fetch(new, NEW) == NEW_BYTES


def test_writers_checksum_is_not_made_of_what_another_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a checksum after another: the late writer comes between them."""
    slot = memoryview(bytearray(BLOCK_BYTES))
    copy = np.copyto

    def disturbed_copy(target: Any, source: Any) -> None:
        copy(target, source)
        slot[HALF:] = OLD_BYTES[HALF:]

    monkeypatch.setattr(mapping, "_checked_copy", None)
    monkeypatch.setattr(np, "copyto", disturbed_copy)
    assert write_block(slot, NEW_BYTES) == NEW_CHECKSUM


def test_compiled_copys_checksum_is_not_made_of_what_another_stores() -> None:
    """Both write to one slot as fast as they can. Against a loop that looks at the slot again this fails each time."""
    from relevo.kernels import checked_copy

    assert checked_copy.check()
    libc = ctypes.CDLL(None)
    source = np.random.default_rng(3).integers(0, 256, MIN_BYTES, np.uint8)
    slot = np.zeros(MIN_BYTES + 64, np.uint8)
    target = slot.ctypes.data + -slot.ctypes.data % 64
    tail = ctypes.c_void_p(target + MIN_BYTES - 64)
    is_over = threading.Event()

    def write_late() -> None:
        while not is_over.is_set():
            libc.memset(tail, 0xAA, ctypes.c_size_t(64))

    late = threading.Thread(target=write_late)
    late.start()
    try:
        for _ in range(20):
            checksums = checked_copy.copy_checked([target] * 5000, [source.ctypes.data] * 5000, len(source))
            assert set(checksums) == {xxhash.xxh3_64_intdigest(source.data)}
    finally:
        is_over.set()
        late.join()
