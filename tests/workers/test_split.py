"""A prompt computed here, decoded there: fake engines, a real agent between them, and every way to fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from relevo.engine.step_result import EndedRequest
from services.kvtransfer.agent import Agent
from services.pb import decode_pb2, messages_pb2
from tests.support.agents import is_unused, running_agent, until
from tests.support.fake_engine import FakeEngine, continuation
from tests.workers.harness import (
    RunningWorker,
    decode_stream,
    prefill_stream,
    running_decode,
    running_local_decode,
    running_prefill,
    submit_decode,
    submit_prefill,
    submit_split,
)
from tests.workers.pair import Pair

BLOCK_SIZE = 4
PROMPT = list(range(1, 31))  # 7 full blocks and 2 tokens
NUM_BLOCKS = len(PROMPT) // BLOCK_SIZE
MAX_TOKENS = 6
EXPECTED = continuation(PROMPT, MAX_TOKENS)


@dataclass
class FakePair(Pair):
    """With what tests look into."""

    agent: Agent
    prefill: RunningWorker
    decode: RunningWorker


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    async with running_agent(tmp_path) as agent:
        yield agent


@pytest.fixture
async def pair(agent: Agent) -> AsyncIterator[FakePair]:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(running_prefill(agent))
        decode = await stack.enter_async_context(running_decode(agent))
        to_prefill = await stack.enter_async_context(prefill_stream(prefill))
        to_decode = await stack.enter_async_context(decode_stream(decode))
        yield FakePair(to_prefill, to_decode, agent, prefill, decode)


async def test_split_gives_the_tokens_of_one_engine_and_computes_the_prompt_once(pair: FakePair) -> None:
    assert await pair.serve(1, PROMPT) == EXPECTED
    assert pair.prefill.engine.num_computed_tokens == len(PROMPT)
    # Decode computes the tail, and every token but the last.
    assert pair.decode.engine.num_computed_tokens == len(PROMPT) - NUM_BLOCKS * BLOCK_SIZE + MAX_TOKENS - 1


async def test_many_split_requests_at_once(pair: FakePair) -> None:
    prompts = {handle: [handle + 1, *PROMPT] for handle in range(6)}
    addresses = {handle: await pair.submit(handle, prompt) for handle, prompt in prompts.items()}
    for handle, address in addresses.items():
        await pair.fetch(address, handle)
    for handle, prompt in prompts.items():
        first = await pair.relay_first_token(handle)
        token_ids, _ = await pair.to_decode.rest(handle)
        assert [first, *token_ids] == continuation(prompt, MAX_TOKENS)


async def test_next_turn_transfers_only_what_decode_lacks(pair: FakePair) -> None:
    await pair.serve(1, PROMPT)
    prompt = PROMPT + EXPECTED + [7] * 10
    assert await pair.serve(2, prompt) == continuation(prompt, MAX_TOKENS)
    # Of 30 + 6 tokens decode computed all but the last: 8 blocks were there already.
    num_sealed = pair.agent.store.table.audit().num_sealed
    assert num_sealed == NUM_BLOCKS + len(prompt) // BLOCK_SIZE - (len(PROMPT) + MAX_TOKENS - 1) // BLOCK_SIZE


async def test_prefill_takes_what_the_agent_holds_and_its_pool_lacks(pair: FakePair) -> None:
    await pair.serve(1, PROMPT)
    async with (
        running_prefill(pair.agent) as other,
        prefill_stream(other) as stream,
        running_decode(pair.agent) as decode,
        decode_stream(decode) as to_decode,
    ):
        second = Pair(stream, to_decode)
        assert await second.serve(1, PROMPT) == EXPECTED
        assert other.engine.num_computed_tokens == len(PROMPT) - NUM_BLOCKS * BLOCK_SIZE


async def test_fully_present_prompt_leaves_a_row_to_compute(pair: FakePair) -> None:
    prompt = PROMPT[:8]
    await pair.serve(1, prompt)
    async with running_prefill(pair.agent) as other, prefill_stream(other) as stream:
        await stream.send(submit_prefill(1, prompt))
        await stream.next(1, "announced")
        first = await stream.next(1, "first_token")
        assert list(first.token_ids) == continuation(prompt, 1)
        _, ended = await stream.rest(1)
        assert ended.num_cached_tokens == BLOCK_SIZE


async def test_prompt_shorter_than_a_block_publishes_nothing(pair: FakePair) -> None:
    assert await pair.serve(1, PROMPT[:3]) == continuation(PROMPT[:3], MAX_TOKENS)
    assert pair.agent.store.table.audit().num_sealed == 0


async def test_first_token_that_is_eos_ends_with_stop(agent: Agent) -> None:
    engine = FakeEngine(eos_token_ids=(EXPECTED[0],))
    async with running_prefill(agent, engine) as prefill, prefill_stream(prefill) as stream:
        await stream.send(submit_prefill(1, PROMPT))
        await stream.next(1, "announced")
        _, ended = await stream.rest(1)
        assert ended.finish_reason == messages_pb2.FINISH_REASON_STOP


async def test_full_arena_refuses_before_prefill(tmp_path: Path) -> None:
    async with (
        running_agent(tmp_path, num_blocks=NUM_BLOCKS - 1) as agent,
        running_prefill(agent) as prefill,
        prefill_stream(prefill) as stream,
    ):
        await stream.send(submit_prefill(1, PROMPT))
        token_ids, ended = await stream.rest(1)
        assert not token_ids
        assert ended.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert prefill.engine.num_computed_tokens == 0


async def test_corrupt_block_is_recomputed(pair: FakePair) -> None:
    address = await pair.submit(1, PROMPT)
    await pair.to_prefill.rest(1)
    table, arena = pair.agent.store.table, pair.agent.store.arena
    assert table.audit().num_sealed == NUM_BLOCKS
    for slot in range(arena.num_slots):
        arena.slot(slot)[5] ^= 1
    await pair.fetch(address)
    await pair.give_first_token(EXPECTED[0])
    token_ids, ended = await pair.to_decode.rest(1)
    assert token_ids == EXPECTED[1:]
    assert ended.num_cached_tokens == 0


async def test_unannounced_blocks_are_computed_here(pair: FakePair) -> None:
    await pair.to_decode.send(submit_split(1, PROMPT, MAX_TOKENS))
    await pair.to_decode.next(1, "accepted")
    await pair.fetch(pair.agent.address)
    await pair.give_first_token(EXPECTED[0])
    token_ids, _ = await pair.to_decode.rest(1)
    assert token_ids == EXPECTED[1:]


async def test_source_that_is_gone_is_computed_here(pair: FakePair) -> None:
    await pair.to_decode.send(submit_split(1, PROMPT, MAX_TOKENS))
    await pair.to_decode.next(1, "accepted")
    await pair.fetch("127.0.0.1:1")
    await pair.give_first_token(EXPECTED[0])
    token_ids, _ = await pair.to_decode.rest(1)
    assert token_ids == EXPECTED[1:]


async def test_compute_locally_before_any_word_samples_the_first_token_here(pair: FakePair) -> None:
    await pair.to_decode.send(submit_split(1, PROMPT, MAX_TOKENS))
    await pair.compute_locally()
    await pair.to_decode.next(1, "accepted")
    token_ids, _ = await pair.to_decode.rest(1)
    assert token_ids == EXPECTED


@pytest.mark.parametrize("has_first_token", [False, True])
async def test_compute_locally_keeps_what_has_arrived(pair: FakePair, has_first_token: bool) -> None:
    """Blocks, and the first token: the client has it, so it must not come again."""
    pair.prefill.thread.pause()
    await pair.fetch(await pair.submit(1, PROMPT))
    pair.prefill.thread.step_once()  # 16 tokens: 4 blocks
    await until(lambda: pair.agent.store.table.audit().num_sealed == 4)
    await until(lambda: pair.decode.engine.kv_cache.storage.any(axis=1).sum() == 4)
    if has_first_token:
        await pair.give_first_token(EXPECTED[0])
    await pair.compute_locally()
    token_ids, ended = await pair.to_decode.rest(1)
    assert token_ids == EXPECTED[has_first_token:]
    assert 0 < ended.num_cached_tokens <= 16
    await pair.cancel_prefill()
    pair.prefill.thread.go()
    _, ended = await pair.to_prefill.rest(1)
    assert ended.finish_reason == messages_pb2.FINISH_REASON_CANCELLED


async def test_prefill_that_gives_up_leaves_the_rest_to_decode(pair: FakePair) -> None:
    pair.prefill.thread.pause()
    await pair.fetch(await pair.submit(1, PROMPT))
    pair.prefill.thread.step_once()
    await until(lambda: pair.agent.store.table.audit().num_sealed == 4)
    await pair.cancel_prefill()
    request = next(iter(pair.prefill.worker._listeners.values()))
    await until(lambda: request._is_cancelled)  # type: ignore[attr-defined]  # looked into
    pair.prefill.thread.go()
    await pair.to_prefill.rest(1)
    await pair.give_first_token(EXPECTED[0])
    token_ids, ended = await pair.to_decode.rest(1)
    assert token_ids == EXPECTED[1:]
    assert ended.num_cached_tokens == 16


async def test_blocks_that_stay_away_after_the_first_token_are_computed_here(agent: Agent) -> None:
    """The writer lives and hangs. Before the first token there is no such limit: prefill's queue may be long."""
    async with (
        running_prefill(agent) as prefill,
        running_decode(agent, transfer_timeout_seconds=0.1) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        pair = FakePair(to_prefill, to_decode, agent, prefill, decode)
        prefill.thread.pause()
        await pair.fetch(await pair.submit(1, PROMPT))
        prefill.thread.step_once()
        await until(lambda: decode.engine.kv_cache.storage.any(axis=1).sum() == 4)
        await pair.give_first_token(EXPECTED[0])
        token_ids, ended = await to_decode.rest(1)
        assert token_ids == EXPECTED[1:]
        assert ended.num_cached_tokens == 16
        prefill.thread.go()
        await to_prefill.rest(1)


@pytest.mark.parametrize("has_fetched", [False, True])
async def test_first_token_that_never_comes_ends_with_deadline(agent: Agent, has_fetched: bool) -> None:
    async with (
        running_decode(agent, handover_timeout_seconds=0.1) as decode,
        decode_stream(decode) as stream,
    ):
        await stream.send(submit_split(1, PROMPT))
        await stream.next(1, "accepted")
        if has_fetched:
            fetch_kv = decode_pb2.FetchKv(source_agent_address=agent.address)
            await stream.send(decode_pb2.DecodeCommand(handle=1, fetch_kv=fetch_kv))
        _, ended = await stream.rest(1)
        assert ended.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_deadline_reaches_both_sides(pair: FakePair) -> None:
    pair.prefill.thread.pause()
    await pair.fetch(await pair.submit(1, PROMPT, timeout_ms=200))
    _, ended = await pair.to_decode.rest(1)
    assert ended.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    await until(lambda: len(pair.prefill.thread._commands) == 2)  # submit, abort
    pair.prefill.thread.go()
    _, ended = await pair.to_prefill.rest(1)
    assert ended.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_cancelled_prefill_lets_the_copy_end_first(pair: FakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, go_on = threading.Event(), threading.Event()
    aborts: list[str] = []
    cache = pair.prefill.engine.kv_cache
    real_leaving = cache.leaving

    def slow_leaving(block_ids: Any) -> Any:
        copying.set()
        assert go_on.wait(10)
        assert not aborts, "the engine was told before the copy had ended"
        return real_leaving(block_ids)

    def abort(request_id: str) -> None:
        aborts.append(request_id)
        real_abort(request_id)

    real_abort = pair.prefill.thread.abort
    monkeypatch.setattr(cache, "leaving", slow_leaving)
    monkeypatch.setattr(pair.prefill.thread, "abort", abort)
    pair.prefill.thread.pause()
    await pair.submit(1, PROMPT)
    pair.prefill.thread.step_once()
    await until(copying.is_set)
    await pair.cancel_prefill()
    request = next(iter(pair.prefill.worker._listeners.values()))
    await until(lambda: request._is_cancelled)  # type: ignore[attr-defined]  # looked into
    assert not aborts
    go_on.set()
    await until(lambda: bool(aborts))
    pair.prefill.thread.go()
    _, ended = await pair.to_prefill.rest(1)
    assert ended.finish_reason == messages_pb2.FINISH_REASON_CANCELLED
    await pair.cancel_decode()
    await pair.to_decode.rest(1)


@pytest.mark.parametrize("stage", ["accepted", "fetching", "arrived", "decoding"])
async def test_cancelled_decode_ends_once_at_any_stage(pair: FakePair, stage: str) -> None:
    if stage == "fetching":
        pair.prefill.thread.pause()
    address = await pair.submit(1, PROMPT)
    if stage != "accepted":
        await pair.fetch(address)
    if stage == "arrived":
        await until(lambda: pair.agent.store.table.audit().num_sealed == NUM_BLOCKS)
        await until(lambda: pair.agent.store.table.audit().num_readers == 0)
    if stage == "decoding":
        await pair.relay_first_token()
    await pair.cancel_decode()
    await pair.cancel_decode()
    token_ids, ended = await pair.to_decode.rest(1)
    if ended.finish_reason == messages_pb2.FINISH_REASON_LENGTH:
        assert stage == "decoding" and token_ids == EXPECTED[1:]
    else:
        assert ended.finish_reason == messages_pb2.FINISH_REASON_CANCELLED
    await pair.cancel_prefill()
    pair.prefill.thread.go()
    await pair.to_prefill.rest(1)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
async def test_routers_that_leave_free_everything(agent: Agent, num_steps: int) -> None:
    async with running_prefill(agent) as prefill, running_decode(agent) as decode:
        prefill.thread.pause()
        async with prefill_stream(prefill) as to_prefill, decode_stream(decode) as to_decode:
            pair = Pair(to_prefill, to_decode)
            await pair.fetch(await pair.submit(1, PROMPT))
            for _ in range(num_steps):
                prefill.thread.step_once()
        prefill.thread.go()
        await until(lambda: not (prefill.worker.num_requests or decode.worker.num_requests))
        await until(lambda: is_unused(agent))


async def test_last_step_between_a_failed_hand_over_and_its_callback_ends_once(
    pair: FakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's word that it has ended comes when the task is done, and before the loop has called back for that."""
    pair.prefill.thread.pause()
    await pair.submit(1, PROMPT)
    request: Any = next(iter(pair.prefill.worker._listeners.values()))
    ends: list[EndedRequest] = []
    take_event = request.on_event
    monkeypatch.setattr(
        request, "on_event", lambda event: ends.append(event) if isinstance(event, EndedRequest) else take_event(event)
    )
    request._task.remove_done_callback(request._task_done)
    pair.prefill.thread.go()
    await until(lambda: bool(ends))
    request._task.cancel()
    await asyncio.wait([request._task])
    take_event(ends[0])
    assert not request._reply.has_ended
    request._task_done(request._task)
    await pair.to_prefill.rest(1)
    await pair.cancel_decode()
    await pair.to_decode.rest(1)


async def test_prefill_cancelled_while_it_announces_computes_nothing(pair: FakePair) -> None:
    await pair.to_prefill.send(submit_prefill(1, PROMPT))
    await pair.cancel_prefill()
    await pair.to_prefill.rest(1)


async def test_agent_that_is_gone_fails_prefill_and_not_decode(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(running_agent(tmp_path))
        async with running_prefill(agent) as prefill, running_decode(agent) as decode:
            await stack.aclose()
            async with prefill_stream(prefill) as to_prefill, decode_stream(decode) as to_decode:
                await to_prefill.send(submit_prefill(1, PROMPT))
                _, ended = await to_prefill.rest(1)
                assert ended.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
                await to_decode.send(submit_split(1, PROMPT, MAX_TOKENS))
                await to_decode.next(1, "accepted")
                fetch_kv = decode_pb2.FetchKv(source_agent_address=agent.address)
                await to_decode.send(decode_pb2.DecodeCommand(handle=1, fetch_kv=fetch_kv))
                await to_decode.send(decode_pb2.DecodeCommand(handle=1, compute_locally=decode_pb2.ComputeLocally()))
                token_ids, _ = await to_decode.rest(1)
                assert token_ids == EXPECTED


async def test_other_requests_step_while_one_waits_for_its_blocks(pair: FakePair) -> None:
    await pair.to_decode.send(submit_split(1, PROMPT))
    await pair.to_decode.next(1, "accepted")
    await pair.to_decode.send(submit_decode(2, [9, 9, 9], MAX_TOKENS))
    token_ids, _ = await pair.to_decode.rest(2)
    assert token_ids == continuation([9, 9, 9], MAX_TOKENS)
    await pair.cancel_decode()
    await pair.to_decode.rest(1)


async def test_ticket_without_agent_is_refused() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        await stream.send(submit_split(1, PROMPT))
        _, ended = await stream.rest(1)
        assert ended.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
