"""One writer's stream: Announce, Granted, then Seal and SealAck until it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from relevo.core.block_hash import HASH_BYTES, BlockHash
from relevo.core.errors import DeadlineExceeded, Exhausted, InvalidRequest
from services.kvtransfer.direct_places import DirectPlace
from services.kvtransfer.links import Links
from services.kvtransfer.pull import pull_blocks
from services.kvtransfer.store import Store
from services.kvtransfer.tiers.cascade import Tiers
from services.pb import kvtransfer_pb2

logger = logging.getLogger(__name__)

FIRST_MESSAGE_SECONDS = 10.0
PULL_SECONDS = 30.0  # for what is announced here and lies at another agent
_MAX_LEASE_MS = 3_600_000
_MAX_METADATA_BYTES = 16 << 10
_ABORTED: int = grpc.StatusCode.ABORTED.value[0]

PublishContext = grpc.aio.ServicerContext[kvtransfer_pb2.PublishRequest, kvtransfer_pb2.PublishReply]


async def serve_publish(store: Store, tiers: Tiers, links: Links, context: PublishContext) -> None:
    """What it granted and the writer has not sealed is free again, and missed by those who wait, when this returns."""
    request = await read_within(context, FIRST_MESSAGE_SECONDS, "the first message")
    if request is None:
        return
    announce = _validated(request)
    store.require_cut(announce.agent_incarnation)
    names = list(announce.block_hashes)
    if announce.is_offer:
        await _serve_writer(store, announce, names, (), context)
        return
    store.count_hits(names)
    await tiers.load(names)
    store.require_cut(announce.agent_incarnation)  # that took a while
    async with _pulling(store, links, names[: announce.num_blocks_at_source], announce.source_agent_address) as pulled:
        loading = [index for index, name in enumerate(names) if tiers.is_loading(name) or name in pulled]
        await _serve_writer(store, announce, names, loading, context)


async def _serve_writer(
    store: Store,
    announce: kvtransfer_pb2.Announce,
    names: Sequence[BlockHash],
    loading: Sequence[int],
    context: PublishContext,
) -> None:
    lease_id, announcement = store.announce(names, partial=announce.is_offer)
    try:
        slots = [kvtransfer_pb2.GrantedSlot(index=index, slot=slot) for index, slot in announcement.granted.items()]
        granted = kvtransfer_pb2.Granted(slots=slots, sealed=announcement.sealed, loading=loading)
        await context.write(kvtransfer_pb2.PublishReply(granted=granted))
        while request := await read_within(context, announce.lease_ms / 1000, "a message (lease_ms)"):
            if request.WhichOneof("request") != "seal":
                raise InvalidRequest("only Seal may follow Announce", "request")
            for block in request.seal.blocks:
                has_place = announce.HasField("direct_memory") and block.HasField("block_id")
                place = DirectPlace(announce.direct_memory, block.block_id) if has_place else None
                store.seal(lease_id, block.index, block.checksum, place)
            ack = kvtransfer_pb2.SealAck(num_blocks=len(request.seal.blocks))
            await context.write(kvtransfer_pb2.PublishReply(seal_ack=ack))
    except DeadlineExceeded:
        store.counters.leases_expired += 1
        raise
    finally:
        num_given_up = store.end_lease(lease_id, _ABORTED)
        if num_given_up:
            logger.warning("%s gave up %d of its announced blocks", announce.worker_id, num_given_up)


@asynccontextmanager
async def _pulling(
    store: Store, links: Links, names: Sequence[BlockHash], source_agent_address: str
) -> AsyncIterator[set[BlockHash]]:
    """Of these, what is not here is on its way from the source inside: gives their names. What can't be had is missing
    for those who wait for it; without room nothing is pulled."""
    wanted = [name for name in names if not store.table.is_here(name)]
    if not wanted or source_agent_address in ("", links.address):
        yield set()
        return
    try:
        lease_id, announcement = store.announce(wanted)
    except Exhausted:
        yield set()
        return
    pull = pull_blocks(store, links, lease_id, announcement, wanted, source_agent_address, PULL_SECONDS)
    task = asyncio.create_task(pull, name=f"pull from {source_agent_address}")
    try:
        yield set(wanted)
    finally:
        task.cancel()
        await asyncio.wait((task,))
        store.end_lease(lease_id, _ABORTED)  # if it was cancelled before it began


async def read_within(context: grpc.aio.ServicerContext[Any, Any], seconds: float, what: str) -> Any:
    """The stream's next message, None at its end. Raises DeadlineExceeded; the call cannot be read after that."""
    try:
        async with asyncio.timeout(seconds):
            message = await context.read()
    except TimeoutError:
        raise DeadlineExceeded(f"{what} did not come within {seconds:g} s") from None
    return None if message is grpc.aio.EOF else message


def _validated(request: kvtransfer_pb2.PublishRequest) -> kvtransfer_pb2.Announce:
    if request.WhichOneof("request") != "announce":
        raise InvalidRequest("the first message must be Announce", "request")
    announce = request.announce
    check_names(announce.block_hashes)
    if not 1 <= announce.lease_ms <= _MAX_LEASE_MS:
        raise InvalidRequest(f"lease_ms is {announce.lease_ms}: 1 to {_MAX_LEASE_MS} is right", "lease_ms")
    if len(announce.direct_memory.metadata) > _MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata of more than {_MAX_METADATA_BYTES} bytes", "direct_memory")
    return announce


def check_names(names: Any) -> None:
    """Raises InvalidRequest unless all are block hashes."""
    for name in names:
        if len(name) != HASH_BYTES:
            raise InvalidRequest(f"a block hash has {len(name)} bytes: {HASH_BYTES} is right", "block_hashes")
