"""Beams change places: one becomes what another was. Full blocks are shared, a partial one is copied or taken over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from relevo.core.request import Request, RequestStatus
from relevo.core.scheduler import Scheduler


def reorder(
    scheduler: Scheduler, beams: Sequence[Request], parents: Sequence[int], token_ids: Sequence[int]
) -> list[tuple[int, int]]:
    """beams[i] becomes what beams[parents[i]] was, with token_ids[i] behind it; all of them are parked, and go on now.

    There may be more beams than parents: those are left without blocks, for the caller to end.

    Returns what is to be copied before the next step: (from, to) block ids, of each beam one at most. The first that
    follows a parent takes its partial block over. Who finds no free block for its copy computes again, as if preempted.
    """
    assert len(parents) == len(token_ids) <= len(beams)
    pool, block_size = scheduler.pool, scheduler.config.block_size
    before = [replace(beam) for beam in beams]
    followed: set[int] = set()
    copies: list[tuple[int, int]] = []
    for beam, parent, token_id in zip(beams, parents, token_ids, strict=False):
        old = before[parent]
        beam.copy_tokens(old, token_id)
        beam.is_parked = False
        beam.block_ids, beam.num_computed_tokens, beam.num_named_blocks = [], 0, 0
        has_place = beam.status is RequestStatus.RUNNING or scheduler.has_place
        if old.status is RequestStatus.RUNNING and has_place:
            num_full, num_rest = divmod(old.num_computed_tokens, block_size)
            shared = old.block_ids[: num_full if parent in followed else None]
            fresh = pool.allocate(1) if num_rest and parent in followed else []
            if fresh is not None:
                copies += [(old.block_ids[num_full], block_id) for block_id in fresh]
                pool.share(shared)
                beam.block_ids = shared + fresh
                beam.num_computed_tokens = old.num_computed_tokens
                beam.num_named_blocks = old.num_named_blocks
                followed.add(parent)
        scheduler.place(beam)
    for beam in beams[len(parents) :]:
        beam.block_ids, beam.num_computed_tokens, beam.num_named_blocks = [], 0, 0
        scheduler.place(beam)
    for old in before:
        pool.free(old.block_ids)
    return copies
