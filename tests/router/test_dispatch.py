"""Requests on their way over real gRPC servers with fake workers behind them."""

from __future__ import annotations

import asyncio

import pytest

from relevo.core.errors import DeadlineExceeded, Exhausted, InvalidRequest, RelevoError, Unavailable
from relevo.core.request import FinishReason
from services.pb import messages_pb2
from services.router.generation import TokensEvent
from tests.router.harness import EOS, collect, make_request, names_of, running, until
from tests.support.fake_workers import answer, full

pytestmark = pytest.mark.timeout(20)


async def test_short_prompt_is_served_by_decode_alone() -> None:
    async with running("prefill-0", "decode-0") as harness:
        tokens, end = await collect(harness.generate(4))
        assert tokens == answer(make_request(4))
        assert end.finish_reason is FinishReason.LENGTH
        assert harness.journal.names() == ["decode-0 submit"]


async def test_split_request_takes_the_steps_in_order() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["decode-0"].behaviour.num_cached_blocks = 3
        harness["prefill-0"].behaviour.num_cached_blocks = 2
        tokens, end = await collect(harness.generate(40))
        assert tokens == answer(make_request(40))
        assert end.num_cached_tokens == 12  # decode's 3 blocks are more than prefill's 2
        assert harness.journal.names() == [
            "decode-0 submit",
            "prefill-0 submit",
            "decode-0 fetch_kv",
            "decode-0 first_token",
        ]
        submit, prefill, fetch, first = (entry.command for entry in harness.journal.entries if entry.command)
        assert submit.submit.ticket.prefill_worker_id == "prefill-0"
        assert prefill.submit.ticket.num_blocks_at_decode == 3
        assert fetch.fetch_kv.source_agent_address == harness["prefill-0"].info.agent_address
        assert first.first_token.token_id == tokens[0]


async def test_cached_tokens_of_a_split_are_prefills_when_those_are_more() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["prefill-0"].behaviour.num_cached_blocks = 5
        _, end = await collect(harness.generate(40))
        assert end.num_cached_tokens == 20


async def test_first_token_is_relayed_before_prefill_has_ended() -> None:
    async with running("prefill-0", "decode-0") as harness:
        gate = harness["prefill-0"].behaviour.gates["end"] = asyncio.Event()
        generation = harness.generate(40)
        event = await anext(generation)
        assert isinstance(event, TokensEvent)
        expected = answer(make_request(40))
        assert list(event.token_ids) == expected[:1]
        gate.set()
        tokens, _ = await collect(generation)
        assert tokens == expected[1:]


async def test_stop_at_the_first_token_cancels_decode_and_shows_none_of_its_tokens() -> None:
    async with running("prefill-0", "decode-0") as harness:
        behaviour = harness["prefill-0"].behaviour
        behaviour.finish_reason = messages_pb2.FINISH_REASON_STOP
        gate = behaviour.gates["end"] = asyncio.Event()
        generation = harness.generate(40)
        await anext(generation)
        # This fake goes on at once, past the stop: all of its tokens are here before prefill says that it is one.
        await until(lambda: not harness.connection("decode-0").num_requests)
        gate.set()
        tokens, end = await collect(generation)
        assert tokens == []
        assert end.finish_reason is FinishReason.STOP


async def test_request_that_prefill_ends_is_cancelled_at_decode() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["decode-0"].behaviour.gates["tokens"] = asyncio.Event()
        harness["prefill-0"].behaviour.finish_reason = messages_pb2.FINISH_REASON_STOP
        tokens, end = await collect(harness.generate(40))
        assert tokens == answer(make_request(40))[:1]
        assert end.finish_reason is FinishReason.STOP
        await harness.journal.wait("decode-0", "cancel")


async def test_one_token_request_ends_with_prefills_token() -> None:
    async with running("prefill-0", "decode-0") as harness:
        tokens, end = await collect(harness.generate(40, max_tokens=1))
        assert tokens == answer(make_request(40, max_tokens=1))
        assert end.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("stage", ["submit", "announce", "first_token", "end"])
