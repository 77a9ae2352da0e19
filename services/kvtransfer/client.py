"""What workers use: attach to the host's agent, publish blocks, fetch blocks.

    client = KvAgentClient("127.0.0.1:50051", worker_id="prefill-0", incarnation="…")
    await client.attach(fingerprint, block_bytes)

    async with client.publish(hashes, lease_ms=10_000) as publication:      # Exhausted: nothing is held
        for index in publication.granted:
            checksum = await asyncio.to_thread(write_block, publication.slot(index), source)
            await publication.seal([(index, checksum)])

    async with client.fetch(hashes, source_agent_address, timeout_seconds=5.0) as fetch:
        async for batch in fetch:
            for block in batch.arrived:
                good = await asyncio.to_thread(read_block, fetch.slot(block), into, block.checksum)
                await fetch.release([block.index] if good else [], corrupt=[] if good else [block.index])

An agent that was started again is attached to anew, by the next publish or fetch. One that is gone, or does not
answer, is Unavailable within seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc.aio

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Mismatch, Unavailable
from services.common.errors import error_from_rpc, relevo_errors
from services.common.grpc import cancelling, make_channel
from services.common.security import NO_SECURITY, Security
from services.common.telemetry import trace_metadata
from services.kvtransfer.block_fetch import BlockFetch
from services.kvtransfer.direct_places import DirectPlace
from services.kvtransfer.mapping import (
    ArenaMapping,
    load_checked_copy,
    map_arena,
    read_block,
    read_blocks,
    write_block,
    write_blocks,
)
from services.kvtransfer.publication import REPLY_SECONDS, Publication
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc

__all__ = [
    "ArenaMapping",
    "BlockFetch",
    "DirectPlace",
    "KvAgentClient",
    "Publication",
    "read_block",
    "read_blocks",
    "write_block",
    "write_blocks",
]

logger = logging.getLogger(__name__)


class KvAgentClient:
    """One worker at its host's agent. Any number of publications and fetches at the same time, in one event loop.

    on_mapped: told each arena that is mapped, in a thread
    direct_memory: our own cache, announced with what is published if set; offers go without
    """

    def __init__(
        self,
        address: str,
        worker_id: str,
        incarnation: str,
        security: Security = NO_SECURITY,
        on_mapped: Callable[[memoryview], None] | None = None,
    ) -> None:
        self.address = address
        self.direct_memory: kvtransfer_pb2.DirectMemory | None = None
        self._on_mapped = on_mapped
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._channel = make_channel(address, security)
        self._stub = kvtransfer_pb2_grpc.KvTransferStub(self._channel)
        self._layout: tuple[bytes, int] | None = None  # fingerprint, block_bytes
        self._mapping: ArenaMapping | None = None
        self._attaching = asyncio.Lock()

    async def close(self) -> None:
        await self._channel.close()

    async def attach(self, fingerprint: bytes, block_bytes: int) -> ArenaMapping:
        """Map the arena. After an Unavailable the next publish or fetch tries again; Mismatch is final."""
        self._layout = (fingerprint, block_bytes)
        return await self._attach(None)

    @asynccontextmanager
    async def publish(
        self,
        hashes: Sequence[BlockHash],
        lease_ms: int = 30_000,
        *,
        source_agent_address: str = "",
        num_blocks_at_source: int = 0,
        is_offer: bool = False,
    ) -> AsyncIterator[Publication]:
        """Announce blocks and hold their slots. Leaving the block gives up what is not sealed.

        source_agent_address: another agent, which has the first num_blocks_at_source of them: they come from there
        is_offer: nobody waits for them: what has no room is not granted

        Raises Exhausted if there is no room, Unavailable, Mismatch.
        """
        mapping = await self._attach(None)
        for last_try in (False, True):
            announce = kvtransfer_pb2.Announce(
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                block_hashes=hashes,
                lease_ms=lease_ms,
                agent_incarnation=mapping.incarnation,
                source_agent_address=source_agent_address,
                num_blocks_at_source=num_blocks_at_source,
                is_offer=is_offer,
                direct_memory=None if is_offer else self.direct_memory,
            )
            with cancelling(self._stub.Publish(metadata=trace_metadata())) as call:
                publication = Publication(call, mapping, self.address)
                try:
                    await publication.open(announce)
                except Mismatch:
                    if last_try:
                        raise
                    mapping = await self._attach(mapping)
                    continue
                yield publication
                await publication.finish()
                return

    @asynccontextmanager
    async def fetch(
        self,
        hashes: Sequence[BlockHash],
        source_agent_address: str = "",
        *,
        timeout_seconds: float,
        direct: bool = False,
    ) -> AsyncIterator[BlockFetch]:
        """Ask for blocks; iterate over what comes. Leaving the block unpins them.

        source_agent_address: where they are announced; "": at this agent. direct: tell where writers have them, too.
        Raises Unavailable, Mismatch.
        """
        mapping = await self._attach(None)
        for last_try in (False, True):
            opened = kvtransfer_pb2.OpenFetch(
                block_hashes=hashes,
                source_agent_address=source_agent_address,
                timeout_ms=max(1, int(timeout_seconds * 1000)),
                agent_incarnation=mapping.incarnation,
                direct=direct,
            )
            with cancelling(self._stub.Fetch(metadata=trace_metadata())) as call:
                fetch = BlockFetch(call, mapping, self.address, len(hashes), timeout_seconds)
                try:
                    await fetch.open(opened)
                except Mismatch:
                    if last_try:
                        raise
                    mapping = await self._attach(mapping)
                    continue
                yield fetch
                return

    async def audit(self) -> kvtransfer_pb2.AuditReply:
        """Counts of the agent's slots by state."""
        with relevo_errors(f"kvtransfer agent {self.address}"):
            return await self._stub.Audit(kvtransfer_pb2.AuditRequest(), timeout=REPLY_SECONDS)

    async def _attach(self, stale: ArenaMapping | None) -> ArenaMapping:
        """The mapping, which is made if there is none or it is the stale one."""
        if self._layout is None:
            raise Mismatch("attach() must come before publish() and fetch(): it tells the blocks' size")
        async with self._attaching:
            if self._mapping is None or self._mapping is stale:
                self._mapping = None
                self._mapping = await self._request_mapping(*self._layout)
            return self._mapping

    async def _request_mapping(self, fingerprint: bytes, block_bytes: int) -> ArenaMapping:
        request = kvtransfer_pb2.AttachRequest(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            layout_fingerprint=fingerprint,
            block_bytes=block_bytes,
        )
        try:
            reply = await self._stub.Attach(request, timeout=REPLY_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(f"kvtransfer agent {self.address} does not answer") from error
            raise error_from_rpc(error, f"kvtransfer agent {self.address}") from error
        logger.info(
            "attached to kvtransfer agent %s: %d slots of %d bytes", self.address, reply.num_slots, reply.slot_bytes
        )
        view = map_arena(reply.arena_path, reply.num_slots * reply.slot_bytes)
        # Beside what the worker does: blocks can be copied meanwhile, only slower.
        threading.Thread(target=self._prepare, args=(view,), name="arena", daemon=True).start()
        return ArenaMapping(
            incarnation=reply.incarnation,
            block_bytes=block_bytes,
            slot_bytes=reply.slot_bytes,
            num_slots=reply.num_slots,
            agent_address=reply.advertised_address,
            view=view,
        )

    def _prepare(self, view: memoryview) -> None:
        load_checked_copy()
        if self._on_mapped is not None:
            self._on_mapped(view)
