"""Pulling blocks from another agent: towards this agent's readers, a pull is a writer like any other.

It has a lease on the blocks that are not here, is itself a reader at the other agent, receives what it is shown there
straight into its granted slots, and seals it under the writer's checksum. Readers find out what is wrong with it, if
anything is.
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
from services.common.grpc import cancelling, make_channel
from services.kvtransfer.slots import Announcement
from services.kvtransfer.store import Store
from services.kvtransfer.transports.tcp import TcpDataConnection
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc

logger = logging.getLogger(__name__)

_UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]
_ABORTED: int = grpc.StatusCode.ABORTED.value[0]
_FIRST_REPLY_SECONDS = 3.0  # it comes at once; a source that takes longer hangs
_GRACE_SECONDS = 2.0  # beyond the reader's time, for the source's last answers

_FetchCall = grpc.aio.StreamStreamCall[kvtransfer_pb2.FetchRequest, kvtransfer_pb2.FetchReply]


async def pull_blocks(
    store: Store,
    lease_id: int,
    announcement: Announcement,
    names: Sequence[BlockHash],
    source_agent_address: str,
    timeout_seconds: float,
) -> None:
    """Fill and seal the lease's granted slots; names are those announced. Ends the lease, always.

    What cannot be had is abandoned with the source's code, or UNAVAILABLE if the source cannot be reached.
    """
    code = _ABORTED  # for what is outstanding if this is cancelled: its reader left
    wanted = list(announcement.granted)
    pull = _Pull(store, lease_id, wanted, [announcement.granted[index] for index in wanted])
    try:
        async with make_channel(source_agent_address) as channel:
            await pull.run(channel, [names[index] for index in wanted], timeout_seconds)
        code = _UNAVAILABLE
    except RelevoError as error:
        code = _UNAVAILABLE
        logger.warning("pull from %s failed: %s", source_agent_address, error)
    finally:
        store.end_lease(lease_id, code)
        if pull.num_bytes:
            store.counters.pull_seconds += pull.seconds
            logger.debug(
                "%d bytes from %s, %.2f GB/s", pull.num_bytes, source_agent_address, pull.num_bytes / pull.seconds / 1e9
            )


class _Pull:
    """One stream at the source. Its indices count the wanted blocks only."""

    def __init__(self, store: Store, lease_id: int, lease_indices: list[int], slots: list[int]) -> None:
        self.num_bytes = 0
        self.seconds = 0.0  # spent receiving
        self._store = store
        self._lease_id = lease_id
        self._lease_indices = lease_indices
        self._slots = slots
        self._num_outstanding = len(slots)
        self._data: TcpDataConnection | None = None

    async def run(self, channel: grpc.aio.Channel, names: list[BlockHash], timeout_seconds: float) -> None:
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        open_fetch = kvtransfer_pb2.OpenFetch(block_hashes=names, timeout_ms=max(1, int(timeout_seconds * 1000)))
        try:
            with cancelling(stub.Fetch(timeout=timeout_seconds + _GRACE_SECONDS)) as call:
                with suppress(asyncio.InvalidStateError):  # it has failed already: read() tells why
                    await call.write(kvtransfer_pb2.FetchRequest(open=open_fetch))
                await self._answer_all(call)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            if self._data is not None:
                self._data.close()

    async def _answer_all(self, call: _FetchCall) -> None:
        try:
            async with asyncio.timeout(_FIRST_REPLY_SECONDS):
                reply = await call.read()
        except TimeoutError:
            raise Unavailable(f"no answer within {_FIRST_REPLY_SECONDS:g} s") from None
        if isinstance(reply, kvtransfer_pb2.FetchReply) and reply.slot_bytes != self._store.arena.slot_bytes:
            raise Mismatch(
                f"its slots have {reply.slot_bytes} bytes, ours {self._store.arena.slot_bytes}:"
                " both agents' workers must have the same model and block size"
            )
        token, address = b"", ""
        while isinstance(reply, kvtransfer_pb2.FetchReply):
            token, address = reply.pull_token or token, reply.data_address or address
            for missing in reply.missing:
                self._store.abandon(self._lease_id, self._lease_indices[missing.index], missing.code)
            if reply.blocks:
                if self._data is None:
                    self._data = await TcpDataConnection.open(address, token)
                await self._receive(self._data, reply.blocks)
                release = kvtransfer_pb2.ReleaseBlocks(indices=[block.index for block in reply.blocks])
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # read() says it better
                    await call.write(kvtransfer_pb2.FetchRequest(release=release))
            self._num_outstanding -= len(reply.missing) + len(reply.blocks)
            if not self._num_outstanding:
                return
            reply = await call.read()
        raise Unavailable(f"the stream ended with {self._num_outstanding} blocks unanswered")

    async def _receive(self, data: TcpDataConnection, blocks: Sequence[kvtransfer_pb2.BlockRef]) -> None:
        start = time.monotonic()
        await data.request([block.slot for block in blocks])
        for block in blocks:
            into = self._store.arena.slot(self._slots[block.index])
            if await data.receive(into):
                self._store.seal(self._lease_id, self._lease_indices[block.index], block.checksum)
                self.num_bytes += len(into)
                self._store.counters.pulled_bytes += len(into)
            else:
                self._store.abandon(self._lease_id, self._lease_indices[block.index], _UNAVAILABLE)
        self.seconds += time.monotonic() - start
