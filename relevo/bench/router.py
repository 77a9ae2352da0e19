"""What the router costs: `relevo bench router`. Real router processes, workers without a model, a client that counts.

Router processes are pinned to a core; workers and client share another one, which must not be the bottleneck: its share
of time is reported. All figures include tokenizing, hashing, placing and detokenizing. CPU time is the router's alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from relevo.bench.http_load import Load, closed_loop
from relevo.bench.kv_processes import cpu_seconds
from relevo.bench.router_processes import BenchWorker, completion_requests, prompts, start_router
from relevo.bench.router_scaling import ScalingCase, measure_scaling

NUM_PROMPTS = 64


@dataclass(frozen=True, kw_only=True)
class RouterBenchConfig:
    """rates: tokens a second that workers give, over all streams; 0: as many as are taken."""

    num_workers: int = 2
    input_len: int = 256
    rates: Sequence[int] = (13_000, 40_000, 0)
    num_streams: int = 64
    num_clients: int = 32
    seconds: float = 5.0


@dataclass(frozen=True, kw_only=True)
class StreamCase:
    """At one rate. tokens_per_second: what came through."""

    rate: int
    tokens_per_second: float
    cpu_ms_per_1000_tokens: float
    router_share: float  # of one core
    others_share: float


@dataclass(frozen=True, kw_only=True)
class RouterBenchResult:
    """added_ttft: a streamed request by one client at a time, whose worker answers at once. rss: after all of it."""

    requests_per_second: float
    cpu_ms_per_request: float
    others_share: float
    added_ttft_p50_ms: float
    added_ttft_p99_ms: float
    streams: list[StreamCase] = field(default_factory=list)
    rss_mib: float = 0.0
    scaling: ScalingCase | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def bench_router(config: RouterBenchConfig) -> RouterBenchResult:
    """Raises StartupError if a process does not start, RelevoError if a request fails."""
    texts = prompts(config.input_len, NUM_PROMPTS)
    with ExitStack() as stack:
        router_core, other_core = pin(stack)
        workers = [BenchWorker(stack, "services.router.bench_worker", other_core) for _ in range(config.num_workers)]
        pid, port = start_router(stack, [worker.address for worker in workers], router_core)
        result = await measure(config, texts, workers, pid, port)
        alone = result.cpu_ms_per_request
        scaling = await measure_scaling(workers, texts, config.num_clients, config.seconds, alone)
        return replace(result, scaling=scaling)


def pin(stack: ExitStack) -> tuple[int, int]:
    """The core for the router, and that for all others, which this process is on until the stack ends."""
    allowed = os.sched_getaffinity(0)
    stack.callback(os.sched_setaffinity, 0, allowed)
    os.sched_setaffinity(0, {max(allowed)})
    return min(allowed), max(allowed)


async def measure(
    config: RouterBenchConfig, texts: Sequence[str], workers: Sequence[BenchWorker], pid: int, port: int
) -> RouterBenchResult:
    """A running router, whosever it is, in the process pid. Raises RelevoError if a request fails."""
    bench = _Bench(config, texts, workers, pid, port)
    bench.set_rate(math.inf)
    await bench.load(config.num_clients, 1.0, stream=False, max_tokens=16)  # warm
    whole, cpu, others = await bench.load(config.num_clients, config.seconds, stream=False, max_tokens=16)
    alone, _, _ = await bench.load(1, config.seconds, stream=True, max_tokens=1)
    cuts = quantiles(alone.ttft_seconds, n=100)
    streams = [await bench.streams(rate) for rate in config.rates]
    return RouterBenchResult(
        requests_per_second=whole.num_requests / whole.seconds,
        cpu_ms_per_request=1e3 * cpu / whole.num_requests,
        others_share=others / whole.seconds,
        added_ttft_p50_ms=1e3 * cuts[49],
        added_ttft_p99_ms=1e3 * cuts[98],
        streams=streams,
        rss_mib=_rss_mib(pid),
    )


class _Bench:
    def __init__(
        self, config: RouterBenchConfig, texts: Sequence[str], workers: Sequence[BenchWorker], pid: int, port: int
    ) -> None:
        self._config = config
        self._texts = texts
        self._workers = workers
        self._pid = pid
        self._port = port

    def set_rate(self, tokens_per_second: float) -> None:
        """Of all workers together. 0: step after step, as fast as they are taken; inf: each answer in one step."""
        for worker in self._workers:
            worker.set_rate(tokens_per_second / len(self._workers))

    async def load(
        self, concurrency: int, seconds: float, *, stream: bool, max_tokens: int
    ) -> tuple[Load, float, float]:
        """The load, the router's CPU seconds, and those of workers and client."""
        others = [os.getpid(), *(worker.pid for worker in self._workers)]
        before, others_before = cpu_seconds(self._pid), sum(map(cpu_seconds, others))
        requests = completion_requests(self._texts, self._port, stream=stream, max_tokens=max_tokens)
        load = await closed_loop("127.0.0.1", self._port, requests, concurrency, seconds)
        return load, cpu_seconds(self._pid) - before, sum(map(cpu_seconds, others)) - others_before

    async def streams(self, rate: int) -> StreamCase:
        config = self._config
        self.set_rate(rate)
        expected = rate or 60_000
        max_tokens = max(16, round(expected * config.seconds / config.num_streams / 2))
        load, cpu, others = await self.load(config.num_streams, config.seconds, stream=True, max_tokens=max_tokens)
        num_tokens = load.num_requests * max_tokens
        return StreamCase(
            rate=rate,
            tokens_per_second=num_tokens / load.seconds,
            cpu_ms_per_1000_tokens=1e6 * cpu / num_tokens,
            router_share=cpu / load.seconds,
            others_share=others / load.seconds,
        )


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
