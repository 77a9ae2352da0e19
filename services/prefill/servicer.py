"""The Prefill stream: prompts in, sealed blocks and first tokens out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from services.common.grpc import Registration
from services.kvtransfer.client import KvAgentClient
from services.pb import prefill_pb2_grpc
from services.pb.messages_pb2 import Ended, Load
from services.pb.prefill_pb2 import PrefillCommand, PrefillUpdate, PrefillUpdates
from services.prefill.request import PrefillRequest
from services.worker.receiving import BlockReceiver
from services.worker.session import Dialect, Reply, Session
from services.worker.worker import Worker


def prefill_registration(worker: Worker, agent: KvAgentClient | None) -> Registration:
    assert agent is not None
    if worker.direct_kv is not None:
        agent.direct_memory = worker.direct_kv.show()
    servicer = PrefillServicer(worker, agent, BlockReceiver(agent, worker))
    add = prefill_pb2_grpc.add_PrefillServiceServicer_to_server
    return Registration(add, servicer, "relevo.v1.PrefillService")


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: Worker, agent: KvAgentClient, receiver: BlockReceiver) -> None:
        self._worker = worker
        self._agent = agent
        self._receiver = receiver
        self._dialect = Dialect(self._start, _ended, _message)

    # gRPC takes a coroutine that reads and writes through the context; the generated type knows generators only.
    async def Prefill(  # type: ignore[override]
        self, request_iterator: AsyncIterator[PrefillCommand], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await Session(self._worker, self._dialect).run(context)

    def _start(self, command: PrefillCommand, engine_id: str, reply: Reply[PrefillUpdate]) -> PrefillRequest:
        return PrefillRequest(self._worker, self._agent, self._receiver, command.submit, engine_id, reply)


def _ended(handle: int, ended: Ended) -> PrefillUpdate:
    return PrefillUpdate(handle=handle, ended=ended)


def _message(updates: list[PrefillUpdate], load: Load) -> PrefillUpdates:
    return PrefillUpdates(updates=updates, load=load)
