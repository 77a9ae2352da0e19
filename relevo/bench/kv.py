"""How fast KV blocks get from one worker's pool into another's, through real agents: `relevo bench kv`.

Between two workers of one host (over shared memory), and of two (over each transport between two agents, all on this
machine). Two figures a case, both on open streams, as a prompt's chunks have them:

- chunk: blocks lie in their slots; from the message that seals them to the last byte in the reader's pool. One copy, as
  in most systems' figures, and for a single block the latency.
- whole: the writer copies blocks from its pool into their slots and seals them part by part, while the reader copies
  out; from the first byte written to the last in the reader's pool. Two copies. The CPU time includes opening and
  closing both streams.

All copies are checked (xxh3-64). CPU seconds are those of all processes that take part, the agents' included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from relevo.bench.kv_processes import (
    AgentProcess,
    EndProcess,
    cpu_seconds,
    start_agent,
    start_end,
    wait_until_idle,
)
from relevo.core.errors import RelevoError

SHARED_MEMORY = "shared memory"
WARM_UP_ROUNDS = 3
MAX_CHUNKS = 16  # on one pair of streams


@dataclass(frozen=True, kw_only=True)
class KvBenchConfig:
    """paths: "shared memory", and transports between agents. seconds: for each case and figure."""

    paths: Sequence[str] = (SHARED_MEMORY, "tcp")
    block_bytes: Sequence[int] = (196_608, 2 << 20)
    num_blocks: Sequence[int] = (1, 16, 256)
    seconds: float = 1.0
    min_rounds: int = 3
    arena_bytes: int = 0  # 0: twice the largest case


@dataclass(frozen=True, kw_only=True)
class KvCase:
    """gb: 10^9 bytes. Medians of the rounds; CPU seconds over all of them. None: not measured."""

    path: str
    block_bytes: int
    num_blocks: int
    chunk_gb_per_second: float
    chunk_cpu_seconds_per_gb: float
    chunk_ms: float
    whole_gb_per_second: float | None = None
    whole_cpu_seconds_per_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class KvBenchResult:
    """memcpy: in the reader's process, one thread, from one part of its pool to another, a block at a time."""

    cases: list[KvCase]
    memcpy: list[KvCase]
    links: dict[str, str]  # by transport: what the agents measured

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_kv(config: KvBenchConfig) -> KvBenchResult:
    """Raises RelevoError if a process does not start, or a block is lost."""
    cases, memcpy, links = [], [], {}
    for path in config.paths:
        for block_bytes in config.block_bytes:
            with ExitStack() as stack:
                bench = _start(config, path, block_bytes, stack)
                cases += [bench.case(num_blocks) for num_blocks in config.num_blocks]
                if path == config.paths[0]:
                    memcpy += [bench.memcpy(num_blocks) for num_blocks in config.num_blocks]
                if path != SHARED_MEMORY:
                    links[path] = bench.link()
    return KvBenchResult(cases=cases, memcpy=memcpy, links=links)


def _start(config: KvBenchConfig, path: str, block_bytes: int, stack: ExitStack) -> _PathBench:
    most = max(config.num_blocks)
    arena_bytes = config.arena_bytes or max(2 * most * block_bytes, 64 << 20)
    source = start_agent(stack, arena_bytes, path)
    target = source if path == SHARED_MEMORY else start_agent(stack, arena_bytes, path)
    writer = start_end(stack, source.address, "writer", block_bytes, most)
    reader = start_end(stack, target.address, "reader", block_bytes, most)
    wait_until_idle([source.pid, target.pid, writer.pid, reader.pid])  # they touch all of their memory first
    return _PathBench(config, path, block_bytes, source, target, writer, reader)


