"""The stream's own limits."""

from __future__ import annotations

import asyncio

import pytest

from relevo.core.errors import InvalidRequest, Unavailable
from relevo.core.worker_load import PromptWork
from services.pb import decode_pb2
from services.router import request_stream
from services.router.inbox import Inbox
from tests.router.harness import collect, make_request, running
from tests.support.fake_workers import answer

pytestmark = pytest.mark.timeout(20)

WORK = PromptWork(num_prompt_tokens=1, num_uncached_tokens=1)


async def test_oversized_prompt_is_refused_and_harms_nobody() -> None:
    async with running("decode-0", max_model_len=1 << 20) as harness:
        harness["decode-0"].behaviour.gates["tokens"] = asyncio.Event()
        other = asyncio.create_task(collect(harness.generate(8)))
        await harness.journal.wait("decode-0", "submit")
        huge = make_request(8)
        huge.prompt_token_ids.extend([1] * (1 << 20))
        huge.prompt_token_ids.pop()
        with pytest.raises(InvalidRequest):
            await collect(harness.dispatcher.generate(huge))
        big = make_request(8)
        del big.prompt_token_ids[:]
        big.prompt_token_ids.extend([1] * (request_stream.MAX_COMMAND_BYTES - 200))
        with pytest.raises(InvalidRequest, match="too long to be sent"):
            big.request_id = "r" * 300
            await collect(harness.dispatcher.generate(big))
        harness["decode-0"].behaviour.gates["tokens"].set()
        tokens, _ = await other
        assert tokens == answer(make_request(8))


async def test_worker_that_does_not_read_is_refused_new_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_stream, "MAX_PENDING_SUBMITS", 2)
    async with running("decode-0") as harness:
        connection = harness.connection("decode-0")
        for _ in range(2):
            connection.submit(decode_pb2.DecodeCommand(), Inbox(), WORK)  # nothing is sent in between
        with pytest.raises(Unavailable, match="does not read"):
            connection.submit(decode_pb2.DecodeCommand(), Inbox(), WORK)


async def test_slow_reader_ends_its_own_request() -> None:
    async with running("decode-0") as harness:
        connection = harness.connection("decode-0")
        inbox: request_stream.RequestInbox = Inbox(3)
        submit = decode_pb2.SubmitDecode(request=make_request(8, max_tokens=100))
        connection.submit(decode_pb2.DecodeCommand(submit=submit), inbox, WORK)
        await harness.journal.wait("decode-0", "cancel")
        tokens, _ = await collect(harness.generate(8))
        assert tokens == answer(make_request(8))
