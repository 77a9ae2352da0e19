"""What a second router process on the same port costs: part of `relevo bench router`.

Two cores cannot hold two routers, their workers and the client that loads them, so that requests a second would say
how the cores are shared. What can be measured is whether a request costs the routers more CPU when there are two of
them. Nothing is shared between them but the port and the workers: with the same cost two serve twice as many.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from relevo.bench.http_load import closed_loop
from relevo.bench.kv_processes import cpu_seconds
from relevo.bench.router_processes import BenchWorker, completion_requests, start_router

NUM_PROCESSES = 2


@dataclass(frozen=True, kw_only=True)
class ScalingCase:
    """shares: of the requests' CPU time, by process. capacity_ratio: of NUM_PROCESSES routers to one."""

    cpu_ms_per_request: float
    shares: list[float]
    capacity_ratio: float


async def measure_scaling(
    workers: Sequence[BenchWorker], texts: Sequence[str], num_clients: int, seconds: float, alone_cpu_ms: float
) -> ScalingCase:
    """alone_cpu_ms: a request's, with one router. Raises RelevoError if a request fails."""
    cores = sorted({min(os.sched_getaffinity(0)), *range(os.cpu_count() or 1)})[:NUM_PROCESSES]
    with ExitStack() as stack, socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        addresses = [worker.address for worker in workers]
        flags = ["--http-port", str(port), "--http-shared"]
        pids = [start_router(stack, addresses, core, flags)[0] for core in cores]
        for worker in workers:
            worker.set_rate(math.inf)
        requests = completion_requests(texts, port, stream=False, max_tokens=16)
        await closed_loop("127.0.0.1", port, requests, num_clients, 1.0)  # warm
        before = [cpu_seconds(pid) for pid in pids]
        load = await closed_loop("127.0.0.1", port, requests, num_clients, seconds)
        spent = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    cpu_ms = 1e3 * sum(spent) / load.num_requests
    return ScalingCase(
        cpu_ms_per_request=cpu_ms,
        shares=[each / sum(spent) for each in spent],
        capacity_ratio=len(pids) * alone_cpu_ms / cpu_ms,
    )
