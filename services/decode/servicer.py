"""The Generate stream: requests that decode serves, split or not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from services.common.grpc import Registration
from services.decode.request import DecodeRequest
from services.kvtransfer.client import KvAgentClient
from services.pb import decode_pb2_grpc
from services.pb.decode_pb2 import DecodeCommand, DecodeUpdate, DecodeUpdates
from services.pb.messages_pb2 import Ended, Load
from services.worker.offering import Offering
from services.worker.receiving import BlockReceiver
from services.worker.session import Dialect, Reply, Session
from services.worker.worker import Worker


def decode_registration(worker: Worker, agent: KvAgentClient | None) -> Registration:
    receiver = BlockReceiver(agent, worker) if agent is not None else None
    if agent is not None and worker.settings.offer_share > 0:
        worker.on_stored = Offering(agent, worker, worker.settings.offer_share).stored
    servicer = DecodeServicer(worker, receiver)
    return Registration(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, "relevo.v1.DecodeService")


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """receiver: of blocks from the worker's agent; None if it has no agent."""

    def __init__(self, worker: Worker, receiver: BlockReceiver | None) -> None:
        self._worker = worker
        self._receiver = receiver
        self._dialect = Dialect(self._start, _ended, _message)

    # gRPC takes a coroutine that reads and writes through the context; the generated type knows generators only.
    async def Generate(  # type: ignore[override]
        self, request_iterator: AsyncIterator[DecodeCommand], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await Session(self._worker, self._dialect).run(context)

    def _start(self, command: DecodeCommand, engine_id: str, reply: Reply[DecodeUpdate]) -> DecodeRequest:
        return DecodeRequest(self._worker, self._receiver, command.submit, engine_id, reply)


def _ended(handle: int, ended: Ended) -> DecodeUpdate:
    return DecodeUpdate(handle=handle, ended=ended)


def _message(updates: list[DecodeUpdate], load: Load) -> DecodeUpdates:
    return DecodeUpdates(updates=updates, load=load)
