"""What an agent tells of blocks' places in their writers' memory, and to whom."""

from __future__ import annotations

import pytest

from relevo.core.errors import InvalidRequest
from services.kvtransfer.client import DirectPlace, KvAgentClient, write_block
from services.kvtransfer.direct_places import PLACE_SECONDS, DirectPlaces
from services.pb.kvtransfer_pb2 import DirectMemory

from .blocks import block_data, names, write_and_seal
from .conftest import Connect, StartAgent

MEMORY = DirectMemory(metadata=b"m", base=4096, kind="VRAM", device=3, worker="w")


async def places(client: KvAgentClient, *labels: object, source: str = "", direct: bool = True) -> list[object]:
    found: dict[int, DirectPlace | None] = {}
    async with client.fetch(names(*labels), source, timeout_seconds=5, direct=direct) as fetch:
        async for batch in fetch:
            found |= {block.index: block.place for block in batch.arrived}
            await fetch.release([block.index for block in batch.arrived])
    return [found[index] for index in range(len(labels))]


async def test_a_reader_that_asks_is_told_where_the_writer_has_a_block(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    prefill, decode = await connect(agent.address), await connect(agent.address)
    prefill.direct_memory = MEMORY
    async with prefill.publish(names("a", "b")) as publication:
        await write_and_seal(publication, ("a", "b"), [0])
        await publication.seal([(1, 7)], {1: 42})
    async with decode.publish(names("c")) as publication:
        await publication.seal([(0, 7)], {0: 43})  # no memory was announced
    assert await places(decode, "a", "b", "c") == [None, DirectPlace(MEMORY, 42), None]
    assert await places(decode, "b", direct=False) == [None]


async def test_offers_and_blocks_from_other_hosts_have_no_place(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["tcp"]), await start(transports=["tcp"])
    prefill, decode = await connect(source.address), await connect(target.address)
    prefill.direct_memory = MEMORY
    async with prefill.publish(names("a"), is_offer=True) as publication:
        await publication.seal([(0, 7)], {0: 1})
    async with prefill.publish(names("b")) as publication:
        await publication.seal([(0, write_block(publication.slot(0), block_data("b")))], {0: 1})
    assert await places(prefill, "a") == [None]
    assert await places(decode, "b", source=source.address) == [None]


async def test_metadata_beyond_all_measure_are_refused(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    prefill = await connect(agent.address)
    prefill.direct_memory = DirectMemory(metadata=bytes(20_000))
    with pytest.raises(InvalidRequest, match="16384"):
        async with prefill.publish(names("a")):
            pass


def test_places_are_forgotten_after_a_while_and_with_another_writer() -> None:
    now = 0.0
    known = DirectPlaces(lambda: now)
    a, b, c = names("a", "b", "c")
    known.put(a, DirectPlace(MEMORY, 1))
    now = PLACE_SECONDS - 1
    for name in (b, c):
        known.put(name, DirectPlace(MEMORY, 2))
    known.put(c, None)
    assert [known.find(name) for name in (a, b, c)] == [DirectPlace(MEMORY, 1), DirectPlace(MEMORY, 2), None]
    now = PLACE_SECONDS
    assert [known.find(name) for name in (a, b)] == [None, DirectPlace(MEMORY, 2)]
    now = 2 * PLACE_SECONDS
    assert known.find(b) is None
    assert not known._places
