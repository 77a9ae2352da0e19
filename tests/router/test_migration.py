"""Decode workers that are lost while a request runs: it goes on elsewhere, from the tokens that there are."""

from __future__ import annotations

import asyncio

import pytest

from relevo.core.errors import Cancelled, Unavailable
from relevo.core.request import FinishReason
from services.pb import messages_pb2
from services.router.generation import TokensEvent
from tests.router.harness import Harness, collect, make_request, running, until
from tests.support.fake_sessions import Entry
from tests.support.fake_workers import answer

pytestmark = pytest.mark.timeout(20)


def other(harness: Harness) -> tuple[str, str]:
    """The decode worker that got the request first, and the other one."""
    first = harness.journal.names()[0].partition(" ")[0]
    return first, "decode-1" if first == "decode-0" else "decode-0"


def die_once(harness: Harness, stage: str) -> None:
    """Whichever decode worker gets there first."""
    for worker in harness.workers.values():
        if worker.worker_id.startswith("decode"):
            worker.behaviour.die_at = stage


async def submitted(harness: Harness, worker_id: str) -> messages_pb2.GenerationRequest:
    entry: Entry = await harness.journal.wait(worker_id, "submit")
    request: messages_pb2.GenerationRequest = entry.command.submit.request
    return request


@pytest.mark.parametrize("num_tokens", [1, 3, 5])
async def test_request_goes_on_elsewhere_without_losing_or_repeating_a_token(num_tokens: int) -> None:
    async with running("decode-0", "decode-1") as harness:
        die_once(harness, f"token-{num_tokens}")
        generation = harness.generate(8)
        seen: list[int] = []
        async for event in generation:
            if isinstance(event, TokensEvent):
                seen += event.token_ids
                if len(seen) == num_tokens:  # the next one lives
                    harness[other(harness)[1]].behaviour.die_at = None
        expected = answer(make_request(8))
        assert seen == expected
        again = await submitted(harness, other(harness)[1])
        assert list(again.prompt_token_ids) == [*make_request(8).prompt_token_ids, *expected[:num_tokens]]
        assert again.num_output_tokens == num_tokens
        assert again.sampling == make_request(8).sampling


async def test_split_request_whose_first_token_was_relayed_goes_on_elsewhere() -> None:
    async with running("prefill-0", "decode-0", "decode-1") as harness:
        harness["prefill-0"].behaviour.gates["end"] = asyncio.Event()
        generation = harness.generate(40, first=2)
        first = await anext(generation)
        assert isinstance(first, TokensEvent)
        await harness[other(harness)[0]].stop()
        harness["prefill-0"].behaviour.gates["end"].set()
        tokens, end = await collect(generation)
        assert [*first.token_ids, *tokens] == answer(make_request(40, first=2))
        assert end.finish_reason is FinishReason.LENGTH


async def test_it_may_happen_again() -> None:
    """Each of three workers gets two tokens further than the one before; the last one lives."""
    async with running("decode-0", "decode-1", "decode-2") as harness:
        die_once(harness, "token-2")
        seen: list[int] = []
        async for event in harness.generate(8):
            if isinstance(event, TokensEvent):
                seen += event.token_ids
                if len(seen) in (2, 4):
                    die_once(harness, "token-4" if len(seen) == 2 else "never")
        assert seen == answer(make_request(8))
        assert len(set(harness.journal.names())) == 3


async def test_lone_decode_worker_that_comes_back_is_waited_for() -> None:
    async with running("decode-0") as harness:
        gate = harness["decode-0"].behaviour.gates["token-3"] = asyncio.Event()
        generation = harness.generate(8)
        seen: list[int] = []
        while len(seen) < 3:
            event = await anext(generation)
            assert isinstance(event, TokensEvent)
            seen += event.token_ids
        going_on = asyncio.create_task(collect(generation))
        await harness["decode-0"].stop()
        await harness.until_connected("decode-0", False)
        gate.set()
        await harness["decode-0"].start()
        tokens, _ = await going_on
        assert seen + tokens == answer(make_request(8))


async def test_client_that_leaves_while_its_request_waits_for_a_worker_ends_it() -> None:
    async with running("decode-0") as harness:
        die_once(harness, "token-2")
        generation = harness.generate(8)
        await anext(generation)
        await harness.journal.wait("decode-0", "stream_end")
        going_on = asyncio.create_task(collect(generation))
        await until(lambda: len(harness.journal.all("decode-0", "watch")) > 0)
        await generation.aclose()
        with pytest.raises((Cancelled, AssertionError)):  # it ends without an end, or while it waits
            await going_on


async def test_worker_that_never_comes_back_is_waited_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.router.routed.MIGRATION_SECONDS", 0.2)
    async with running("decode-0") as harness:
        die_once(harness, "token-2")
        seen: list[int] = []
        with pytest.raises(Unavailable, match="no decode worker can serve this"):
            async for event in harness.generate(8):
                assert isinstance(event, TokensEvent)
                seen += event.token_ids
        assert seen == answer(make_request(8))[:2]


async def test_request_that_had_its_last_token_just_ends() -> None:
    """The worker died before it could say so."""
    async with running("decode-0", "decode-1") as harness:
        die_once(harness, "end")
        tokens, end = await collect(harness.generate(8))
        assert tokens == answer(make_request(8))
        assert end.finish_reason is FinishReason.LENGTH
        assert len(harness.journal.names()) == 1


async def test_cached_tokens_are_those_of_the_first_worker() -> None:
    async with running("decode-0", "decode-1") as harness:
        for worker in harness.workers.values():
            worker.behaviour.num_cached_blocks = 1
        die_once(harness, "token-2")
        generation = harness.generate(8)
        event = await anext(generation)
        assert isinstance(event, TokensEvent) and event.num_cached_tokens == 4
        survivor = harness[other(harness)[1]].behaviour
        survivor.die_at, survivor.num_cached_blocks = None, 2
        _, end = await collect(generation)
        assert end.num_cached_tokens == 4
