"""A whole split stack for faults: real engines of a tiny model, in this process and in forked ones."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from relevo.core.sampling_params import SamplingParams
from services.common.discovery import StaticDiscovery
from services.common.grpc import make_channel
from services.common.stuck import STUCK_SECONDS
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc
from services.router.connection import SILENCE_SECONDS, WorkerConnection
from services.router.dispatch import FleetDispatcher
from services.router.fleet import Fleet
from services.router.request_stream import DECODE, PREFILL, WorkerKind
from tests.faults.disturb import CHUNK_TOKENS
from tests.faults.zygote import Forked, Zygote
from tests.support.agents import TIMEOUT_SECONDS, until
from tests.support.parity import NUM_TOKENS, prompts
from tests.support.real_router import SPLIT_WHENEVER_POSSIBLE, Router
from tests.support.tiny_models import EOS

MODEL = "llama"
PAGES_PER_BLOCK = 3  # of MODEL's
NUM_PAGES = 85 * PAGES_PER_BLOCK
PROMPT = prompts()[3]
NUM_CHUNKS = 4
assert -(-len(PROMPT) // CHUNK_TOKENS) == NUM_CHUNKS
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)
# Settings of every worker here, in this process or not.
SETTINGS = {"max_num_batched_tokens": CHUNK_TOKENS, "threads": 1}


def flags(path: Path, agent_address: str) -> list[str]:
    """Of a forked worker: those of tests.support.real_workers, and SETTINGS."""
    values = {
        "port": 0,
        "model": path,
        "kv-agent": agent_address,
        "dtype": "float32",
        "kv-cache-memory": 8 << 20,
        "max-num-seqs": 8,
        "attention-backend": "reference",
        "drain-seconds": 0,
        "log-level": "error",
        **{name.replace("_", "-"): value for name, value in SETTINGS.items()},
    }
    return [f"--{name}={value}" for name, value in values.items()]


class Clients(Router):
    """A router without its HTTP edge."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        super().__init__(FleetDispatcher(fleet, [EOS], SPLIT_WHENEVER_POSSIBLE), fleet)

    def busy(self, kind: WorkerKind) -> str:
        """Address of the only worker of this kind that has a request."""
        [address] = [worker.address for worker in self._fleet.connected(kind) if worker.num_requests]
        return address

    async def until_connected(self, kind: WorkerKind, count: int) -> None:
        await until(lambda: len(self._fleet.connected(kind)) == count)

    async def until_whole(self) -> None:
        """All workers have ended their requests, and have every block back: what they say of themselves each second."""
        workers = [worker for kind in (PREFILL, DECODE) for worker in self._fleet.connected(kind)]
        await until(lambda: all(_is_whole(worker) for worker in workers))


def _is_whole(worker: WorkerConnection) -> bool:
    report = worker.load.report
    assert worker.info is not None
    idle = not (worker.num_requests or report.num_running or report.num_waiting)
    return idle and report.num_free_blocks == worker.info.num_blocks


@asynccontextmanager
async def router(
    decodes: Sequence[str],
    prefills: Sequence[str],
    *,
    silence_seconds: float = SILENCE_SECONDS,
    stuck_seconds: float = STUCK_SECONDS,
) -> AsyncIterator[Clients]:
    """Connected to the workers at these addresses. It splits whatever can be split."""
    discovery = StaticDiscovery({"decode": list(decodes), "prefill": list(prefills)})
    fleet = Fleet(discovery, silence_seconds=silence_seconds, stuck_seconds=stuck_seconds)
    run = asyncio.create_task(fleet.run())
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await fleet.wait_connected()
        yield Clients(fleet)
    finally:
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run


async def start_agent(zygote: Zygote, arena_dir: Path, port: str = "0", num_pages: int = NUM_PAGES) -> Forked:
    """An agent as a process. port: "0" for any."""
    arena_bytes = num_pages * mmap.PAGESIZE
    flags = (f"--port={port}", f"--arena-dir={arena_dir}", f"--kv-arena={arena_bytes}", "--log-level=error")
    return await asyncio.to_thread(zygote.start, "kvtransfer", *flags)


async def audit(agent_address: str) -> kvtransfer_pb2.AuditReply:
    """Of an agent in another process."""
    async with make_channel(agent_address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        reply: kvtransfer_pb2.AuditReply = await stub.Audit(kvtransfer_pb2.AuditRequest(), timeout=TIMEOUT_SECONDS)
        return reply


async def until_unused(agent_address: str) -> None:
    """As tests.support.agents.is_unused, for an agent in another process."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            found = await audit(agent_address)
            assert found.num_free + found.num_granted + found.num_sealed == found.num_slots
            if not (found.num_granted or found.num_pinned or found.num_leases or found.num_fetches):
                return
            await asyncio.sleep(0.02)


async def until_sealed(agent_address: str, num_blocks: int) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while (await audit(agent_address)).num_sealed < num_blocks:  # noqa: ASYNC110  # there is no event for it
            await asyncio.sleep(0.01)
