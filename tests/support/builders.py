"""Builders for unit tests. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from relevo.core.block_hash import root_hash
from relevo.core.block_pool import BlockPool
from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import SchedulerConfig
from relevo.core.scheduler import Scheduler

FINGERPRINT = bytes(range(32))


def make_request(
    request_id: str = "r",
    tokens: Sequence[int] = (1, 2, 3),
    *,
    max_tokens: int = 4,
    block_size: int = 4,
    stop_token_ids: Sequence[int] = (),
    await_kv: bool = False,
    hold_blocks: bool = False,
    cache_salt: str = "",
    priority: int = 0,
) -> Request:
    return Request(
        request_id=request_id,
        token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop_token_ids),
        root_hash=root_hash(FINGERPRINT, cache_salt=cache_salt),
        block_size=block_size,
        await_kv=await_kv,
        hold_blocks=hold_blocks,
        priority=priority,
    )


def make_scheduler(
    num_blocks: int = 16, *, block_size: int = 4, max_num_seqs: int = 4, max_num_batched_tokens: int = 16
) -> Scheduler:
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, block_size, output_allowance_tokens=block_size)
    return Scheduler(config, BlockPool(num_blocks))
