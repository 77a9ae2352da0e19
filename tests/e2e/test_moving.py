"""Requests and conversations that move between workers: real engines, agents on two hosts, greedy and sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relevo.core.sampling_params import SamplingParams
from services.kvtransfer.agent import Agent
from services.worker.worker import Worker
from tests.e2e.test_parity import ALL, make_sampling, tokens
from tests.support.agents import is_unused, running_agent, until
from tests.support.parity import BLOCK_SIZE, prompts
from tests.support.real_router import Answer, real_router, router_over
from tests.support.real_workers import RealWorker, real_worker
from tests.support.tiny_models import TinyModels

FOLLOW_UP = [33, 44, 55, 66, 77]


@asynccontextmanager
async def two_hosts(tmp_path: Path) -> AsyncIterator[tuple[Agent, Agent]]:
    async with running_agent(tmp_path, num_blocks=2000) as near, running_agent(tmp_path, num_blocks=2000) as far:
        yield near, far


async def until_offered(worker: RealWorker, agent: Agent) -> None:
    """All that the worker has computed is at its agent."""
    await until(lambda: is_idle(worker.worker) and is_unused(agent))


def is_idle(worker: Worker) -> bool:
    return worker.on_stored is not None and worker.on_stored.__self__.is_idle  # type: ignore[attr-defined]


def num_blocks(num_tokens: int) -> int:
    return num_tokens // BLOCK_SIZE


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
async def test_next_turn_finds_the_answers_kv_on_any_worker(
    tiny_models: TinyModels, tmp_path: Path, architecture: str
) -> None:
    """First turn on one host's decode worker; the next one split, and direct, on another host's, which has nothing."""
    path = tiny_models.path(architecture)
    prompt, sampling = prompts()[3], make_sampling(temperature=0.0, ignore_eos=True, max_tokens=24)
    async with two_hosts(tmp_path) as (near, far), AsyncExitStack() as stack:
        first = await stack.enter_async_context(real_worker(path, "decode", near, offer_share=0.5))
        async with real_router(first) as router:
            answer = await router.generate(prompt, sampling)
        await until_offered(first, near)
        turn = [*prompt, *answer.token_ids, *FOLLOW_UP]
        num_known = num_blocks(len(prompt) + len(answer.token_ids) - 1) * BLOCK_SIZE
        async with real_router(first) as router:
            expected = (await router.generate(turn, sampling, salt="undisturbed")).token_ids

        prefill = await stack.enter_async_context(real_worker(path, "prefill", far))
        second, third = [await stack.enter_async_context(real_worker(path, "decode", far)) for _ in range(2)]
        async with router_over([first, second], [prefill], split=True) as router:
            await router.until_agents_known(near, num_known // BLOCK_SIZE)
            # The worker that has it all is left out: it is the others that are to find it.
            await first.stop()
            split = await router.generate(turn, sampling)
        assert split.token_ids == expected and split.was_split
        assert prefill.num_computed_tokens == len(turn) - num_known
        assert second.num_computed_tokens == len(turn) % BLOCK_SIZE + len(expected) - 1

        async with router_over([third], [], split=False) as router:
            await router.until_agents_known(far, num_known // BLOCK_SIZE)
            direct = await router.generate(turn, sampling)
        assert direct.token_ids == expected and not direct.was_split
        assert third.num_computed_tokens <= len(turn) - num_known + len(expected) - 1


async def undisturbed(path: Path, agent: Agent, sampling: SamplingParams) -> list[Answer]:
    async with real_worker(path, "decode", agent) as decode, real_router(decode) as router:
        return await router.generate_all(prompts(), sampling, salt="undisturbed")


@pytest.mark.parametrize("is_split", [False, True], ids=["direct", "split"])
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"temperature": 0.0, "ignore_eos": True, "logprobs": 2}, id="greedy"),
        pytest.param(ALL, id="sampled"),
        pytest.param({"stop_token_ids": tuple(range(3, 320, 9)), "min_tokens": 6}, id="stops"),
    ],
)
async def test_decode_worker_that_dies_in_mid_answer_changes_no_token(
    tiny_models: TinyModels, tmp_path: Path, sampling: dict[str, Any], is_split: bool
) -> None:
    """All of its requests go on at the other one: some were waiting for their KV, some had tokens."""
    path = tiny_models.path("llama")
    params = make_sampling(**{"max_tokens": 20, **sampling})
    async with two_hosts(tmp_path) as (near, far), AsyncExitStack() as stack:
        expected = await undisturbed(path, near, params)
        prefills = [await stack.enter_async_context(real_worker(path, "prefill", near))] if is_split else []
        dying = await stack.enter_async_context(real_worker(path, "decode", near, offer_share=0.5))
        other = await stack.enter_async_context(real_worker(path, "decode", far))
        async with router_over([dying, other], prefills, split=is_split) as router:
            dying.hold_at(4)
            generating = asyncio.create_task(router.generate_all(prompts(), params))
            await until(lambda: dying.is_held)
            stopping = asyncio.create_task(dying.stop())
            await until(lambda: dying.worker.num_requests == 0 or dying.is_held)
            dying.let_go()
            await stopping
            answers = await generating
        assert tokens(answers) == tokens(expected)
        assert [answer.finish_reason for answer in answers] == [answer.finish_reason for answer in expected]
        assert ids_of_logprobs(answers) == ids_of_logprobs(expected)
        assert other.num_computed_tokens > 0


def ids_of_logprobs(answers: Sequence[Answer]) -> list[list[int]]:
    return [[entry.chosen.token_id for entry in answer.logprobs] for answer in answers]


async def test_moved_request_finds_what_the_dead_worker_had_offered(tiny_models: TinyModels, tmp_path: Path) -> None:
    """It computes less there than its tokens: the rest comes from the dead worker's agent, another host's."""
    path = tiny_models.path("llama")
    prompt, params = prompts()[3], make_sampling(temperature=0.0, ignore_eos=True, max_tokens=40)
    async with two_hosts(tmp_path) as (near, far), AsyncExitStack() as stack:
        dying = await stack.enter_async_context(real_worker(path, "decode", near, offer_share=0.5))
        other = await stack.enter_async_context(real_worker(path, "decode", far))
        async with real_router(other) as router:
            expected = (await router.generate(prompt, params, salt="undisturbed")).token_ids
        num_before = other.num_computed_tokens
        async with real_router(dying) as only_dying, router_over([dying, other], [], split=False) as router:
            await only_dying.generate(prompt, make_sampling(temperature=0.0, max_tokens=2))
            await until_offered(dying, near)
            await router.until_agents_known(near, num_blocks(len(prompt)))
            await router.until_idle()  # then its own pool makes it the cheaper one
            dying.hold_at(dying.num_steps + 20)
            generating = asyncio.create_task(router.generate(prompt, params))
            await until(lambda: dying.is_held)
            stopping = asyncio.create_task(dying.stop())
            dying.let_go()
            await stopping
            assert (await generating).token_ids == expected
        num_known = num_blocks(len(prompt)) * BLOCK_SIZE
        assert other.num_computed_tokens - num_before <= len(prompt) + len(expected) - 1 - num_known
