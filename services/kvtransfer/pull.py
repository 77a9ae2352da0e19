"""Pulling blocks from another agent: towards this agent's readers, a pull is a writer like any other.

It has a lease on the blocks that are not here, is itself a reader at the other agent, receives what it is shown there
straight into its granted slots, and seals what matches the writer's checksum.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

import grpc
import grpc.aio

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Mismatch, RelevoError, Unavailable
from services.common.errors import error_from_rpc
from services.common.grpc import cancelling
from services.common.telemetry import trace_metadata
from services.kvtransfer.links import Link, Links
from services.kvtransfer.slots import Announcement
from services.kvtransfer.store import Store
from services.kvtransfer.transports import Outcome, WantedBlock
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc

logger = logging.getLogger(__name__)

_UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]
_ABORTED: int = grpc.StatusCode.ABORTED.value[0]
_DATA_LOSS: int = grpc.StatusCode.DATA_LOSS.value[0]
_FIRST_REPLY_SECONDS = 3.0  # it comes at once; a source that takes longer hangs
_GRACE_SECONDS = 2.0  # beyond the reader's time, for the source's last answers

_FetchCall = grpc.aio.StreamStreamCall[kvtransfer_pb2.FetchRequest, kvtransfer_pb2.FetchReply]


async def pull_blocks(
    store: Store,
    links: Links,
    lease_id: int,
    announcement: Announcement,
    names: Sequence[BlockHash],
    source_agent_address: str,
    timeout_seconds: float,
) -> None:
    """Fill and seal the lease's granted slots; names are those announced. Ends the lease, always.

    What cannot be had is abandoned with the source's code, DATA_LOSS if what came was damaged, or UNAVAILABLE if the
    source cannot be reached. When this returns, or is cancelled, nobody writes into the slots any more.
    """
    code = _ABORTED  # for what is outstanding if this is cancelled: its reader left
    wanted = list(announcement.granted)
    pull = _Pull(store, links, lease_id, wanted, [announcement.granted[index] for index in wanted])
    try:
        async with links.to(source_agent_address) as link:
            await pull.run(link, [names[index] for index in wanted], timeout_seconds)
        code = _UNAVAILABLE
    except RelevoError as error:
        code = _UNAVAILABLE
        logger.warning("pull from %s failed: %s", source_agent_address, error)
    finally:
        num_given_up = store.end_lease(lease_id, code)
        if code == _UNAVAILABLE and num_given_up:
            links.counters.count_failed("broken", num_given_up)
        if pull.num_bytes:
            logger.debug(
                "%d bytes from %s, %.2f GB/s", pull.num_bytes, source_agent_address, pull.num_bytes / pull.seconds / 1e9
            )


class _Pull:
    """One stream at the source. Its indices count the wanted blocks only."""

    def __init__(self, store: Store, links: Links, lease_id: int, lease_indices: list[int], slots: list[int]) -> None:
        self.num_bytes = 0
        self.seconds = 0.0  # spent receiving
        self._store = store
        self._links = links
        self._lease_id = lease_id
        self._lease_indices = lease_indices
        self._slots = slots
        self._num_outstanding = len(slots)

    async def run(self, link: Link, names: list[BlockHash], timeout_seconds: float) -> None:
        stub = kvtransfer_pb2_grpc.KvTransferStub(link.channel)
        open_fetch = kvtransfer_pb2.OpenFetch(block_hashes=names, timeout_ms=max(1, int(timeout_seconds * 1000)))
        try:
            with cancelling(stub.Fetch(timeout=timeout_seconds + _GRACE_SECONDS, metadata=trace_metadata())) as call:
                with suppress(asyncio.InvalidStateError):  # it has failed already: read() tells why
                    await call.write(kvtransfer_pb2.FetchRequest(open=open_fetch))
                await self._answer_all(call, link)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def _answer_all(self, call: _FetchCall, link: Link) -> None:
        try:
            async with asyncio.timeout(_FIRST_REPLY_SECONDS):
                reply = await call.read()
        except TimeoutError:
            raise Unavailable(f"no answer within {_FIRST_REPLY_SECONDS:g} s") from None
        token = b""
        if isinstance(reply, kvtransfer_pb2.FetchReply):
            token = reply.pull_token
            if reply.block_bytes != self._store.arena.block_bytes:
                raise Mismatch(
                    f"its blocks have {reply.block_bytes} bytes, ours {self._store.arena.block_bytes}:"
                    " both agents' workers must have the same model and block size"
                )
        while isinstance(reply, kvtransfer_pb2.FetchReply):
            for missing in reply.missing:
                self._store.abandon(self._lease_id, self._lease_indices[missing.index], missing.code)
            if reply.blocks:
                release = await self._receive(link, token, reply.blocks)
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # read() says it better
                    await call.write(kvtransfer_pb2.FetchRequest(release=release))
            self._num_outstanding -= len(reply.missing) + len(reply.blocks)
            if not self._num_outstanding:
                return
            reply = await call.read()
        raise Unavailable(f"the stream ended with {self._num_outstanding} blocks unanswered")

    async def _receive(
        self, link: Link, token: bytes, blocks: Sequence[kvtransfer_pb2.BlockRef]
    ) -> kvtransfer_pb2.ReleaseBlocks:
        """Returns what to tell the source: it drops what came damaged, or the next one who asks would get it, too."""
        arena, lease_id, counters = self._store.arena, self._lease_id, self._links.counters
        corrupt: list[int] = []
        start = time.monotonic()

        def answered(number: int, outcome: Outcome) -> None:
            block = blocks[number]
            index = self._lease_indices[block.index]
            if outcome is Outcome.ARRIVED:
                self._store.seal(lease_id, index, block.checksum)
                self.num_bytes += arena.block_bytes
                counters.count_block(link.puller.name, arena.block_bytes, time.monotonic() - start)
                return
            counters.count_failed(outcome.value, 1)
            if outcome is Outcome.CORRUPT:
                logger.warning("a block from %s is damaged: dropped", link.address)
                self._store.counters.corrupt_blocks += 1
                corrupt.append(block.index)
                self._store.abandon(lease_id, index, _DATA_LOSS)
            else:
                self._store.abandon(lease_id, index, _UNAVAILABLE)

        wanted = [WantedBlock(block.slot, arena.block(self._slots[block.index]), block.checksum) for block in blocks]
        try:
            await link.puller.pull(token, wanted, answered)
        except Unavailable:
            self._links.broke(link)
            raise
        finally:
            seconds = time.monotonic() - start
            self.seconds += seconds
            counters.count_batch(link.puller.name, seconds)
        indices = [block.index for block in blocks if block.index not in corrupt]
        return kvtransfer_pb2.ReleaseBlocks(indices=indices, corrupt=corrupt)
