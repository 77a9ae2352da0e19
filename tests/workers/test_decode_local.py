"""Decode without a split: streams, queues, cancels, deadlines, drain."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from relevo.core.errors import Unavailable
from services.pb import decode_pb2, messages_pb2, worker_pb2, worker_pb2_grpc
from services.worker.metrics import WorkerCollector
from services.worker.session import Session
from tests.support.agents import TIMEOUT_SECONDS, until
from tests.support.fake_engine import continuation
from tests.workers.harness import (
    RunningWorker,
    decode_stream,
    running_local_decode,
    submit_decode,
)

PROMPT = list(range(1, 11))


def cancel(handle: int) -> decode_pb2.DecodeCommand:
    return decode_pb2.DecodeCommand(handle=handle, cancel=decode_pb2.CancelDecode())


async def test_request_is_accepted_streamed_and_ended() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        await stream.send(submit_decode(7, PROMPT, max_tokens=5))
        accepted = await stream.next(7, "accepted")
        assert accepted.num_cached_blocks == 0
        token_ids, ended = await stream.rest(7)
        assert token_ids == continuation(PROMPT, 5)
        assert ended.finish_reason == messages_pb2.FINISH_REASON_LENGTH
        assert stream.load is not None


async def test_repeated_prompt_reports_its_cached_blocks() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        for handle, num_cached_blocks in ((1, 0), (2, 2)):
            await stream.send(submit_decode(handle, PROMPT))
            accepted = await stream.next(handle, "accepted")
            assert accepted.num_cached_blocks == num_cached_blocks
            _, ended = await stream.rest(handle)
            assert ended.num_cached_tokens == num_cached_blocks * 4


async def test_same_request_id_may_come_twice_at_once() -> None:
    async with running_local_decode() as running, decode_stream(running) as one, decode_stream(running) as other:
        for stream in (one, other):
            for handle in (1, 2):
                await stream.send(submit_decode(handle, PROMPT))
        for stream in (one, other):
            for handle in (1, 2):
                token_ids, _ = await stream.rest(handle)
                assert token_ids == continuation(PROMPT, 4)


async def test_updates_of_a_step_come_in_one_message() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        for handle in range(4):
            await stream.send(submit_decode(handle, [handle + 1, 5, 6], max_tokens=1))
        await submitted(running, 4)
        running.thread.step_once()
        for handle in range(4):
            await stream.rest(handle)
        assert stream.num_messages == 1
        running.thread.go()


async def test_wrong_request_is_refused_by_name() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        await stream.send(submit_decode(1, []))
        _, ended = await stream.rest(1)
        assert ended.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert ended.error.param == "prompt"


async def test_used_handle_breaks_the_stream_and_frees_its_requests() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        await stream.send(submit_decode(1, PROMPT))
        await stream.send(submit_decode(1, PROMPT))
        assert await stream.wait_closed() is grpc.StatusCode.INVALID_ARGUMENT
        running.thread.go()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
async def test_cancel_ends_once_at_any_stage(num_steps: int) -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        await stream.send(submit_decode(1, PROMPT * 3, max_tokens=50))
        await submitted(running, 1)
        for _ in range(num_steps):
            running.thread.step_once()
        await stream.send(cancel(1))
        await stream.send(cancel(1))
        running.thread.go()
        _, ended = await stream.rest(1)
        assert ended.finish_reason == messages_pb2.FINISH_REASON_CANCELLED


async def test_cancel_after_the_end_is_ignored() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        await stream.send(submit_decode(1, PROMPT))
        await stream.rest(1)
        await stream.send(cancel(1))
        await stream.send(submit_decode(2, PROMPT))
        token_ids, _ = await stream.rest(2)
        assert token_ids == continuation(PROMPT, 4)


async def test_router_that_leaves_frees_everything() -> None:
    async with running_local_decode() as running:
        running.thread.pause()
        async with decode_stream(running) as stream:
            for handle in range(3):
                await stream.send(submit_decode(handle, PROMPT, max_tokens=100))
            await submitted(running, 3)
            running.thread.step_once()
        await until(lambda: not running.worker._sessions)
        running.thread.go()


async def test_half_closed_stream_still_gets_its_ends() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        await stream.send(submit_decode(1, PROMPT, max_tokens=150))
        await stream.next(1, "accepted")
        running.thread.pause()
        ending = asyncio.create_task(stream.end())
        await until(lambda: len(running.thread._commands) == 1)  # the abort: the end of the router's side was seen
        running.thread.go()
        await ending
        _, ended = await stream.rest(1)
        assert ended.finish_reason == messages_pb2.FINISH_REASON_CANCELLED
        assert await stream.wait_closed() is grpc.StatusCode.OK


async def test_full_queue_refuses_with_retry_after() -> None:
    async with running_local_decode(max_num_waiting=2) as running, decode_stream(running) as stream:
        running.thread.pause()
        for handle in range(3):
            await stream.send(submit_decode(handle, PROMPT))
        _, ended = await stream.rest(2)
        assert ended.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert ended.error.retry_after_seconds >= 1
        running.thread.go()
        for handle in range(2):
            token_ids, _ = await stream.rest(handle)
            assert token_ids == continuation(PROMPT, 4)


async def test_deadline_ends_a_request_that_waits() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        await stream.send(submit_decode(1, PROMPT, timeout_ms=1))
        await until(lambda: len(running.thread._commands) == 2)  # submit, and the timer's abort
        running.thread.go()
        _, ended = await stream.rest(1)
        assert ended.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_slow_router_is_cut_off_and_only_its_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(worker: object, dialect: object) -> object:
        return Session(worker, dialect, max_pending_bytes=64)  # type: ignore[arg-type]  # passed through

    async with running_local_decode() as running, decode_stream(running) as other:
        running.thread.pause()
        await other.send(submit_decode(1, PROMPT, max_tokens=3))
        await submitted(running, 1)
        monkeypatch.setattr("services.decode.servicer.Session", narrow)
        async with decode_stream(running) as slow:
            for handle in range(6):
                await slow.send(submit_decode(handle, PROMPT, max_tokens=100))
            await submitted(running, 7)
            running.thread.go()
            assert await slow.wait_closed() is grpc.StatusCode.RESOURCE_EXHAUSTED
        token_ids, _ = await other.rest(1)
        assert token_ids == continuation(PROMPT, 3)


async def test_drain_refuses_new_requests_and_finishes_running_ones() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        await stream.send(submit_decode(1, PROMPT))
        await submitted(running, 1)
        drain = asyncio.create_task(running.worker.drain(TIMEOUT_SECONDS))
        await stream.send(submit_decode(2, PROMPT))
        _, refused = await stream.rest(2)
        assert refused.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        running.thread.go()
        token_ids, _ = await stream.rest(1)
        assert token_ids == continuation(PROMPT, 4)
        await drain
        assert await stream.wait_closed() is grpc.StatusCode.OK


async def test_routers_are_told_of_a_drain_at_once() -> None:
    async with running_local_decode() as running:
        stub: Any = worker_pb2_grpc.WorkerStub(running.channel)
        watching = stub.WatchBlocks(worker_pb2.WatchBlocksRequest())
        assert not (await watching.read()).load.draining
        async with asyncio.timeout(0.5):  # the load comes by itself once a second
            running.worker.begin_drain()
            while not (await watching.read()).load.draining:
                pass
        watching.cancel()


async def test_drain_cancels_what_does_not_end_in_time() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        await stream.send(submit_decode(1, PROMPT))
        await submitted(running, 1)
        drain = asyncio.create_task(running.worker.drain(0))
        await until(lambda: len(running.thread._commands) == 2)  # submit, abort
        running.thread.go()
        _, ended = await stream.rest(1)
        assert ended.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        await drain


async def test_bug_in_one_request_ends_that_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        for handle in (1, 2):
            await stream.send(submit_decode(handle, PROMPT))
        await submitted(running, 2)
        request = running.worker._listeners["s1-1"]
        monkeypatch.setattr(request, "_accept", None)
        running.thread.go()
        _, broken = await stream.rest(1)
        assert broken.error.code == grpc.StatusCode.INTERNAL.value[0]
        token_ids, _ = await stream.rest(2)
        assert token_ids == continuation(PROMPT, 4)


async def test_dead_engine_is_told_and_drain_does_not_wait() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        running.thread.pause()
        await stream.send(submit_decode(1, PROMPT))
        await submitted(running, 1)
        running.thread.die(ValueError("boom"))
        with pytest.raises(ValueError, match="boom"):
            await running.worker.watch_engine()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await running.worker.drain(1000)
        with pytest.raises(Unavailable):
            running.worker.check_admission()
        running.is_expected_clean = False  # a dead engine frees nothing


async def submitted(running: RunningWorker, num_requests: int) -> None:
    await until(lambda: running.worker.num_requests == num_requests)


async def test_metrics_follow_the_load() -> None:
    async with running_local_decode() as running, decode_stream(running) as stream:
        await stream.send(submit_decode(1, PROMPT))
        await stream.rest(1)
        values = {
            sample.name: sample.value
            for metric in WorkerCollector(running.worker).collect()
            for sample in metric.samples
        }
        assert values["relevo_worker_requests_total"] == 1
        assert values["relevo_worker_named_blocks"] == 3  # 10 tokens and 3 of 4 computed after them, in blocks of 4
        assert values["relevo_worker_free_blocks"] == running.engine.info.num_blocks
