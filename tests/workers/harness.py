"""Real servers and streams around a fake engine."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

import grpc.aio

from services.common.grpc import Registration, make_channel, make_server
from services.decode.servicer import decode_registration
from services.kvtransfer.agent import Agent
from services.kvtransfer.client import KvAgentClient
from services.pb import (
    decode_pb2,
    decode_pb2_grpc,
    messages_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from services.prefill.servicer import prefill_registration
from services.worker.config import WorkerSettings
from services.worker.ports import EnginePort
from services.worker.servicer import WorkerServicer
from services.worker.worker import Worker
from tests.support.agents import TIMEOUT_SECONDS, until
from tests.support.fake_engine import FakeEngine, FakeEngineThread

CommandT = TypeVar("CommandT", decode_pb2.DecodeCommand, prefill_pb2.PrefillCommand)


class HasChannel(Protocol):
    channel: grpc.aio.Channel


@dataclass
class RunningWorker:
    worker: Worker
    engine: FakeEngine
    thread: FakeEngineThread
    channel: grpc.aio.Channel
    is_expected_clean: bool = True

    async def settle(self) -> None:
        """Wait until no request is left, then prove that nothing leaked."""
        await until(lambda: self.thread.error is not None or self.worker.num_requests == 0)
        if not self.thread._is_paused:
            self.thread.step_once()
        if self.thread.error is not None:
            raise self.thread.error
        pool = self.engine.scheduler.pool
        await until(lambda: pool.num_free_blocks == pool.num_blocks)  # what is being offered is let go of soon
        self.engine.scheduler.check()
        assert not self.engine.scheduler._requests


def make_settings(**values: Any) -> WorkerSettings:
    return WorkerSettings(_cli_parse_args=[], **values)


@asynccontextmanager
async def serving(
    worker: Worker, make_registration: Callable[[Worker], Registration]
) -> AsyncIterator[grpc.aio.Channel]:
    """A worker's engine thread, tasks and server; a channel to it."""
    worker.thread.start()
    requests = asyncio.create_task(worker.run())
    info = worker_pb2.WorkerInfo(worker_id="w", block_size=worker.engine.info.block_size)
    identity = Registration(
        worker_pb2_grpc.add_WorkerServicer_to_server, WorkerServicer(info, worker.block_events), "relevo.v1.Worker"
    )
    server = make_server([make_registration(worker), identity], "127.0.0.1", 0)
    await server.start()
    channel = make_channel(server.address)
    try:
        yield channel
    finally:
        worker.block_events.close()
        await channel.close()
        await server.stop(0)
        requests.cancel()
        await asyncio.wait((requests,))
        await worker.thread.stop()
        worker.copier.close()


@asynccontextmanager
async def running_worker(
    engine: FakeEngine, make_registration: Callable[[Worker], Registration], **settings: Any
) -> AsyncIterator[RunningWorker]:
    worker = Worker(make_settings(**settings), engine, FakeEngineThread)
    thread = worker.thread
    assert isinstance(thread, FakeEngineThread)
    async with AsyncExitStack() as stack:
        if worker.settings.direct_kv:
            stack.push_async_callback(worker.open_direct_kv(f"worker-{uuid4()}").close)
        channel = await stack.enter_async_context(serving(worker, make_registration))
        running = RunningWorker(worker, engine, thread, channel)
        yield running
        if running.is_expected_clean:
            await running.settle()


@asynccontextmanager
async def running_local_decode(engine: FakeEngine | None = None, **settings: Any) -> AsyncIterator[RunningWorker]:
    """A decode worker without an agent."""
    async with running_worker(
        engine or FakeEngine(), lambda worker: decode_registration(worker, None), **settings
    ) as running:
        yield running


