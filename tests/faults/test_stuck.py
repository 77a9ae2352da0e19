"""An engine that hangs in the middle of a step, while its process answers everything else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.router.request_stream import DECODE, PREFILL
from tests.faults.stack import GREEDY, NUM_PAGES, PROMPT, SETTINGS, Clients, router
from tests.support.agents import running_agent, until
from tests.support.parity import transformers_greedy
from tests.support.real_workers import RealWorker, real_worker

pytestmark = pytest.mark.timeout(60)

STUCK_SECONDS = 0.5


async def is_healthy(worker: RealWorker) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(worker.channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def until_passed_over(clients: Clients, worker: RealWorker) -> None:
    await until(lambda: clients.fleet.passed_over() == {worker.address: "stuck"})


async def test_requests_of_a_stuck_decode_worker_go_on_elsewhere(model: Path, tmp_path: Path) -> None:
    async with (
        running_agent(tmp_path, NUM_PAGES) as agent,
        real_worker(model, "decode", agent, **SETTINGS) as first,
        real_worker(model, "decode", agent, **SETTINGS) as second,
        router([first.address, second.address], [], stuck_seconds=STUCK_SECONDS) as clients,
    ):
        for worker in (first, second):
            worker.hold_at(6)
        asking = asyncio.create_task(clients.generate(PROMPT, GREEDY))
        await until(lambda: first.is_held or second.is_held)
        stuck, other = (first, second) if first.is_held else (second, first)
        other.let_go()
        answer = await asking
        assert answer.token_ids == transformers_greedy(model)[3]
        assert answer.num_tries == 2
        await clients.until_connected(DECODE, 2)
        await until_passed_over(clients, stuck)
        assert await is_healthy(stuck)
        assert (await clients.generate(PROMPT, GREEDY, salt="next")).token_ids == answer.token_ids
        stuck.let_go()
        await until(lambda: not clients.fleet.passed_over())
        await clients.until_whole()


async def test_stuck_prefill_worker_is_done_without(model: Path, tmp_path: Path) -> None:
    async with (
        running_agent(tmp_path, NUM_PAGES) as agent,
        real_worker(model, "prefill", agent, **SETTINGS) as prefill,
        real_worker(model, "decode", agent, **SETTINGS) as decode,
        router([decode.address], [prefill.address], stuck_seconds=STUCK_SECONDS) as clients,
    ):
        prefill.hold_at(2)
        answer = await clients.generate(PROMPT, GREEDY)
        assert answer.token_ids == transformers_greedy(model)[3]
        await clients.until_connected(PREFILL, 1)
        await until_passed_over(clients, prefill)
        assert not (await clients.generate(PROMPT, GREEDY, salt="next")).was_split
        prefill.let_go()
        await until(lambda: not clients.fleet.passed_over())
        assert (await clients.generate(PROMPT, GREEDY, salt="last")).was_split
        await clients.until_whole()


async def test_step_that_is_long_and_goes_on_is_not_stuck(model: Path, tmp_path: Path) -> None:
    """The worker says how long a step may take with it."""
    async with (
        running_agent(tmp_path, NUM_PAGES) as agent,
        real_worker(model, "decode", agent, **SETTINGS) as decode,
    ):
        assert decode.worker.thread.step_ages()[0] == 0.0
        decode.hold_at(1)
        async with router([decode.address], []) as clients:
            asking = asyncio.create_task(clients.generate(PROMPT, GREEDY))
            await until(lambda: decode.is_held)
            await until(lambda: decode.worker.thread.step_ages()[0] > 0.3)
            decode.let_go()
            assert (await asking).num_tries == 1
            await until(lambda: decode.worker.thread.step_ages()[0] == 0.0)
            assert decode.worker.thread.step_ages()[1] > 0.1
