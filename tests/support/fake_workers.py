"""Workers without a model: real gRPC servers that speak our contracts and do what a test tells them.

    decode = FakeDecode("decode-0", step_seconds=0.02)
    await decode.start()
    ...
    await decode.stop()

What they answer follows from the prompt alone (`answer`), so that the tokens are the same whoever computes them.
Stages can be held at gates, refused, failed or cut off. Everything that arrives is written into a journal, on which
tests wait.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Exhausted
from services.common.grpc import GrpcServer, Registration, make_server
from services.common.security import NO_SECURITY, Security
from services.pb import (
    decode_pb2,
    decode_pb2_grpc,
    messages_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.support.fake_sessions import Behaviour, Died, Entry, Journal, Session

FINGERPRINT = bytes(range(32))
VOCAB_SIZE = 1000
LOAD_INTERVAL_SECONDS = 1.0


def answer(request: messages_pb2.GenerationRequest) -> list[int]:
    """What a fake model says to a prompt: max_tokens tokens, with those that are in the request already."""
    prompt = request.prompt_token_ids[: len(request.prompt_token_ids) - request.num_output_tokens]
    start = sum(prompt) + len(prompt)
    return [(start + 7 * index) % VOCAB_SIZE for index in range(request.sampling.max_tokens)]


def full() -> Exhausted:
    """What a worker without room refuses with."""
    return Exhausted("no blocks left", retry_after_seconds=3.0)


class FakeWorker:
    """Identity, block events, life. A second start() is a restart: same address, new incarnation, no blocks."""

    role: worker_pb2.Role.ValueType

    def __init__(
        self,
        worker_id: str,
        journal: Journal | None = None,
        *,
        block_size: int = 4,
        max_model_len: int = 4096,
        max_num_seqs: int = 64,
        agent_address: str = "127.0.0.1:9",
        fingerprint: bytes = FINGERPRINT,
        snapshot_part: int = 16384,
        behaviour: Behaviour | None = None,
        security: Security = NO_SECURITY,
    ) -> None:
        self.worker_id = worker_id
        self.journal = journal or Journal()
        self.behaviour = behaviour or Behaviour()
        self.info = worker_pb2.WorkerInfo(
            worker_id=worker_id,
            role=self.role,
            model="fake",
            layout_fingerprint=fingerprint,
            block_size=block_size,
            block_bytes=1024,
            num_blocks=4096,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            agent_address=agent_address,
            max_num_seqs=max_num_seqs,
        )
        self.load = messages_pb2.Load(num_free_blocks=4096)
        self.address = ""
        self.blocks: dict[BlockHash, None] = {}
        self.sequence = 0
        self.security = security
        self._snapshot_part = snapshot_part
        self._watchers: set[asyncio.Queue[worker_pb2.BlockEvents]] = set()
        self._server: GrpcServer | None = None

    async def start(self) -> None:
        assert self._server is None
        self.info.incarnation = uuid.uuid4().hex
        self.blocks.clear()
        self.sequence = 0
        port = int(self.address.rpartition(":")[2]) if self.address else 0
        service = Registration(worker_pb2_grpc.add_WorkerServicer_to_server, _WorkerServicer(self), "relevo.v1.Worker")
        self._server = make_server([service, self._registration()], "127.0.0.1", port, self.security)
        self.address = self._server.address
        await self._server.start()

    async def stop(self) -> None:
        """At once: every stream breaks."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)

    def store(self, hashes: Sequence[BlockHash]) -> None:
        self.blocks.update(dict.fromkeys(hashes))
        self._publish(worker_pb2.Delta(stored=b"".join(hashes)))

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        for name in hashes:
            self.blocks.pop(name, None)
        self._publish(worker_pb2.Delta(removed=b"".join(hashes)))

    def lose_event(self) -> None:
        """The next delta will come with a gap before it."""
        self.sequence += 1

    async def watch(self) -> AsyncIterator[worker_pb2.BlockEvents]:
        pending: asyncio.Queue[worker_pb2.BlockEvents] = asyncio.Queue()
        self._watchers.add(pending)
        names, sequence = list(self.blocks), self.sequence
        self.journal.add(Entry(self.worker_id, "watch"))
        try:
            starts = range(0, max(1, len(names)), self._snapshot_part)
            for start in starts:
                part = b"".join(names[start : start + self._snapshot_part])
                snapshot = worker_pb2.Snapshot(block_hashes=part, first=start == 0, last=start == starts[-1])
                yield worker_pb2.BlockEvents(sequence=sequence, snapshot=snapshot, load=self.load)
            while True:
                try:
                    event = await asyncio.wait_for(pending.get(), LOAD_INTERVAL_SECONDS)
                    sequence = event.sequence
                except TimeoutError:
                    event = worker_pb2.BlockEvents(sequence=sequence)
                event.load.CopyFrom(self.load)
                yield event
        finally:
            self._watchers.discard(pending)

    def tell_load(self) -> None:
        """What `load` says, now."""
        for pending in self._watchers:
            pending.put_nowait(worker_pb2.BlockEvents(sequence=self.sequence))

    def _publish(self, delta: worker_pb2.Delta) -> None:
        self.sequence += 1
        for pending in self._watchers:
            pending.put_nowait(worker_pb2.BlockEvents(sequence=self.sequence, delta=delta))

    def _registration(self) -> Registration:
        raise AssertionError("a subclass says what it serves")

    async def reach(self, stage: str) -> None:
        """Before a stage: its gate, its failure, its death."""
        gate = self.behaviour.gates.get(stage)
        if gate is not None:
            await gate.wait()
        if self.behaviour.die_at == stage:
            raise Died
        if stage in self.behaviour.fail:
            raise self.behaviour.fail[stage]

    async def compute(self, num_tokens: int) -> None:
        rate = self.behaviour.prefill_tokens_per_second
        if rate:
            await asyncio.sleep(num_tokens / rate)

    def session(self, context: Any, updates: Any, update: Any, serve: Any) -> Session:
        return Session(self.worker_id, self.journal, self.load, serve, context, updates, update)


