"""The Worker service: who this is, and which blocks it holds."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc.aio

from services.common.block_events import BlockEvents
from services.pb import worker_pb2, worker_pb2_grpc


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, info: worker_pb2.WorkerInfo, block_events: BlockEvents) -> None:
        self._info = info
        self._block_events = block_events

    async def GetInfo(
        self, request: worker_pb2.GetInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.WorkerInfo:
        return self._info

    async def WatchBlocks(
        self, request: worker_pb2.WatchBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[worker_pb2.BlockEvents, None]:
        async with aclosing(self._block_events.watch()) as events:
            async for event in events:
                yield event
