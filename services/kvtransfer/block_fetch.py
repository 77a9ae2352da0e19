"""The reader's end of a Fetch stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc.aio

from relevo.core.errors import DeadlineExceeded, Unavailable
from services.common.errors import relevo_errors
from services.kvtransfer.direct_places import DirectPlace, read_place
from services.kvtransfer.mapping import ArenaMapping
from services.kvtransfer.publication import REPLY_SECONDS, write_or_let_read_tell
from services.pb import kvtransfer_pb2

FetchCall = grpc.aio.StreamStreamCall[kvtransfer_pb2.FetchRequest, kvtransfer_pb2.FetchReply]


@dataclass(frozen=True, slots=True)
class ArrivedBlock:
    """Pinned until it is released, or the fetch ends."""

    index: int
    slot: int
    checksum: int
    place: DirectPlace | None = None  # where its writer has it, or had


@dataclass(frozen=True, slots=True)
class MissingBlock:
    index: int
    code: int  # a gRPC status code's number


@dataclass(frozen=True, slots=True)
class FetchBatch:
    arrived: list[ArrivedBlock]
    missing: list[MissingBlock]


class BlockFetch:
    """Iterate over it once: batches, until each block is answered. Raises Unavailable if the agent is gone before."""

    def __init__(
        self, call: FetchCall, mapping: ArenaMapping, peer: str, num_blocks: int, timeout_seconds: float
    ) -> None:
        self.mapping = mapping
        self.link_bytes_per_second = 0.0  # of what comes from another agent, as the last link to it was; 0: from here
        self.transport = "shm"  # how they get to this host's arena; as it is known with the last reply
        self._call = call
        self._peer = f"kvtransfer agent {peer}"
        self._num_outstanding = num_blocks
        self._timeout_seconds = timeout_seconds
        self._deadline = 0.0  # in the loop's time
        self._next: FetchBatch | None = None

    async def open(self, opened: kvtransfer_pb2.OpenFetch) -> None:
        now = asyncio.get_running_loop().time()
        self._deadline = now + REPLY_SECONDS
        try:
            async with asyncio.timeout_at(self._deadline):
                with relevo_errors(self._peer):
                    await write_or_let_read_tell(self._call, kvtransfer_pb2.FetchRequest(open=opened), self._peer)
        except TimeoutError:
            raise Unavailable(f"{self._peer} does not answer") from None
        self._next = await self._read()  # answered at once, also when there is nothing to tell yet
        self._deadline = now + self._timeout_seconds + REPLY_SECONDS

    def slot(self, block: ArrivedBlock) -> memoryview:
        """Where to read a block, for read_block."""
        return self.mapping.slot(block.slot)

    def __aiter__(self) -> BlockFetch:
        return self

    async def __anext__(self) -> FetchBatch:
        while True:
            batch, self._next = self._next, None
            if batch is None:
                if not self._num_outstanding:
                    raise StopAsyncIteration
                batch = await self._read()
            if batch.arrived or batch.missing:
                self._num_outstanding -= len(batch.arrived) + len(batch.missing)
                return batch

    async def release(self, indices: Sequence[int], *, corrupt: Sequence[int] = ()) -> None:
        """Unpin blocks that were copied out; corrupt: those that read_block refused, which the agent is to drop."""
        release = kvtransfer_pb2.ReleaseBlocks(indices=indices, corrupt=corrupt)
        # A stream that has ended has unpinned everything; why it ended is for the iteration to tell.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(REPLY_SECONDS):
                await self._call.write(kvtransfer_pb2.FetchRequest(release=release))

    async def _read(self) -> FetchBatch:
        try:
            async with asyncio.timeout_at(self._deadline):
                with relevo_errors(self._peer):
                    reply = await self._call.read()
        except (TimeoutError, DeadlineExceeded):
            raise Unavailable(f"{self._peer} does not answer") from None
        if not isinstance(reply, kvtransfer_pb2.FetchReply):
            raise Unavailable(f"{self._peer} ended the stream with {self._num_outstanding} blocks unanswered")
        self.transport = reply.transport or self.transport
        self.link_bytes_per_second = reply.link_bytes_per_second or self.link_bytes_per_second
        return FetchBatch(
            [ArrivedBlock(block.index, block.slot, block.checksum, read_place(reply, block)) for block in reply.blocks],
            [MissingBlock(block.index, block.code) for block in reply.missing],
        )
