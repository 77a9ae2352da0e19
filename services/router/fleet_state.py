"""The fleet as somebody who looks at it wants it told: workers, agents, what they hold and how fast they are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from services.pb import kvtransfer_pb2
from services.router.connection import WorkerConnection
from services.router.fleet import Fleet


async def describe_fleet(fleet: Fleet) -> Mapping[str, Any]:
    """As JSON. Asks the agents for their slots; workers have told of themselves already."""
    now = asyncio.get_running_loop().time()
    addresses = fleet.agents.addresses
    audits = await asyncio.gather(*map(fleet.agents.audit, addresses))
    return {
        "workers": [_worker(worker, fleet.index.num_blocks(worker.address), now) for worker in fleet.workers],
        "agents": [
            _agent(address, audit, fleet.agents.num_known_blocks(address))
            for address, audit in zip(addresses, audits, strict=True)
        ],
    }


def _worker(worker: WorkerConnection, num_known_blocks: int, now: float) -> Mapping[str, Any]:
    """What is null or 0: not known, or not measured yet.

    state: ready, lost, leaving, draining, stuck or tripped (its circuit breaker is open)
    num_free_blocks: free or evictable; num_named_blocks: that can be found by name, so far as this router knows
    """
    report, info = worker.load.report, worker.info
    return {
        "id": worker.address if info is None else info.worker_id,
        "role": worker.kind.name,
        "address": worker.address,
        "state": worker.condition(now),
        "complaint": worker.complaint,
        "incarnation": None if info is None else info.incarnation,
        "model": None if info is None else info.model,
        "agent": None if info is None else info.agent_address or None,
        "max_num_seqs": 0 if info is None else info.max_num_seqs,
        "max_model_len": 0 if info is None else info.max_model_len,
        "block_size": 0 if info is None else info.block_size,
        "block_bytes": 0 if info is None else info.block_bytes,
        "num_blocks": 0 if info is None else info.num_blocks,
        "num_free_blocks": report.num_free_blocks,
        "num_named_blocks": num_known_blocks,
        "num_requests": worker.num_requests,
        "num_running": report.num_running,
        "num_waiting": report.num_waiting,
        "num_waiting_tokens": report.num_waiting_tokens,
        "prefill_tokens_per_second": round(report.prefill_tokens_per_second, 1),
        "step_ms": round(1e3 * report.step_seconds, 3),
        "step_age_seconds": round(report.step_age_seconds, 3),
        "transfer_bytes_per_second": round(report.transfer_bytes_per_second),
    }


def _agent(address: str, audit: kvtransfer_pb2.AuditReply | None, num_known_blocks: int) -> Mapping[str, Any]:
    """state: serving, or lost if it does not answer; then its slots are null.

    num_sealed: pinned ones included. num_blocks_sealed, num_blocks_fetched: since its start
    """
    if audit is None:
        return {"address": address, "state": "lost", "num_known_blocks": num_known_blocks, "slots": None}
    return {
        "address": address,
        "state": "serving",
        "num_known_blocks": num_known_blocks,
        "slots": {
            "num_slots": audit.num_slots,
            "num_free": audit.num_free,
            "num_granted": audit.num_granted,
            "num_sealed": audit.num_sealed,
            "num_pinned": audit.num_pinned,
            "slot_bytes": audit.slot_bytes,
        },
        "num_writers": audit.num_leases,
        "num_readers": audit.num_fetches,
        "num_blocks_sealed": audit.num_blocks_sealed,
        "num_blocks_fetched": audit.num_blocks_fetched,
    }
