"""A decode worker is killed while it waits for KV: the request goes on at another one."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relevo.core.sampling_params import SamplingParams
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from services.kvtransfer import mapping
from services.kvtransfer.agent import Agent
from services.router.request_stream import DECODE
from tests.faults.stack import GREEDY, NUM_PAGES, PROMPT, SETTINGS, Clients, flags, router
from tests.faults.zygote import Forked, Zygote
from tests.support.agents import is_unused, running_agent, until
from tests.support.parity import transformers_greedy
from tests.support.real_workers import RealWorker, real_worker


@dataclass
class Whole:
    """Two decode workers, which can be killed."""

    agent: Agent
    prefill: RealWorker
    decodes: dict[str, Forked]  # by address
    clients: Clients

    async def kill_busy_decode(self) -> None:
        forked = self.decodes[self.clients.busy(DECODE)]
        forked.send(signal.SIGKILL)
        assert await asyncio.to_thread(forked.wait) == -signal.SIGKILL


@asynccontextmanager
async def running(zygote: Zygote, model: Path, arena_dir: Path, *decode_flags: str) -> AsyncIterator[Whole]:
    """At the end nothing may be held anywhere."""
    decodes: list[Forked] = []
    try:
        async with (
            running_agent(arena_dir, num_blocks=NUM_PAGES) as agent,
            real_worker(model, "prefill", agent, **SETTINGS) as prefill,
        ):
            while len(decodes) < 2:
                own_flags = [*flags(model, agent.address), *decode_flags]
                decodes.append(await asyncio.to_thread(zygote.start, "decode", *own_flags))
            async with router([forked.address for forked in decodes], [prefill.address]) as clients:
                yield Whole(agent, prefill, {forked.address: forked for forked in decodes}, clients)
                await clients.until_connected(DECODE, 1)
                await clients.until_whole()
                await until(lambda: is_unused(agent))
    finally:
        for forked in decodes:
            await asyncio.to_thread(forked.end)


@pytest.fixture
async def whole(zygote: Zygote, model: Path, tmp_path: Path) -> AsyncIterator[Whole]:
    async with running(zygote, model, tmp_path) as whole:
        yield whole


async def test_killed_before_the_first_token(whole: Whole, model: Path) -> None:
    """Half of the prompt is handed over."""
    whole.prefill.hold_at(2)
    asking = asyncio.create_task(whole.clients.generate(PROMPT, GREEDY))
    await until(lambda: whole.prefill.is_held and whole.agent.store.table.audit().num_sealed == 3)
    await until(lambda: whole.agent.store.table.audit().num_readers == 1)
    await whole.kill_busy_decode()
    await until(lambda: whole.agent.store.table.audit().num_readers == 0)
    whole.prefill.let_go()
    answer = await asking
    assert answer.token_ids == transformers_greedy(model)[3]
    assert answer.was_split


async def test_killed_after_the_first_token(whole: Whole, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has it; the last block is not sealed yet."""
    with last_copy_held(monkeypatch) as let_go:
        asking = asyncio.create_task(whole.clients.generate(PROMPT, GREEDY))
        await until(lambda: whole.clients.num_tokens == 1)
        await whole.kill_busy_decode()
        let_go.set()
        answer = await asking
    assert answer.token_ids == transformers_greedy(model)[3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", ["ngram", "suffix"])
async def test_speculation_goes_on_elsewhere(
    zygote: Zygote, model: Path, tmp_path: Path, drafts: str, temperature: float
) -> None:
    """In the middle of an answer with drafts: the text is that of workers that have none, and are left alone."""
    sampling = SamplingParams(max_tokens=96, temperature=temperature, seed=5, ignore_eos=True)
    expected = await asyncio.to_thread(plain, model, sampling)
    async with running(zygote, model, tmp_path, f"--speculative={drafts}", "--no-adaptive-speculation") as whole:
        asking = asyncio.create_task(whole.clients.generate(PROMPT, sampling))
        await until(lambda: whole.clients.num_tokens >= 8)
        await whole.kill_busy_decode()
        answer = await asking
    assert answer.token_ids == expected


def plain(model: Path, sampling: SamplingParams) -> list[int]:
    """What one engine says, without drafts."""
    engine = Engine(
        EngineConfig(
            model=str(model), dtype="float32", kv_cache_memory=8 << 20, attention_backend="reference", threads=1
        )
    )
    engine.submit(engine.make_request("plain", PROMPT, sampling))
    token_ids: list[int] = []
    while engine.has_unfinished_requests:
        for tokens in engine.step().tokens:
            token_ids += tokens.token_ids
    return token_ids


@contextmanager
def last_copy_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The prompt's last full block is not copied by prefill until the event is set."""
    let_go = threading.Event()
    copy = mapping._copy
    num_copied = 0

    def held_copy(targets: list[Any], sources: list[Any], private: list[Any]) -> list[int]:
        nonlocal num_copied
        num_copied += len(targets)
        if num_copied == len(PROMPT) // 16:
            assert let_go.wait(20)
        return copy(targets, sources, private)

    monkeypatch.setattr(mapping, "_copy", held_copy)
    try:
        yield let_go
    finally:
        let_go.set()
