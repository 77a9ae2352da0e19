"""Workers found, lost, restarted, replaced; and what the router believes of their blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from relevo.core.errors import Unavailable
from services.common.discovery import IsAlive, Members
from services.pb import router_pb2
from services.router.dispatch import FleetDispatcher
from services.router.fleet import Fleet
from services.router.servicer import RouterServicer
from tests.router.harness import Harness, collect, make_request, names_of, running, until
from tests.support.fake_sessions import Journal
from tests.support.fake_workers import FakeDecode, FakePrefill, answer

pytestmark = pytest.mark.timeout(20)


async def test_blocks_are_followed_from_snapshot_to_deltas() -> None:
    async with running("decode-0", snapshot_part=2) as harness:
        names = names_of(make_request(40))
        harness["decode-0"].store(names[:5])
        await harness.until_known("decode-0", 5)
        harness["decode-0"].remove(names[1:3])
        await harness.until_known("decode-0", 3)
        assert cached_blocks(harness, "decode-0") == 1


async def test_gap_in_the_sequence_brings_a_new_snapshot() -> None:
    async with running("decode-0", snapshot_part=2) as harness:
        names = names_of(make_request(40))
        worker = harness["decode-0"]
        worker.store(names[:2])
        await harness.until_known("decode-0", 2)
        worker.remove(names[:1])
        worker.lose_event()
        worker.store(names[2:])
        await harness.journal.wait("decode-0", "watch", 2)
        await harness.until_known("decode-0", 9)
        assert cached_blocks(harness, "decode-0") == 0
        tokens, _ = await collect(harness.generate(40))  # the stream of requests went on all the while
        assert tokens == answer(make_request(40))
        assert not harness.journal.all("decode-0", "stream_end")


async def test_restarted_worker_is_a_new_one_and_serves() -> None:
    async with running("prefill-0", "decode-0") as harness:
        worker = harness["decode-0"]
        worker.store(names_of(make_request(40)))
        await harness.until_known("decode-0", 10)
        incarnation = worker.info.incarnation
        await worker.stop()
        await harness.until_connected("decode-0", False)
        await worker.start()
        await harness.until_connected("decode-0")
        await harness.until_known("decode-0", 0)
        info = harness.connection("decode-0").info
        assert info is not None
        assert info.incarnation != incarnation
        tokens, _ = await collect(harness.generate(40))
        assert tokens == answer(make_request(40))
        assert "prefill-0 submit" in harness.journal.names()  # nothing is cached any more


async def test_every_request_on_a_broken_stream_learns_of_it() -> None:
    async with running("decode-0") as harness:
        harness["decode-0"].behaviour.gates["tokens"] = asyncio.Event()
        reading = [asyncio.create_task(anext(harness.generate(8, first=first))) for first in range(5)]
        await harness.journal.wait("decode-0", "submit", 5)
        await harness["decode-0"].stop()
        for outcome in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(outcome, Unavailable)


async def test_silent_worker_is_taken_for_dead() -> None:
    async with running("decode-0", silence_seconds=0.3) as harness:
        harness["decode-0"].behaviour.gates["tokens"] = asyncio.Event()
        with pytest.raises(Unavailable, match="silent"):  # fakes speak once a second
            await collect(harness.generate(8))
        await harness.journal.wait("decode-0", "stream_end")


async def test_limits_are_the_smallest_of_all_workers() -> None:
    journal = Journal()
    async with running("decode-0") as harness:
        model = harness.fleet.model()
        assert model is not None
        assert (model.max_model_len, model.vocab_size, model.block_size) == (4096, 1000, 4)
    assert Fleet(ChangingDiscovery(), silence_seconds=1).model() is None
    assert not journal.entries


class ChangingDiscovery:
    """Says of decode workers what the test puts in."""

    trouble = ""

    def __init__(self) -> None:
        self.decode: asyncio.Queue[Members] = asyncio.Queue()

    async def watch(self, role: str) -> AsyncIterator[Members]:
        if role == "prefill":
            yield {}
            return
        while True:
            yield await self.decode.get()

    async def run(self, is_alive: IsAlive) -> None:
        pass


async def test_workers_come_and_go_with_discovery() -> None:
    journal, discovery = Journal(), ChangingDiscovery()
    first, second = FakeDecode("decode-0", journal), FakeDecode("decode-1", journal)
    await first.start()
    await second.start()
    fleet = Fleet(discovery)
    run = asyncio.create_task(fleet.run())
    discovery.decode.put_nowait({first.address: ""})
    await fleet.wait_connected()
    assert [worker.address for worker in fleet.workers] == [first.address]
    first.store(names_of(make_request(8)))
    await until(lambda: fleet.index.num_blocks(first.address) == 2)
    discovery.decode.put_nowait({second.address: ""})
    await journal.wait("decode-1", "watch")
    await journal.wait("decode-0", "stream_end")
    await until(lambda: fleet.index.num_blocks(first.address) == 0)
    assert [worker.address for worker in fleet.workers] == [second.address]
    run.cancel()
    with suppress(asyncio.CancelledError):
        await run
    await first.stop()
    await second.stop()


async def test_worker_that_leaves_the_list_ends_what_it_has() -> None:
    journal, discovery = Journal(), ChangingDiscovery()
    worker = FakeDecode("decode-0", journal)
    gate = worker.behaviour.gates["token-2"] = asyncio.Event()
    await worker.start()
    async with fleet_over(discovery) as fleet:
        discovery.decode.put_nowait({worker.address: ""})
        await fleet.wait_connected()
        dispatcher = FleetDispatcher(fleet)
        running = asyncio.create_task(collect(dispatcher.generate(make_request(8))))
        await journal.wait("decode-0", "submit")
        discovery.decode.put_nowait({})
        await until(lambda: fleet.passed_over() == {worker.address: "leaving"})
        with pytest.raises(Unavailable, match="is leaving"):
            await collect(dispatcher.generate(make_request(8, first=2)))
        discovery.decode.put_nowait({worker.address: ""})  # it had only lost its lease
        await until(lambda: not fleet.passed_over())
        discovery.decode.put_nowait({})
        await until(lambda: bool(fleet.passed_over()))
        gate.set()
        tokens, _ = await running
        assert tokens == answer(make_request(8))
        await journal.wait("decode-0", "stream_end")
        await until(lambda: not fleet.workers)
    await worker.stop()


async def test_process_that_has_lost_its_address_is_left() -> None:
    """Its host is off, say, and another has got its IP: no packet tells."""
    discovery = ChangingDiscovery()
    worker, other = FakeDecode("decode-0"), FakeDecode("decode-1")
    worker.behaviour.gates["tokens"] = asyncio.Event()
    await worker.start()
    await other.start()
    async with fleet_over(discovery) as fleet:
        discovery.decode.put_nowait({worker.address: worker.info.incarnation})
        await fleet.wait_connected()
        running = asyncio.create_task(collect(FleetDispatcher(fleet).generate(make_request(8))))
        await worker.journal.wait("decode-0", "submit")
        found = {worker.address: worker.info.incarnation, other.address: other.info.incarnation}
        discovery.decode.put_nowait(found)
        await other.journal.wait("decode-1", "watch")
        discovery.decode.put_nowait({**found, worker.address: "another"})
        tokens, _ = await running
        assert tokens == answer(make_request(8))
        await other.journal.wait("decode-1", "submit")
    await worker.stop()
    await other.stop()


@asynccontextmanager
async def fleet_over(discovery: ChangingDiscovery) -> AsyncIterator[Fleet]:
    fleet = Fleet(discovery)
    run = asyncio.create_task(fleet.run())
    try:
        yield fleet
    finally:
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run


async def test_worker_of_the_wrong_role_is_never_used(caplog: pytest.LogCaptureFixture) -> None:
    discovery = ChangingDiscovery()
    worker = FakePrefill("prefill-0")
    await worker.start()
    fleet = Fleet(discovery)
    run = asyncio.create_task(fleet.run())
    discovery.decode.put_nowait({worker.address: ""})
    await until(lambda: "given as a decode worker and says that it is ROLE_PREFILL" in caplog.text)
    assert not any(worker.is_connected for worker in fleet.workers)
    run.cancel()
    with suppress(asyncio.CancelledError):
        await run
    await worker.stop()


async def test_list_workers_shows_the_fleet() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["prefill-0"].store(names_of(make_request(40)))
        await harness.until_known("prefill-0", 10)
        await harness["decode-0"].stop()
        await harness.until_connected("decode-0", False)
        servicer = RouterServicer(harness.fleet)
        reply = await servicer.ListWorkers(router_pb2.ListWorkersRequest(), None)  # type: ignore[arg-type]  # unused
        states = {state.info.worker_id: state for state in reply.workers}
        assert states["prefill-0"].connected
        assert states["prefill-0"].num_known_blocks == 10
        assert states["prefill-0"].address == harness["prefill-0"].address
        assert not states["decode-0"].connected
        assert [states[name].condition for name in ("prefill-0", "decode-0")] == ["ready", "lost"]


def cached_blocks(harness: Harness, worker_id: str) -> int:
    return harness.fleet.index.num_cached_blocks(harness[worker_id].address, names_of(make_request(40)))