@pytest.mark.parametrize("how", ["error", "dies"])
async def test_prefill_failure_at_any_stage_loses_and_repeats_no_token(stage: str, how: str) -> None:
    async with running("prefill-0", "decode-0") as harness:
        behaviour = harness["prefill-0"].behaviour
        if how == "dies":
            behaviour.die_at = "announce" if stage == "submit" else stage
        elif stage == "submit":
            behaviour.refuse = full()
        else:
            behaviour.fail[stage] = Unavailable("broken")
        tokens, end = await collect(harness.generate(40, first=2))
        assert tokens == answer(make_request(40, first=2))
        assert end.finish_reason is FinishReason.LENGTH
        assert "decode-0 compute_locally" in harness.journal.names()


@pytest.mark.parametrize(
    ("first", "max_tokens", "reason"), [(1, 6, FinishReason.STOP), (2, 1, FinishReason.LENGTH), (2, 6, None)]
)
async def test_prefill_that_dies_after_a_last_token_leaves_it_the_last(
    first: int, max_tokens: int, reason: FinishReason | None
) -> None:
    """Decode cannot know that the first token, EOS or the only one asked for, was the last."""
    async with running("prefill-0", "decode-0") as harness:
        assert answer(make_request(40))[0] == EOS
        harness["prefill-0"].behaviour.die_at = "end"
        gate = harness["decode-0"].behaviour.gates["tokens"] = asyncio.Event()
        generation = harness.generate(40, first=first, max_tokens=max_tokens)
        event = await anext(generation)
        assert isinstance(event, TokensEvent)
        if reason is None:
            gate.set()
            tokens, end = await collect(generation)
            assert [*event.token_ids, *tokens] == answer(make_request(40, first=first))
        else:
            tokens, end = await collect(generation)
            assert (tokens, end.finish_reason) == ([], reason)
            await harness.journal.wait("decode-0", "cancel")


async def test_decode_that_has_all_blocks_is_told_to_go_on_without_prefill() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["decode-0"].behaviour.num_cached_blocks = 10
        tokens, end = await collect(harness.generate(40))
        assert tokens == answer(make_request(40))
        assert end.num_cached_tokens == 40
        assert harness.journal.names() == ["decode-0 submit", "decode-0 compute_locally"]


async def test_known_prefix_goes_direct() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["decode-0"].store(names_of(make_request(40)))
        await harness.until_known("decode-0", 10)
        await collect(harness.generate(40))
        assert harness.journal.names() == ["decode-0 submit"]


async def test_no_prefill_worker_means_direct() -> None:
    async with running("prefill-0", "decode-0") as harness:
        await harness["prefill-0"].stop()
        await harness.until_connected("prefill-0", False)
        tokens, _ = await collect(harness.generate(40))
        assert tokens == answer(make_request(40))
        assert harness.journal.names() == ["decode-0 submit"]


async def test_refusal_goes_to_the_next_decode_worker() -> None:
    async with running("decode-0", "decode-1") as harness:
        harness["decode-0"].behaviour.refuse = full()
        for first in range(8):  # some of which would have gone to decode-0
            tokens, _ = await collect(harness.generate(8, first=first))
            assert tokens == answer(make_request(8, first=first))
        assert harness.journal.all("decode-0", "submit")


async def test_full_fleet_refuses_before_prefill() -> None:
    async with running("prefill-0", "decode-0", "decode-1") as harness:
        for worker_id in ("decode-0", "decode-1"):
            harness[worker_id].behaviour.refuse = full()
        with pytest.raises(Exhausted, match="no blocks left") as refused:
            await collect(harness.generate(40))
        assert refused.value.retry_after_seconds == 3.0
        assert sorted(harness.journal.names()) == ["decode-0 submit", "decode-1 submit"]


async def test_error_of_the_request_itself_is_not_tried_elsewhere() -> None:
    async with running("decode-0", "decode-1") as harness:
        for worker_id in ("decode-0", "decode-1"):
            harness[worker_id].behaviour.refuse = InvalidRequest("top_k is odd", "top_k")
        with pytest.raises(InvalidRequest) as refused:
            await collect(harness.generate(8))
        assert refused.value.param == "top_k"
        assert len(harness.journal.names()) == 1