class _PathBench:
    """One path, one size of blocks: agents and workers are running."""

    def __init__(
        self,
        config: KvBenchConfig,
        path: str,
        block_bytes: int,
        source: AgentProcess,
        target: AgentProcess,
        writer: EndProcess,
        reader: EndProcess,
    ) -> None:
        self._config = config
        self._path = path
        self._block_bytes = block_bytes
        self._target = target
        self._writer = writer
        self._reader = reader
        self._pids = sorted({source.pid, target.pid, writer.pid, reader.pid})
        self._source_address = "" if path == SHARED_MEMORY else source.address
        self._next_name = 0

    def case(self, num_blocks: int) -> KvCase:
        for _ in range(WARM_UP_ROUNDS):
            self._whole(num_blocks)
        chunks, chunk_cpu = self._rounds(num_blocks, self._chunks)
        wholes, whole_cpu = self._rounds(num_blocks, self._whole)
        num_bytes = num_blocks * self._block_bytes
        return KvCase(
            path=self._path,
            block_bytes=self._block_bytes,
            num_blocks=num_blocks,
            chunk_gb_per_second=num_bytes / median(chunks) / 1e9,
            chunk_cpu_seconds_per_gb=chunk_cpu * 1e9,
            chunk_ms=median(chunks) * 1000,
            whole_gb_per_second=num_bytes / median(wholes) / 1e9,
            whole_cpu_seconds_per_gb=whole_cpu * 1e9,
        )

    def memcpy(self, num_blocks: int) -> KvCase:
        num_rounds = max(self._config.min_rounds, (1 << 30) // (num_blocks * self._block_bytes))
        self._reader.ask({"op": "memcpy", "count": num_blocks})
        reply = self._reader.ask({"op": "memcpy", "count": num_blocks * num_rounds})
        gigabytes = num_blocks * num_rounds * self._block_bytes / 1e9
        return KvCase(
            path="memcpy",
            block_bytes=self._block_bytes,
            num_blocks=num_blocks,
            chunk_gb_per_second=gigabytes / reply["seconds"],
            chunk_cpu_seconds_per_gb=reply["cpu_seconds"] / gigabytes,
            chunk_ms=reply["seconds"] / num_rounds * 1000,
        )

    def link(self) -> str:
        return self._target.link()

    def _rounds(self, num_blocks: int, play: Callable[[int], tuple[list[float], float]]) -> tuple[list[float], float]:
        """Seconds of each round, and CPU seconds a byte over all."""
        seconds: list[float] = []
        cpu = 0.0
        end = time.monotonic() + self._config.seconds
        while len(seconds) < self._config.min_rounds or time.monotonic() < end:
            of_rounds, of_cpu = play(num_blocks)
            seconds += of_rounds
            cpu += of_cpu
        return seconds, cpu / (len(seconds) * num_blocks * self._block_bytes)

    def _chunks(self, num_blocks: int) -> tuple[list[float], float]:
        """Several chunks of num_blocks on one pair of streams."""
        num_chunks = max(1, min(MAX_CHUNKS, max(self._config.num_blocks) // num_blocks))
        self._open(num_blocks * num_chunks, num_blocks)
        seconds: list[float] = []
        cpu = 0.0
        for _ in range(num_chunks):
            self._writer.ask({"op": "fill", "count": num_blocks})
            before = self._cpu()
            self._writer.send({"op": "seal"})
            read, sealed = self._reader.reply(), self._writer.reply()
            cpu += self._cpu() - before
            self._check(read, num_blocks)
            seconds.append(read["ended"] - sealed["began"])
        self._writer.ask({"op": "end"})
        return seconds, cpu

    def _whole(self, num_blocks: int) -> tuple[list[float], float]:
        before = self._cpu()
        self._open(num_blocks, num_blocks)
        self._writer.send({"op": "go"})
        written, read = self._writer.reply(), self._reader.reply()
        self._writer.ask({"op": "end"})
        self._check(read, num_blocks)
        return [read["ended"] - written["began"]], self._cpu() - before

    def _open(self, count: int, chunk: int) -> None:
        """Names that were never used before, announced and asked for."""
        first, self._next_name = self._next_name, self._next_name + count
        names = {"first": first, "count": count}
        self._writer.ask({"op": "write", **names})
        self._reader.ask({"op": "read", **names, "chunk": chunk, "source": self._source_address})

    def _check(self, read: dict[str, Any], num_blocks: int) -> None:
        if read["good"] != num_blocks:
            raise RelevoError(f"{read['good']} of {num_blocks} blocks came over {self._path}")

    def _cpu(self) -> float:
        return sum(map(cpu_seconds, self._pids))