class FakePrefill(FakeWorker):
    role = worker_pb2.ROLE_PREFILL

    def _registration(self) -> Registration:
        add = prefill_pb2_grpc.add_PrefillServiceServicer_to_server
        return Registration(add, _PrefillServicer(self), "relevo.v1.PrefillService")

    async def serve(self, session: Session, handle: int, commands: asyncio.Queue[prefill_pb2.PrefillCommand]) -> None:
        submit = (await commands.get()).submit
        if self.behaviour.refuse is not None:
            raise self.behaviour.refuse
        await self.reach("announce")
        announced = prefill_pb2.Announced(agent_address=self.info.agent_address)
        await session.send(prefill_pb2.PrefillUpdate(handle=handle, announced=announced))
        cached = self.behaviour.num_cached_blocks * self.info.block_size
        await self.compute(len(submit.request.prompt_token_ids) - cached)
        await self.reach("first_token")
        index = submit.request.num_output_tokens
        first = messages_pb2.Tokens(token_ids=answer(submit.request)[index : index + 1])
        await session.send(prefill_pb2.PrefillUpdate(handle=handle, first_token=first))
        await self.reach("end")
        ended = messages_pb2.Ended(finish_reason=self.behaviour.finish_reason, num_cached_tokens=cached)
        await session.send(prefill_pb2.PrefillUpdate(handle=handle, ended=ended))


class FakeDecode(FakeWorker):
    role = worker_pb2.ROLE_DECODE

    def _registration(self) -> Registration:
        add = decode_pb2_grpc.add_DecodeServiceServicer_to_server
        return Registration(add, _DecodeServicer(self), "relevo.v1.DecodeService")

    async def serve(self, session: Session, handle: int, commands: asyncio.Queue[decode_pb2.DecodeCommand]) -> None:
        submit = (await commands.get()).submit
        if self.behaviour.refuse is not None:
            raise self.behaviour.refuse
        await self.reach("accept")
        accepted = decode_pb2.Accepted(num_cached_blocks=self.behaviour.num_cached_blocks)
        await session.send(decode_pb2.DecodeUpdate(handle=handle, accepted=accepted))
        cached = self.behaviour.num_cached_blocks * self.info.block_size
        tokens = answer(submit.request)
        start = submit.request.num_output_tokens
        if submit.HasField("ticket"):
            start += await self._first_token(commands) is not None
        else:
            await self.compute(len(submit.request.prompt_token_ids) - cached)
        await self.reach("tokens")
        for index in range(start, len(tokens)):
            await self.reach(f"token-{index}")
            if self.behaviour.step_seconds:
                await asyncio.sleep(self.behaviour.step_seconds)
            await session.send(
                decode_pb2.DecodeUpdate(handle=handle, tokens=messages_pb2.Tokens(token_ids=[tokens[index]]))
            )
        await self.reach("end")
        ended = messages_pb2.Ended(finish_reason=self.behaviour.finish_reason, num_cached_tokens=cached)
        await session.send(decode_pb2.DecodeUpdate(handle=handle, ended=ended))

    async def _first_token(self, commands: asyncio.Queue[decode_pb2.DecodeCommand]) -> int | None:
        """Waits until it may run: blocks and the first token are known, or it has to compute. The token, if known."""
        token: int | None = None
        is_fetching = False
        while not (is_fetching and token is not None):
            command = await commands.get()
            if command.HasField("compute_locally"):
                break
            is_fetching = is_fetching or command.HasField("fetch_kv")
            if command.HasField("first_token"):
                token = command.first_token.token_id
        return token


class _WorkerServicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def GetInfo(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:
        return self._worker.info

    async def WatchBlocks(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.BlockEvents]:
        async for event in self._worker.watch():
            yield event


class _PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: FakePrefill) -> None:
        self._worker = worker

    async def Prefill(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # writes to context
        updates, update = prefill_pb2.PrefillUpdates, prefill_pb2.PrefillUpdate
        await self._worker.session(context, updates, update, self._worker.serve).run(request_iterator)


class _DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: FakeDecode) -> None:
        self._worker = worker

    async def Generate(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # writes to context
        updates, update = decode_pb2.DecodeUpdates, decode_pb2.DecodeUpdate
        await self._worker.session(context, updates, update, self._worker.serve).run(request_iterator)