async def test_decode_that_dies_before_any_token_is_replaced() -> None:
    async with running("decode-0", "decode-1") as harness:
        harness["decode-0"].behaviour.die_at = "tokens"
        for first in range(4):
            tokens, _ = await collect(harness.generate(8, first=first))
            assert tokens == answer(make_request(8, first=first))
            await harness.until_connected("decode-0")


async def test_nothing_alive_is_unavailable() -> None:
    async with running("decode-0") as harness:
        assert harness.dispatcher.is_ready()
        await harness["decode-0"].stop()
        await harness.until_connected("decode-0", False)
        assert not harness.dispatcher.is_ready()
        with pytest.raises(Unavailable, match="none is connected"):
            await collect(harness.generate(8))


async def test_too_long_and_empty_prompts_never_reach_a_worker() -> None:
    async with running("decode-0", max_model_len=32) as harness:
        model = harness.dispatcher.model()
        assert model is not None
        assert model.max_model_len == 32
        for num_tokens in (0, 32, 100):
            with pytest.raises(InvalidRequest) as refused:
                await collect(harness.generate(num_tokens))
            assert refused.value.param == "prompt"
        assert harness.journal.names() == []


async def test_cancel_reaches_both_stages_within_100_ms() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["prefill-0"].behaviour.gates["first_token"] = asyncio.Event()
        generation = harness.generate(40)
        reading = asyncio.create_task(anext(generation))
        await harness.journal.wait("decode-0", "fetch_kv")
        await generation.aclose()
        async with asyncio.timeout(0.1):
            await harness.journal.wait("decode-0", "cancel")
            await harness.journal.wait("prefill-0", "cancel")
        with pytest.raises(RelevoError, match="left"):
            await reading
        await generation.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(generation)


async def test_cancelled_reader_can_close() -> None:
    async with running("decode-0") as harness:
        harness["decode-0"].behaviour.gates["tokens"] = asyncio.Event()
        generation = harness.generate(8)
        reading = asyncio.create_task(anext(generation))
        await harness.journal.wait("decode-0", "submit")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await generation.aclose()
        await harness.journal.wait("decode-0", "cancel")


async def test_closing_before_the_start_sends_nothing() -> None:
    async with running("decode-0") as harness:
        generation = harness.generate(8, timeout_ms=1000)
        await generation.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(generation)
        assert harness.journal.names() == []


async def test_deadline_frees_both_stages() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["prefill-0"].behaviour.gates["first_token"] = asyncio.Event()
        with pytest.raises(DeadlineExceeded):
            await collect(harness.generate(40, timeout_ms=150))
        await harness.journal.wait("decode-0", "cancel")
        await harness.journal.wait("prefill-0", "cancel")
        left = harness.journal.all("prefill-0", "submit")[0].command.submit.request.timeout_ms
        assert 1 <= left <= 150


async def test_deadline_passes_while_nobody_reads() -> None:
    async with running("decode-0") as harness:
        harness["decode-0"].behaviour.gates["token-1"] = asyncio.Event()
        generation = harness.generate(8, timeout_ms=150)
        await anext(generation)
        await harness.journal.wait("decode-0", "cancel")
        with pytest.raises(DeadlineExceeded):
            await anext(generation)


async def test_64_at_once_are_all_served_and_spread() -> None:
    async with running("prefill-0", "prefill-1", "decode-0", "decode-1") as harness:
        requests = [{"first": 10 * index, "max_tokens": 8} for index in range(64)]
        answers = await asyncio.gather(*(collect(harness.generate(40, **request)) for request in requests))
        for request, (tokens, _) in zip(requests, answers, strict=True):
            assert tokens == answer(make_request(40, **request))
        for worker_id in harness.workers:
            assert len(harness.journal.all(worker_id, "submit")) >= 16
        assert not any(worker.num_requests for worker in harness.fleet.workers)
