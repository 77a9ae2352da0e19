"""500 requests while one in sixteen of the agent's operations fails and bits flip: all tokens come, nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relevo.core.sampling_params import SamplingParams
from services.kvtransfer.agent import Agent
from tests.faults.held import held
from tests.faults.stack import NUM_PAGES, SETTINGS, Clients, router
from tests.faults.test_damage import corrupt_blocks, set_faults
from tests.support.agents import is_unused, running_agent, until
from tests.support.real_workers import real_worker

NUM_REQUESTS = 500
CONCURRENCY = 16
NUM_TOKENS = 4
ONE_IN = 16
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)


def make_prompts() -> list[list[int]]:
    """40, of up to six blocks; each begins like seven others do."""
    numbers = random.Random(11)
    draw = [[numbers.randrange(3, 300) for _ in range(length)] for length in (20, 40, 55, 70, 80)]
    return [prefix + [numbers.randrange(3, 300) for _ in range(numbers.randint(1, 20))] for prefix in draw * 8]


def transformers_greedy(path: Path, prompts: list[list[int]], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """One by one, where nothing fails."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for one another all the time where others compute, too
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
        answers.append(output[0, len(prompt) :].tolist())
    torch.set_num_threads(num_threads)
    return answers


@asynccontextmanager
async def running(model: Path, arena_dir: Path) -> AsyncIterator[tuple[Agent, Clients]]:
    """At the end no request, block, slot or pin may be left at the workers and the agent."""
    async with (
        running_agent(arena_dir, NUM_PAGES, faults=True) as agent,
        real_worker(model, "prefill", agent, **SETTINGS) as prefill,
        real_worker(model, "decode", agent, **SETTINGS) as first,
        real_worker(model, "decode", agent, **SETTINGS) as second,
        router([first.address, second.address], [prefill.address]) as clients,
    ):
        yield agent, clients
        await clients.until_whole()


async def ask_all(clients: Clients, prompts: list[list[int]], numbers: range, agent: Agent) -> list[list[int]]:
    """Answers of prompts in turn, CONCURRENCY at a time. Every 25 requests nothing that is cached helps any more."""
    room = asyncio.Semaphore(CONCURRENCY)

    async def ask(number: int) -> list[int]:
        async with room:
            answer = await clients.generate(prompts[number % len(prompts)], GREEDY, salt=str(number // 25))
            if number % 5 == 0:
                await corrupt_blocks(agent, 4)
            return answer.token_ids

    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(ask(number)) for number in numbers]
    return [task.result() for task in asking]


@pytest.mark.timeout(110)
async def test_one_operation_in_sixteen_fails(model: Path, tmp_path: Path) -> None:
    prompts = make_prompts()
    expected = transformers_greedy(model, prompts)
    async with running(model, tmp_path) as (agent, clients):
        warm_up = range(NUM_REQUESTS, NUM_REQUESTS + len(prompts))
        assert await ask_all(clients, prompts, warm_up, agent) == [
            expected[number % len(prompts)] for number in warm_up
        ]
        await until(lambda: is_unused(agent))
        before = held()
        await set_faults(
            agent,
            drop_probability=0.5 / ONE_IN,
            cut_probability=0.5 / ONE_IN,
            delay_probability=1 / ONE_IN,
            delay_ms=2,
            seed=1,
        )
        answers = await ask_all(clients, prompts, range(NUM_REQUESTS), agent)
        faults = await set_faults(agent, drop_probability=0, cut_probability=0, delay_probability=0)
        wrong = [number for number, answer in enumerate(answers) if answer != expected[number % len(prompts)]]
        assert not wrong
        counters = agent.store.counters
        assert counters.fetched_blocks > NUM_REQUESTS and counters.corrupt_blocks > 3, counters
        assert faults.num_operations > NUM_REQUESTS and faults.num_dropped > 20 and faults.num_cut > 20, faults
        await clients.until_whole()
        await until(lambda: is_unused(agent))
        await until(lambda: held() == before)
    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))
