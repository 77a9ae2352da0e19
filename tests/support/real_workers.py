"""Prefill and decode workers in this process, as their services put them together, around engines of tiny models."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import grpc.aio

from relevo.core.request import Request
from relevo.engine.engine import Engine
from relevo.engine.step_result import StepResult
from services.common.grpc import Registration, make_channel
from services.common.lifecycle import Process
from services.decode.servicer import decode_registration
from services.kvtransfer.agent import Agent
from services.kvtransfer.client import KvAgentClient
from services.pb import worker_pb2
from services.prefill.servicer import prefill_registration
from services.worker.config import WorkerSettings
from services.worker.process import serve_worker
from services.worker.worker import Worker
from tests.support.agents import TIMEOUT_SECONDS, until

_ROLES = {
    "prefill": (worker_pb2.ROLE_PREFILL, prefill_registration),
    "decode": (worker_pb2.ROLE_DECODE, decode_registration),
}


class RealWorker:
    """A serving worker, with what tests look into.

    is_held: the engine is kept from its next step, see hold_at()
    """

    def __init__(self, worker: Worker, process: _Process) -> None:
        assert isinstance(worker.engine, Engine)
        self.worker = worker
        self.engine: Engine = worker.engine
        self.address = process.address
        self.channel: grpc.aio.Channel = make_channel(process.address)
        self.num_steps = 0  # that computed something
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.most_blocks = 0  # held at once
        self.is_held = False
        self._process = process
        self._hold_at: int | None = None
        self._let_go = threading.Event()
        self._step, self._preempt = self.engine.step, self.engine.scheduler._preempt
        self.engine.step = self._counted_step  # type: ignore[method-assign]
        self.engine.scheduler._preempt = self._counted_preempt  # type: ignore[method-assign]

    def hold_at(self, num_steps: int) -> None:
        """No step is begun after so many, until let_go()."""
        self._hold_at = num_steps

    def let_go(self) -> None:
        self._hold_at = None
        self._let_go.set()

    async def stop(self) -> None:
        """As on SIGTERM. Twice is harmless."""
        await self.channel.close()
        await self._process.stack.aclose()

    def check(self) -> None:
        """After stop(): nothing died, and nothing is held."""
        assert self._process.failure is None
        self.engine.scheduler.check()
        assert self.engine.scheduler.pool.num_free_blocks == self.engine.info.num_blocks
        assert not self.engine.scheduler._requests

    def _counted_step(self) -> StepResult:
        if self.num_steps == self._hold_at:
            self.is_held = True
            assert self._let_go.wait(TIMEOUT_SECONDS)
            self.is_held = False
        result = self._step()
        self.most_blocks = max(self.most_blocks, self.engine.info.num_blocks - result.load.num_free_blocks)
        self.num_steps += result.num_scheduled_tokens > 0
        self.num_computed_tokens += result.num_scheduled_tokens
        return result

    def _counted_preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self._preempt(request)


class _Process(Process):
    """Its address goes to the test instead of a launcher."""

    address = ""

    def ready(self, *, address: str, id: str = "", http: str | None = None) -> None:
        self.address = address


@asynccontextmanager
async def real_worker(
    path: Path, role: Literal["prefill", "decode"], agent: Agent, **settings: Any
) -> AsyncIterator[RealWorker]:
    """In chunks of 32 tokens. At the end its requests must be over, its scheduler and pool add up and hold nothing."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_memory": 8 << 20,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "attention_backend": "reference",
        "drain_seconds": 0.0,
    }
    values = {"port": 0, "model": str(path), "kv_agent": agent.address, **defaults, **settings}
    made: list[Worker] = []
    role_number, make_registration = _ROLES[role]

    def registration(worker: Worker, client: KvAgentClient | None) -> Registration:
        made.append(worker)
        return make_registration(worker, client)

    async with AsyncExitStack() as stack:
        worker_settings = WorkerSettings(_cli_parse_args=[], **values)
        process = _Process(role, worker_settings, stack)
        await serve_worker(worker_settings, process, role_number, registration)
        running = RealWorker(made[0], process)
        try:
            yield running
            await until(lambda: running.worker.num_requests == 0)
        finally:
            running.let_go()
            await running.stop()
    running.check()
