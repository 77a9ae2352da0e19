"""Real engines with a fault between them, and over streams. Where nothing fails: tests/e2e/test_parity.py."""

from __future__ import annotations

from pathlib import Path

from relevo.engine.block_streams import BlockStreams
from tests.support.agents import running_agent
from tests.support.fake_cuda import FakeCuda
from tests.support.parity import BLOCK_SIZE, NUM_TOKENS, prompts, transformers_greedy
from tests.support.real_workers import real_worker
from tests.support.tiny_models import TinyModels
from tests.workers.harness import decode_stream, prefill_stream
from tests.workers.pair import Pair


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


async def test_blocks_over_streams_change_no_token(tiny_models: TinyModels, tmp_path: Path) -> None:
    """As on a GPU, with streams that do nothing before somebody waits for it."""
    path = tiny_models.path("llama")
    prompt, expected = prompts()[3], transformers_greedy(path)[3]
    cuda = FakeCuda()
    async with (
        running_agent(tmp_path, num_blocks=2000) as agent,
        real_worker(path, "prefill", agent) as prefill,
        real_worker(path, "decode", agent, offer_share=0.0) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        for worker in (prefill, decode):
            worker.engine.kv_cache.streams = BlockStreams(worker.engine.kv_cache.storage, cuda)
        pair = Pair(to_prefill, to_decode, max_tokens=NUM_TOKENS)
        await pair.fetch(await pair.submit(1, prompt))
        first = await pair.relay_first_token(1)
        token_ids, ended = await to_decode.rest(1)
        assert [first, *token_ids] == expected
        num_blocks = len(prompt) // BLOCK_SIZE
        assert ended.num_cached_tokens == num_blocks * BLOCK_SIZE
        assert cuda.copied == 2 * num_blocks
