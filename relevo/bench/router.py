"""What the router costs: `relevo bench router`. Real router processes, workers without a model, a client that counts.

Router processes are pinned to a core; workers and client share another one, which must not be the bottleneck: its share
of time is reported. All figures include tokenizing, hashing, placing and detokenizing. CPU time is the router's alone.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import IO, Any

import orjson

from relevo.bench.http_load import Load, closed_loop, post
from relevo.bench.kv_processes import END_SECONDS, cpu_seconds, end_process
from relevo.core.errors import StartupError
from relevo.model_files import resolve_model
from relevo.tokenizer import Tokenizer

_PATH = "/v1/completions"
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prompts(input_len: int, count: int) -> list[str]:
    """Texts of that many tokens of the demo's tokenizer, all different."""
    tokenizer = Tokenizer.from_files(resolve_model(None, weights=False))
    assert tokenizer is not None
    numbers = random.Random(0)
    words = [tokenizer.decode([token_id]) for token_id in range(300, 3300)]
    plain = [word for word in words if word.isascii() and word.strip().isalpha() and word.startswith(" ")]
    texts: list[str] = []
    while len(texts) < count:
        text = "".join(numbers.choice(plain) for _ in range(input_len))
        ids = tokenizer.encode(text, add_special_tokens=False)[:input_len]
        texts.append(tokenizer.decode(ids))
    return texts


async def bench_router(config: RouterBenchConfig) -> RouterBenchResult:
    """Raises StartupError if a process does not start, RelevoError if a request fails."""
    texts = prompts(config.input_len, NUM_PROMPTS)
    with ExitStack() as stack:
        router_core, other_core = pin(stack)
        workers = [BenchWorker(stack, "services.router.bench_worker", other_core) for _ in range(config.num_workers)]
        pid, port = _start_router(stack, [worker.address for worker in workers], router_core)
        return await measure(config, texts, workers, pid, port)


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
        load = await closed_loop("127.0.0.1", self._port, self._requests(stream, max_tokens), concurrency, seconds)
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

    def _requests(self, stream: bool, max_tokens: int) -> list[bytes]:
        bodies = (
            orjson.dumps(
                {"model": "bench", "prompt": text, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True}
            )
            for text in self._texts
        )
        return [post("127.0.0.1", self._port, _PATH, body) for body in bodies]


class BenchWorker:
    """A process that answers without a model; `module` says in which language. Ends with the stack."""

    def __init__(self, stack: ExitStack, module: str, core: int) -> None:
        process, line = _spawn(stack, [module], core, stdin=subprocess.PIPE)
        self.pid = process.pid
        self.address: str = line["address"]
        assert process.stdin is not None
        self._commands: IO[bytes] = process.stdin
        stack.callback(self._commands.close)

    def set_rate(self, tokens_per_second: float) -> None:
        self._commands.write(f"rate {tokens_per_second}\n".encode())
        self._commands.flush()


def _start_router(stack: ExitStack, workers: Sequence[str], core: int) -> tuple[int, int]:
    flags = ["--port", "0", "--http-port", "0", "--decode", ",".join(workers), "--log-level", "error"]
    flags += ["--served-model-name", "bench"]
    process, line = _spawn(stack, ["services.router", *flags], core)
    return process.pid, int(str(line["http"]).rpartition(":")[2])


def _spawn(
    stack: ExitStack, module: Sequence[str], core: int, **options: Any
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    ready, fd = os.pipe()
    command = [sys.executable, "-m", *module, "--ready-fd", str(fd)]
    process = subprocess.Popen(command, pass_fds=(fd,), **options)
    stack.callback(end_process, process)
    os.sched_setaffinity(process.pid, {core})
    os.close(fd)
    with os.fdopen(ready, "rb") as lines:
        line = lines.readline()
    if not line:
        raise StartupError(f"{module[0]} did not start (exit code {process.wait(END_SECONDS)})")
    return process, json.loads(line)


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
