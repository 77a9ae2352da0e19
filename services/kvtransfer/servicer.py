"""The agent's gRPC face; the contract is in protos/services/pb/kvtransfer.proto."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from relevo.core.errors import InvalidRequest
from services.common.telemetry import enter_callers_trace
from services.kvtransfer import inspection
from services.kvtransfer.fetch_session import FetchContext, FetchSession, read_open_fetch
from services.kvtransfer.links import Links
from services.kvtransfer.publish_session import PublishContext, serve_publish
from services.kvtransfer.reader import Reader
from services.kvtransfer.store import Store
from services.kvtransfer.tiers.cascade import Tiers
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc, worker_pb2

logger = logging.getLogger(__name__)


class PullTokens:
    """The readers' streams that are open, by their token: what data ports may show. Asked from any thread."""

    def __init__(self) -> None:
        self.readers: dict[bytes, Reader] = {}

    def has_pinned_slot(self, token: bytes, slot: int) -> bool:
        reader = self.readers.get(token)
        return reader is not None and reader.has_pinned_slot(slot)


class KvTransferServicer(kvtransfer_pb2_grpc.KvTransferServicer):
    """address: under which other agents and workers reach this one. pin_seconds: how long a silent reader may pin."""

    def __init__(
        self,
        store: Store,
        tiers: Tiers,
        tokens: PullTokens,
        links: Links,
        *,
        address: str,
        pin_seconds: float,
    ) -> None:
        self._store = store
        self._tiers = tiers
        self._tokens = tokens
        self._links = links
        self._address = address
        self._pin_seconds = pin_seconds

    async def Attach(
        self, request: kvtransfer_pb2.AttachRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvtransfer_pb2.AttachReply:
        if request.block_bytes < 1:
            raise InvalidRequest("block_bytes is 0: at least 1 is right", "block_bytes")
        arena = self._store.arena
        if request.block_bytes != arena.block_bytes:
            async with self._tiers.paused():
                self._store.cut(request.block_bytes)
        logger.info(
            "%s (%s) attached with blocks of %d bytes", request.worker_id, request.incarnation, request.block_bytes
        )
        return kvtransfer_pb2.AttachReply(
            agent_id=self._address,
            incarnation=self._store.incarnation,
            arena_path=str(arena.path),
            slot_bytes=arena.slot_bytes,
            num_slots=arena.num_slots,
            advertised_address=self._address,
        )

    async def Publish(self, request_iterator: Any, context: PublishContext) -> None:  # type: ignore[override]
        # grpc.aio allows handlers that read and write through the context: their `finally` runs at once when a call is
        # cancelled, a suspended generator's only when it is collected.
        enter_callers_trace(context.invocation_metadata())
        await serve_publish(self._store, self._tiers, self._links, context)

    async def Fetch(self, request_iterator: Any, context: FetchContext) -> None:  # type: ignore[override]
        enter_callers_trace(context.invocation_metadata())
        opened = await read_open_fetch(context)
        if opened is None:
            return
        self._store.require_cut(opened.agent_incarnation)
        source = "" if opened.source_agent_address == self._address else opened.source_agent_address
        reader = Reader(self._store, list(opened.block_hashes))
        self._tokens.readers[reader.token] = reader
        try:
            session = FetchSession(self._store, self._tiers, reader, context, self._links, self._pin_seconds)
            await session.run(opened, source)
        finally:
            del self._tokens.readers[reader.token]
            reader.close()

    async def Audit(
        self, request: kvtransfer_pb2.AuditRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvtransfer_pb2.AuditReply:
        audit = self._store.table.audit()
        return kvtransfer_pb2.AuditReply(
            num_slots=audit.num_slots,
            num_free=audit.num_free,
            num_granted=audit.num_granted,
            num_sealed=audit.num_sealed,
            num_pinned=audit.num_pinned,
            num_leases=audit.num_leases,
            num_fetches=audit.num_readers,
            slot_bytes=self._store.arena.slot_bytes,
            num_blocks_sealed=self._store.counters.sealed_blocks,
            num_blocks_fetched=self._store.counters.fetched_blocks,
        )

    async def WatchBlocks(
        self, request: worker_pb2.WatchBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.BlockEvents]:
        async with aclosing(self._store.held.events.watch()) as events:
            async for event in events:
                yield event

    async def GetTiers(
        self, request: kvtransfer_pb2.GetTiersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvtransfer_pb2.GetTiersReply:
        return kvtransfer_pb2.GetTiersReply(tiers=inspection.tier_states(self._store, self._tiers.tiers))

    async def ListBlocks(
        self, request: kvtransfer_pb2.ListBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kvtransfer_pb2.ListBlocksReply]:
        async for part in inspection.list_blocks(self._store, self._tiers.tiers, request.tier, request.limit):
            yield part

    async def ClearBlocks(
        self, request: kvtransfer_pb2.ClearBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvtransfer_pb2.ClearBlocksReply:
        cleared = await inspection.clear_blocks(self._store, self._tiers.tiers, request.tier)
        return kvtransfer_pb2.ClearBlocksReply(tiers=cleared)
