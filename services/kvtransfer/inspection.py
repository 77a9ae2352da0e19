"""What an agent holds, for people who look: figures, names, and forgetting."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import islice

from relevo.core.errors import InvalidRequest
from services.kvtransfer.store import Store
from services.kvtransfer.tiers import Tier
from services.pb import kvtransfer_pb2

ARENA = "arena"
_MAX_LISTED = 8192  # in one message: 400 KB


def tier_states(store: Store, tiers: Sequence[Tier]) -> list[kvtransfer_pb2.TierState]:
    """The arena's, then those of the tiers below it."""
    audit = store.table.audit()
    arena = kvtransfer_pb2.TierState(
        tier=ARENA,
        place=str(store.arena.path),
        num_blocks=audit.num_sealed,
        num_bytes=audit.num_sealed * store.arena.block_bytes,
        max_bytes=store.arena.num_bytes,
        num_hits=store.counters.arena_hits,
        num_stored=store.counters.sealed_blocks,
        num_evicted=store.num_evictions,
        num_damaged=store.counters.corrupt_blocks,
        num_in_use=audit.num_granted + audit.num_pinned,
    )
    return [arena, *map(_tier_state, tiers)]


def _tier_state(tier: Tier) -> kvtransfer_pb2.TierState:
    counters = tier.counters
    return kvtransfer_pb2.TierState(
        tier=tier.name,
        place=tier.place,
        num_blocks=tier.num_blocks,
        num_bytes=tier.num_bytes,
        max_bytes=tier.max_bytes,
        num_hits=counters.hits,
        num_stored=counters.stored,
        num_evicted=counters.evicted,
        num_damaged=counters.damaged,
        num_dropped=counters.dropped,
        trouble=tier.reading.trouble or tier.writing.trouble,
    )


async def list_blocks(
    store: Store, tiers: Sequence[Tier], wanted: str, limit: int
) -> AsyncIterator[kvtransfer_pb2.ListBlocksReply]:
    """wanted: a tier's name, "" = all. At least one part a tier. Raises InvalidRequest for a tier that is not there."""
    _check_tier(tiers, wanted)
    if wanted in ("", ARENA):
        held = [
            kvtransfer_pb2.HeldBlock(
                name=block.name, num_bytes=store.arena.block_bytes, num_pins=block.num_pins, granted=block.is_granted
            )
            for block in islice(store.table.blocks(), limit)
        ]
        for part in _parts(ARENA, held):
            yield part
    for tier in tiers:
        if wanted in ("", tier.name):
            below = await tier.list_blocks(limit)
            for part in _parts(
                tier.name, [kvtransfer_pb2.HeldBlock(name=name, num_bytes=size) for name, size in below]
            ):
                yield part


async def clear_blocks(store: Store, tiers: Sequence[Tier], wanted: str) -> list[kvtransfer_pb2.ClearedTier]:
    """Forget all of a tier's blocks, "" = of all tiers; in the arena, those that nobody writes or reads."""
    _check_tier(tiers, wanted)
    cleared = []
    if wanted in ("", ARENA):
        num_blocks, num_kept = store.table.clear()
        cleared.append(kvtransfer_pb2.ClearedTier(tier=ARENA, num_blocks=num_blocks, num_kept=num_kept))
    below = [tier for tier in tiers if wanted in ("", tier.name)]
    cleared += [kvtransfer_pb2.ClearedTier(tier=tier.name, num_blocks=await tier.clear()) for tier in below]
    return cleared


def _check_tier(tiers: Sequence[Tier], wanted: str) -> None:
    names = [ARENA, *(tier.name for tier in tiers)]
    if wanted and wanted not in names:
        raise InvalidRequest(f"this agent has no tier {wanted[:40]!r}: it has {', '.join(names)}", "tier")


def _parts(tier: str, blocks: Sequence[kvtransfer_pb2.HeldBlock]) -> list[kvtransfer_pb2.ListBlocksReply]:
    return [
        kvtransfer_pb2.ListBlocksReply(tier=tier, blocks=blocks[start : start + _MAX_LISTED])
        for start in range(0, max(1, len(blocks)), _MAX_LISTED)
    ]