@asynccontextmanager
async def attached(agent: Agent, engine: EnginePort, worker_id: str) -> AsyncIterator[KvAgentClient]:
    client = KvAgentClient(agent.address, worker_id, "incarnation")
    try:
        await client.attach(engine.info.fingerprint, engine.info.block_bytes)
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def running_decode(
    agent: Agent, engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[RunningWorker]:
    engine = engine or FakeEngine()
    async with (
        attached(agent, engine, "d") as client,
        running_worker(
            engine, lambda worker: decode_registration(worker, client), **{"offer_share": 0.0, **settings}
        ) as running,
    ):
        yield running


@asynccontextmanager
async def running_prefill(
    agent: Agent, engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[RunningWorker]:
    engine = engine or FakeEngine()
    async with (
        attached(agent, engine, "p") as client,
        running_worker(engine, lambda worker: prefill_registration(worker, client), **settings) as running,
    ):
        yield running


class RouterStream(Generic[CommandT]):
    """A router's end of a stream: sends commands, sorts updates by handle, and insists on one end a request."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._sending = asyncio.Lock()
        self.num_messages = 0
        self.load: messages_pb2.Load | None = None
        self._updates: defaultdict[int, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self._ended: set[int] = set()
        self._task = asyncio.create_task(self._read())

    async def send(self, command: CommandT) -> None:
        async with self._sending:  # gRPC takes one write at a time
            await self.call.write(command)

    async def next(self, handle: int, kind: str) -> Any:
        """The handle's next update, which must be of this kind."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            update = await self._updates[handle].get()
        found = update.WhichOneof("update")
        assert found == kind, f"{kind} expected, but {update}"
        return getattr(update, kind)

    async def rest(self, handle: int) -> tuple[list[int], messages_pb2.Ended]:
        """Tokens until the end, and the end."""
        token_ids: list[int] = []
        while True:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                update = await self._updates[handle].get()
            kind = update.WhichOneof("update")
            if kind == "ended":
                return token_ids, update.ended
            if kind in ("tokens", "first_token"):
                token_ids += getattr(update, kind).token_ids

    async def end(self) -> None:
        """Half-close, and read what is still to come."""
        await self.call.done_writing()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self._task

    async def wait_closed(self) -> grpc.StatusCode:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            code: grpc.StatusCode = await self.call.code()
            return code

    async def close(self) -> None:
        self.call.cancel()
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error

    async def _read(self) -> None:
        try:
            async for message in self.call:
                self.num_messages += 1
                self.load = message.load
                for update in message.updates:
                    assert update.handle not in self._ended, f"an update after the end: {update}"
                    if update.WhichOneof("update") == "ended":
                        self._ended.add(update.handle)
                    self._updates[update.handle].put_nowait(update)
        except grpc.aio.AioRpcError:
            pass  # tests look at the call's code


@asynccontextmanager
async def decode_stream(running: HasChannel) -> AsyncIterator[RouterStream[decode_pb2.DecodeCommand]]:
    stub: Any = decode_pb2_grpc.DecodeServiceStub(running.channel)
    stream: RouterStream[decode_pb2.DecodeCommand] = RouterStream(stub.Generate())
    try:
        yield stream
    finally:
        await stream.close()


@asynccontextmanager
async def prefill_stream(running: HasChannel) -> AsyncIterator[RouterStream[prefill_pb2.PrefillCommand]]:
    stub: Any = prefill_pb2_grpc.PrefillServiceStub(running.channel)
    stream: RouterStream[prefill_pb2.PrefillCommand] = RouterStream(stub.Prefill())
    try:
        yield stream
    finally:
        await stream.close()


def generation(prompt: Sequence[int], max_tokens: int = 4, **fields: Any) -> messages_pb2.GenerationRequest:
    sampling = messages_pb2.SamplingParams(
        max_tokens=max_tokens, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1
    )
    return messages_pb2.GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, **fields)


def submit_decode(handle: int, prompt: Sequence[int], max_tokens: int = 4, **fields: Any) -> decode_pb2.DecodeCommand:
    submit = decode_pb2.SubmitDecode(request=generation(prompt, max_tokens, **fields))
    return decode_pb2.DecodeCommand(handle=handle, submit=submit)


def submit_fetching(
    handle: int, prompt: Sequence[int], source: str = "", max_tokens: int = 4, **fields: Any
) -> decode_pb2.DecodeCommand:
    """Direct, with blocks from the agent at source ("": decode's own)."""
    command = submit_decode(handle, prompt, max_tokens, **fields)
    command.submit.fetch.source_agent_address = source
    return command


def submit_split(handle: int, prompt: Sequence[int], max_tokens: int = 4, **fields: Any) -> decode_pb2.DecodeCommand:
    ticket = messages_pb2.Ticket(prefill_worker_id="p", decode_worker_id="d")
    submit = decode_pb2.SubmitDecode(request=generation(prompt, max_tokens, **fields), ticket=ticket)
    return decode_pb2.DecodeCommand(handle=handle, submit=submit)


def submit_prefill(
    handle: int, prompt: Sequence[int], max_tokens: int = 4, num_blocks_at_decode: int = 0, **fields: Any
) -> prefill_pb2.PrefillCommand:
    ticket = messages_pb2.Ticket(prefill_worker_id="p", decode_worker_id="d", num_blocks_at_decode=num_blocks_at_decode)
    submit = prefill_pb2.SubmitPrefill(request=generation(prompt, max_tokens, **fields), ticket=ticket)
    return prefill_pb2.PrefillCommand(handle=handle, submit=submit)
