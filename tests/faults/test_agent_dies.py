"""The agent is killed, in the middle of a hand-over or between two, and comes back under its address."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.stack import GREEDY, PROMPT, SETTINGS, Clients, audit, router, start_agent, until_sealed, until_unused
from tests.faults.zygote import Forked, Zygote
from tests.support.agents import until
from tests.support.parity import transformers_greedy
from tests.support.real_workers import RealWorker, real_worker


@dataclass
class Whole:
    zygote: Zygote
    arena_dir: Path
    agent: Forked
    prefill: RealWorker
    decode: RealWorker
    clients: Clients

    async def kill_agent(self) -> None:
        self.agent.send(signal.SIGKILL)
        assert await asyncio.to_thread(self.agent.wait) == -signal.SIGKILL

    async def start_agent(self) -> None:
        address = self.agent.address
        self.agent = await start_agent(self.zygote, self.arena_dir, self.agent.port)
        assert self.agent.address == address


@pytest.fixture
async def whole(zygote: Zygote, model: Path, tmp_path: Path) -> AsyncIterator[Whole]:
    """At the end nothing may be held anywhere, and no arena left."""
    agent = await start_agent(zygote, tmp_path)
    found: Any = SimpleNamespace(address=agent.address)  # all that a worker wants of it
    whole: Whole | None = None
    try:
        async with (
            real_worker(model, "prefill", found, **SETTINGS) as prefill,
            real_worker(model, "decode", found, **SETTINGS) as decode,
            router([decode.address], [prefill.address]) as clients,
        ):
            whole = Whole(zygote, tmp_path, agent, prefill, decode, clients)
            yield whole
            await clients.until_whole()
            await until_unused(agent.address)
    finally:
        await asyncio.to_thread((agent if whole is None else whole.agent).end)
    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))


async def test_killed_in_mid_hand_over(whole: Whole, model: Path) -> None:
    """Decode has half of the prompt. It computes the rest; the next request is handed over by the new agent."""
    whole.prefill.hold_at(2)
    asking = asyncio.create_task(whole.clients.generate(PROMPT, GREEDY))
    await until(lambda: whole.prefill.is_held)
    await until_sealed(whole.agent.address, 3)
    await whole.kill_agent()
    await whole.start_agent()
    whole.prefill.let_go()
    answer = await asking
    assert answer.token_ids == transformers_greedy(model)[3]
    assert answer.was_split
    await assert_handed_over(whole, model)


async def test_killed_between_two_requests(whole: Whole, model: Path) -> None:
    await assert_handed_over(whole, model)
    await whole.kill_agent()
    await whole.start_agent()
    await assert_handed_over(whole, model)


async def test_requests_are_served_while_there_is_none(whole: Whole, model: Path) -> None:
    await whole.kill_agent()
    answers = await whole.clients.generate_all([PROMPT] * 3, GREEDY, salt="without")
    assert [answer.token_ids for answer in answers] == [transformers_greedy(model)[3]] * 3
    await whole.start_agent()
    await assert_handed_over(whole, model)


async def assert_handed_over(whole: Whole, model: Path) -> None:
    """A new prompt's blocks go through the agent as soon as both workers have found it."""
    async with asyncio.timeout(10):
        for number in range(100):
            before, num_sealed = whole.decode.num_computed_tokens, (await audit(whole.agent.address)).num_sealed
            answer = await whole.clients.generate(PROMPT, GREEDY, salt=f"{num_sealed}-{number}-{whole.agent.pid}")
            assert answer.token_ids == transformers_greedy(model)[3]
            if whole.decode.num_computed_tokens - before < len(PROMPT):
                assert (await audit(whole.agent.address)).num_sealed >= num_sealed + len(PROMPT) // 16
                return
            await asyncio.sleep(0.05)
    raise AssertionError("nothing is handed over any more")
