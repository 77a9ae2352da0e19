"""A fleet of fake workers on real gRPC servers, with a dispatcher over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from relevo.core.block_hash import BlockHash, hash_blocks, root_hash
from services.common.discovery import StaticDiscovery
from services.pb import messages_pb2
from services.router.connection import WorkerConnection
from services.router.dispatch import FleetDispatcher
from services.router.fleet import Fleet
from services.router.generation import EndEvent
from services.router.routed import RoutedGeneration
from tests.support.fake_sessions import Journal
from tests.support.fake_workers import FINGERPRINT, FakeDecode, FakePrefill, FakeWorker

BLOCK_SIZE = 4
EOS = 860  # what the fake model says first to the prompt 1, 2, … 40


class Harness:
    def __init__(self, fleet: Fleet, workers: Sequence[FakeWorker], journal: Journal) -> None:
        self.fleet = fleet
        self.dispatcher = FleetDispatcher(fleet, eos_token_ids=[EOS])
        self.workers = {worker.worker_id: worker for worker in workers}
        self.journal = journal

    def __getitem__(self, worker_id: str) -> FakeWorker:
        return self.workers[worker_id]

    def generate(self, num_tokens: int = 40, **fields: int) -> RoutedGeneration:
        """A split is due at 40 tokens (20 ms of prefill at the assumed rate), and not at 4."""
        return self.dispatcher.generate(make_request(num_tokens, **fields))

    def connection(self, worker_id: str) -> WorkerConnection:
        (found,) = [worker for worker in self.fleet.workers if worker.address == self[worker_id].address]
        return found

    async def until_known(self, worker_id: str, num_blocks: int) -> None:
        """Until the router's index has so many blocks of the worker."""
        await until(lambda: self.fleet.index.num_blocks(self[worker_id].address) == num_blocks)

    async def until_connected(self, worker_id: str, connected: bool = True) -> None:
        await until(lambda: self.connection(worker_id).is_connected == connected)


async def until(condition: Callable[[], bool]) -> None:
    """For what no event tells of; the test's time limit bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


@asynccontextmanager
async def running(
    *worker_ids: str,
    silence_seconds: float = 15.0,
    max_model_len: int = 4096,
    snapshot_part: int = 16384,
    agents: Mapping[str, str] | None = None,
) -> AsyncIterator[Harness]:
    """running("prefill-0", "decode-0"): connected. Afterwards it asserts that the router left no task behind.

    agents: addresses of workers' agents; nobody listens at those of the others
    """
    journal = Journal()
    workers = [make_worker(worker_id, journal, max_model_len, snapshot_part) for worker_id in worker_ids]
    for worker in workers:
        worker.info.agent_address = (agents or {}).get(worker.worker_id, worker.info.agent_address)
        await worker.start()
    addresses = {
        role: [worker.address for worker in workers if worker.worker_id.startswith(role)]
        for role in ("prefill", "decode")
    }
    fleet = Fleet(StaticDiscovery(addresses), silence_seconds=silence_seconds)
    run = asyncio.create_task(fleet.run())
    try:
        async with asyncio.timeout(10):
            await fleet.wait_connected()
            for worker in workers:
                await journal.wait(worker.worker_id, "watch")
        yield Harness(fleet, workers, journal)
    finally:
        assert _router_tasks(), "no task is recognised as the router's: the check below would see nothing"
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
        left = _router_tasks()
        for worker in workers:
            await worker.stop()
    assert not left


def _router_tasks() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if "services/router" in repr(task)]


def make_worker(worker_id: str, journal: Journal, max_model_len: int, snapshot_part: int) -> FakeWorker:
    kind = FakePrefill if worker_id.startswith("prefill") else FakeDecode
    return kind(worker_id, journal, block_size=BLOCK_SIZE, max_model_len=max_model_len, snapshot_part=snapshot_part)


def make_request(
    num_tokens: int = 40, *, first: int = 1, max_tokens: int = 6, timeout_ms: int = 0
) -> messages_pb2.GenerationRequest:
    return messages_pb2.GenerationRequest(
        request_id=f"request-{first}",
        prompt_token_ids=list(range(first, first + num_tokens)),
        sampling=messages_pb2.SamplingParams(max_tokens=max_tokens),
        timeout_ms=timeout_ms,
    )


def names_of(request: messages_pb2.GenerationRequest) -> list[BlockHash]:
    return hash_blocks(root_hash(FINGERPRINT), request.prompt_token_ids, BLOCK_SIZE)


async def collect(generation: RoutedGeneration) -> tuple[list[int], EndEvent]:
    """All tokens, and the end, which must be the last and only one."""
    tokens: list[int] = []
    end: EndEvent | None = None
    async for event in generation:
        assert end is None
        if isinstance(event, EndEvent):
            end = event
        else:
            tokens += event.token_ids
    assert end is not None
    return tokens, end
