"""The writer's end of a Publish stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from relevo.core.errors import Unavailable
from services.common.errors import relevo_errors
from services.kvtransfer.mapping import ArenaMapping
from services.pb import kvtransfer_pb2

REPLY_SECONDS = 3.0  # an agent that takes longer for an answer hangs
_MAX_SEALS = 8192  # in one message: 160 KB

PublishCall = grpc.aio.StreamStreamCall[kvtransfer_pb2.PublishRequest, kvtransfer_pb2.PublishReply]


class Publication:
    """Blocks that were announced, in the order in which they were: `granted` ones are ours to write.

    Those in neither granted nor present are being written by somebody else.
    """

    def __init__(self, call: PublishCall, mapping: ArenaMapping, peer: str) -> None:
        self.mapping = mapping
        self.granted: dict[int, int] = {}  # index → slot
        self.sealed: set[int] = set()  # indices: sealed before, or by us
        self.present: set[int] = set()  # indices: sealed before, or on their way here: a fetch gets them
        self._call = call
        self._peer = f"kvtransfer agent {peer}"
        self._sealing = asyncio.Lock()

    async def open(self, announce: kvtransfer_pb2.Announce) -> None:
        reply = await self._exchange(kvtransfer_pb2.PublishRequest(announce=announce))
        self.granted = {granted.index: granted.slot for granted in reply.granted.slots}
        self.sealed = set(reply.granted.sealed)
        self.present = self.sealed.union(reply.granted.loading)

    def slot(self, index: int) -> memoryview:
        """Where to write a granted block: block_bytes, for write_block."""
        return self.mapping.slot(self.granted[index])

    async def seal(self, blocks: Iterable[tuple[int, int]], block_ids: Mapping[int, int] | None = None) -> None:
        """(index, checksum) of blocks that are written: readers see them when this returns.

        block_ids: by index, where they are in the writer's memory that was announced, if it was

        With no blocks it keeps the lease alive. Raises Unavailable if the agent is gone or has just ended the stream,
        DeadlineExceeded if the lease had ended.
        """
        todo = list(blocks)
        async with self._sealing:
            while True:
                part, todo = todo[:_MAX_SEALS], todo[_MAX_SEALS:]
                sealed = [
                    kvtransfer_pb2.SealedBlock(index=index, checksum=checksum, block_id=(block_ids or {}).get(index))
                    for index, checksum in part
                ]
                await self._exchange(kvtransfer_pb2.PublishRequest(seal=kvtransfer_pb2.Seal(blocks=sealed)))
                self.sealed.update(index for index, _ in part)
                if not todo:
                    return

    async def finish(self) -> None:
        """Say that no more comes, and wait for the lease's end. Raises nothing: what is sealed is sealed."""
        with suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(REPLY_SECONDS):
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass

    async def _exchange(self, request: kvtransfer_pb2.PublishRequest) -> kvtransfer_pb2.PublishReply:
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                with relevo_errors(self._peer):
                    await write_or_let_read_tell(self._call, request, self._peer)
                    reply = await self._call.read()
        except TimeoutError:
            raise Unavailable(f"{self._peer} does not answer") from None
        if not isinstance(reply, kvtransfer_pb2.PublishReply):
            raise Unavailable(f"{self._peer} ended the stream without a reason")
        return reply


async def write_or_let_read_tell(call: grpc.aio.StreamStreamCall[Any, Any], message: Any, peer: str) -> None:
    """Write to a stream; one that has ended is no error here: read() tells why it has.

    Raises Unavailable if the peer ends it at this very moment: gRPC calls that INTERNAL, and read() would, too.
    """
    try:
        with suppress(asyncio.InvalidStateError):
            await call.write(message)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INTERNAL:
            raise Unavailable(f"{peer} has ended the stream") from error
        raise
