"""Real engines with a fault between them, and over streams. Where nothing fails: tests/e2e/test_parity.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from relevo.engine.gpu.block_streams import BlockStreams
from relevo.engine.kv_cache import KVCache
from services.kvtransfer.agent import Agent
from tests.support import triton_interpreter
from tests.support.agents import running_agent, until
from tests.support.fake_cuda import FakeCuda
from tests.support.parity import BLOCK_SIZE, NUM_TOKENS, prompts, transformers_greedy
from tests.support.real_workers import real_worker
from tests.support.tiny_models import TinyModels
from tests.workers.harness import decode_stream, prefill_stream
from tests.workers.pair import Pair


@asynccontextmanager
async def running_pair(
    path: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Pair, Agent, FakeCuda]]:
    """way: "host"; as on a GPU, over streams that do nothing before somebody waits for it: "staged", "straight"."""
    triton_interpreter.mend()
    cuda = FakeCuda()
    arenas: dict[KVCache, memoryview] = {}
    monkeypatch.setattr(KVCache, "pin", lambda cache, view: arenas.update({cache: view}))
    async with (
        running_agent(tmp_path, num_blocks=2000) as agent,
        real_worker(path, "prefill", agent) as prefill,
        real_worker(path, "decode", agent, offer_share=0.0) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        caches = [worker.engine.kv_cache for worker in (prefill, decode)]
        await until(lambda: all(cache in arenas for cache in caches))
        for cache in caches:
            streams = BlockStreams(cache.storage, cuda, cuda.hashing)
            cache.streams = None if way == "host" else streams
            if way == "straight":
                streams.pin(arenas[cache])
        yield Pair(to_prefill, to_decode, max_tokens=NUM_TOKENS), agent, cuda


@pytest.mark.parametrize("way", ["host", "staged", "straight"])
async def test_fault_amid_a_real_transfer_changes_no_token(
    tiny_models: TinyModels, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block in the arena is damaged before decode copies it."""
    path = tiny_models.path("llama")
    prompt, expected = prompts()[3], transformers_greedy(path)[3]
    async with running_pair(path, tmp_path, way, monkeypatch) as (pair, agent, _):
        address = await pair.submit(1, prompt)
        first = await pair.relay_first_token(1)
        await pair.to_prefill.rest(1)
        for slot in range(agent.store.arena.num_slots):
            agent.store.arena.slot(slot)[100] ^= 0x55
        await pair.fetch(address)
        token_ids, ended = await pair.to_decode.rest(1)
        assert [first, *token_ids] == expected
        assert ended.num_cached_tokens == 0


@pytest.mark.parametrize("way", ["staged", "straight"])
async def test_blocks_over_streams_change_no_token(
    tiny_models: TinyModels, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.path("llama")
    prompt, expected = prompts()[3], transformers_greedy(path)[3]
    num_blocks = len(prompt) // BLOCK_SIZE
    async with running_pair(path, tmp_path, way, monkeypatch) as (pair, _, cuda):
        await pair.fetch(await pair.submit(1, prompt))
        first = await pair.relay_first_token(1)
        token_ids, ended = await pair.to_decode.rest(1)
        assert [first, *token_ids] == expected
        assert ended.num_cached_tokens == num_blocks * BLOCK_SIZE
        assert cuda.copied == 2 * num_blocks
        assert cuda.hashed == (2 * num_blocks if way == "straight" else 0)
