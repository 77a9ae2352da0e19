"""Real engines and agents: what is split over two workers says what one engine says."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.engine_thread import EngineThread
from services.kvtransfer.agent import Agent
from services.worker.worker import Worker
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.tiny_models import TinyModels
from tests.workers.harness import (
    TIMEOUT_SECONDS,
    attached,
    decode_registration,
    decode_stream,
    make_settings,
    prefill_registration,
    prefill_stream,
    running_agent,
    serving,
    submit_decode,
    until,
)
from tests.workers.pair import Pair


@dataclass
class Running:
    worker: Worker
    channel: grpc.aio.Channel


@asynccontextmanager
async def real_worker(path: Path, role: str, agent: Agent) -> AsyncIterator[Running]:
    """At the end its scheduler and pool must add up and hold nothing."""
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        kv_cache_memory=8 << 20,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        attention_backend="reference",
    )
    engine = Engine(config)
    worker = Worker(make_settings(), engine, EngineThread)
    make = {"prefill": prefill_registration, "decode": decode_registration}[role]
    async with (
        attached(agent, engine, role) as client,
        serving(worker, lambda worker: make(worker, client)) as channel,
    ):
        yield Running(worker, channel)
        await until(lambda: worker.num_requests == 0)
        await audited(worker)


async def audited(worker: Worker) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()

    def audit(engine: Engine) -> None:
        error: BaseException | None = None
        try:
            engine.scheduler.check()
            assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks
        except AssertionError as caught:
            error = caught
        loop.call_soon_threadsafe(done.set_result, error)

    assert isinstance(worker.thread, EngineThread)
    worker.thread.call(audit)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        if (error := await done) is not None:
            raise error


@pytest.mark.parametrize("num_agents", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
async def test_split_equals_one_engine(
    tiny_models: TinyModels, tmp_path: Path, architecture: str, num_agents: int
) -> None:
    """All prompts at once, then again: now from both caches; then unsplit."""
    path = tiny_models.path(architecture)
    expected = transformers_greedy(path)
    block_pages = 64 * 1024 // mmap.PAGESIZE
    async with (
        running_agent(tmp_path, num_blocks=200 * block_pages) as agent,
        running_agent(tmp_path, num_blocks=200 * block_pages) as other_agent,
        real_worker(path, "prefill", agent) as prefill,
        real_worker(path, "decode", agent if num_agents == 1 else other_agent) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        pair = Pair(to_prefill, to_decode, max_tokens=NUM_TOKENS)
        for round_number in range(2):
            handles = {round_number * 100 + index: prompt for index, prompt in enumerate(prompts())}
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(pair.serve(handle, prompt)) for handle, prompt in handles.items()]
            assert [answer.result() for answer in answers] == expected
        for index, prompt in enumerate(prompts()):
            await to_decode.send(submit_decode(1000 + index, prompt, NUM_TOKENS))
        for index, tokens in enumerate(expected):
            assert (await to_decode.rest(1000 + index))[0] == tokens


async def test_fault_amid_a_real_transfer_changes_no_token(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Every block in the arena is damaged before decode copies it."""
    path = tiny_models.path("llama")
    prompt, expected = prompts()[3], transformers_greedy(path)[3]
    async with (
        running_agent(tmp_path, num_blocks=2000) as agent,
        real_worker(path, "prefill", agent) as prefill,
        real_worker(path, "decode", agent) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        pair = Pair(to_prefill, to_decode, max_tokens=NUM_TOKENS)
        address = await pair.submit(1, prompt)
        first = await pair.relay_first_token(1)
        await to_prefill.rest(1)
        for slot in range(agent.store.arena.num_slots):
            agent.store.arena.slot(slot)[100] ^= 0x55
        await pair.fetch(address)
        token_ids, ended = await to_decode.rest(1)
        assert [first, *token_ids] == expected
        assert ended.num_cached_tokens == 0
