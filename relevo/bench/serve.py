"""Latency and throughput of any OpenAI-compatible endpoint, over HTTP, as a client sees them.

TTFT is from sending a request to its first token; ITL is between two chunks of one response; TPOT is, per request,
(end - first token) / (tokens - 1).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import orjson

from relevo.core.errors import Unavailable


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """url: of the endpoint, without /v1. Prompts are random token ids below vocab_size; EOS is ignored."""

    url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 1
    num_requests: int = 16
    num_warmup_requests: int = 1
    input_len: int = 256
    output_len: int = 64
    vocab_size: int = 1000
    seed: int = 0
    timeout_seconds: float = 600.0


@dataclass(slots=True)
class _Timing:
    sent: float
    chunks: list[float] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ServeBenchResult:
    """Times in milliseconds, rates per second. Percentiles are nearest-rank."""

    concurrency: int
    num_requests: int
    input_len: int
    output_len: int
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    output_tokens_per_second: float
    requests_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def bench_serve(config: ServeBenchConfig) -> ServeBenchResult:
    """Keep `concurrency` requests going until num_requests are done. Raises Unavailable if one of them fails."""
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    limits = httpx.Limits(max_connections=config.concurrency)
    async with httpx.AsyncClient(
        base_url=config.url, headers=headers, limits=limits, timeout=config.timeout_seconds
    ) as client:
        model = config.model or await _first_model(client)
        prompts = _prompts(config)
        await _run(client, config, model, prompts[: config.num_warmup_requests])
        started = time.perf_counter()
        timings = await _run(client, config, model, prompts[config.num_warmup_requests :])
        return _summary(config, timings, time.perf_counter() - started)


def _prompts(config: ServeBenchConfig) -> list[list[int]]:
    numbers = random.Random(config.seed)
    count = config.num_warmup_requests + config.num_requests
    return [[numbers.randrange(config.vocab_size) for _ in range(config.input_len)] for _ in range(count)]


async def _first_model(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    if response.status_code != 200:
        raise Unavailable(f"GET /v1/models answered {response.status_code}: {response.text[:200]}")
    return str(response.json()["data"][0]["id"])


async def _run(
    client: httpx.AsyncClient, config: ServeBenchConfig, model: str, prompts: Sequence[list[int]]
) -> list[_Timing]:
    queue = list(reversed(prompts))
    timings: list[_Timing] = []

    async def worker() -> None:
        while queue:
            timings.append(await _request(client, config, model, queue.pop()))

    async with asyncio.TaskGroup() as group:
        for _ in range(config.concurrency):
            group.create_task(worker())
    return timings


async def _request(client: httpx.AsyncClient, config: ServeBenchConfig, model: str, prompt: list[int]) -> _Timing:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": config.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing = _Timing(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise Unavailable(f"POST /v1/completions answered {response.status_code}: {text[:200]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                _take(timing, orjson.loads(line[6:]))
    if timing.num_tokens != config.output_len:
        raise Unavailable(f"asked for {config.output_len} tokens, got {timing.num_tokens}")
    return timing


def _take(timing: _Timing, event: dict[str, Any]) -> None:
    if "error" in event:
        raise Unavailable(f"the stream broke: {event['error']}")
    if event.get("choices"):
        timing.chunks.append(time.perf_counter())
    if event.get("usage"):
        timing.num_tokens = event["usage"]["completion_tokens"]


def _summary(config: ServeBenchConfig, timings: Sequence[_Timing], seconds: float) -> ServeBenchResult:
    ttft = [each.chunks[0] - each.sent for each in timings]
    tpot = [(each.chunks[-1] - each.chunks[0]) / max(1, each.num_tokens - 1) for each in timings]
    itl = [b - a for each in timings for a, b in zip(each.chunks, each.chunks[1:], strict=False)] or [0.0]
    return ServeBenchResult(
        concurrency=config.concurrency,
        num_requests=len(timings),
        input_len=config.input_len,
        output_len=config.output_len,
        ttft_ms_p50=_percentile_ms(ttft, 50),
        ttft_ms_p99=_percentile_ms(ttft, 99),
        tpot_ms_p50=_percentile_ms(tpot, 50),
        tpot_ms_p99=_percentile_ms(tpot, 99),
        itl_ms_p50=_percentile_ms(itl, 50),
        itl_ms_p99=_percentile_ms(itl, 99),
        output_tokens_per_second=sum(each.num_tokens for each in timings) / seconds,
        requests_per_second=len(timings) / seconds,
    )


def _percentile_ms(seconds: Sequence[float], percent: int) -> float:
    ordered = sorted(seconds)
    return 1e3 * ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)]
