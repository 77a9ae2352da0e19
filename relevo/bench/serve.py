"""Latency and throughput of any OpenAI-compatible endpoint, over HTTP, as a client sees them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from relevo.bench.endpoint import Answer, Endpoint, connect
from relevo.bench.statistics import Slo, summary
from relevo.bench.workload import Ask, arrivals
from relevo.core.errors import Unavailable

Advance = Callable[[], None]  # called once for every request that ended


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """url: of the endpoint, without /v1
    concurrency: requests under way at a time; with request_rate, at most as many, None: however many there are
    request_rate: requests a second, of a Poisson process; None: the next one is sent when one has ended
    ignore_eos: ask for answers of full length; some servers refuse or ignore that
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: int | None = 1
    request_rate: float | None = None
    seed: int = 0
    slo: Slo = field(default_factory=Slo)
    ignore_eos: bool = True
    timeout_seconds: float = 600.0


@dataclass(frozen=True, slots=True)
class ServeBenchResult:
    """Of the requests that were answered; failures counts the others, by what was wrong.

    figures: ttft_ms, tpot_ms, itl_ms and e2e_ms, each as _mean, _p50, _p90 and _p99
    goodput_requests_per_second: of requests that kept the SLO; None without one
    num_short: answers that ended before the length that was asked for
    tokens_per_chunk: above 1, ITL is the gap between chunks shared among their tokens, as far as the server counts them
    client_cpu_share: of one core, spent by this process; near 1, it is the client that was measured
    """

    concurrency: int | None
    request_rate: float | None
    seconds: float
    num_requests: int
    failures: dict[str, int]
    num_short: int
    num_input_tokens: int | None
    num_output_tokens: int
    tokens_per_chunk: float
    client_cpu_share: float
    output_tokens_per_second: float
    requests_per_second: float
    goodput_requests_per_second: float | None
    figures: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        figures: dict[str, float] = fields.pop("figures")
        return fields | figures


async def bench_serve(
    config: ServeBenchConfig, asks: Sequence[Ask], warmup: Sequence[Ask] = (), advance: Advance = lambda: None
) -> ServeBenchResult:
    """Send `warmup`, then measure `asks`.

    Raises Unavailable if nobody listens at the url, or no request was answered, and what `connect` raises.
    """
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
    async with httpx.AsyncClient(
        base_url=config.url, headers=headers, limits=limits, timeout=config.timeout_seconds
    ) as client:
        endpoint = await connect(client, config.model, ignore_eos=config.ignore_eos)
        _refuse_if_all_failed(await _closed_loop(endpoint, warmup, config.concurrency or 1, lambda: None))
        started, cpu_started = time.perf_counter(), time.process_time()
        if config.request_rate is None:
            answers = await _closed_loop(endpoint, asks, config.concurrency or 1, advance)
        else:
            answers = await _open_loop(endpoint, asks, config, advance)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    _refuse_if_all_failed(answers)
    return summarize(config, answers, seconds, cpu_seconds)


async def _closed_loop(endpoint: Endpoint, asks: Sequence[Ask], concurrency: int, advance: Advance) -> list[Answer]:
    """`concurrency` clients, each with one request at a time."""
    queue = iter(asks)
    answers: list[Answer] = []

    async def client() -> None:
        for ask in queue:
            answers.append(await endpoint.ask(ask))
            advance()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(asks))):
            group.create_task(client())
    return answers


async def _open_loop(
    endpoint: Endpoint, asks: Sequence[Ask], config: ServeBenchConfig, advance: Advance
) -> list[Answer]:
    """Requests come at their times, whether or not earlier ones are done. Waiting for a free client counts as TTFT."""
    assert config.request_rate is not None
    answers: list[Answer] = []
    clients = asyncio.Semaphore(config.concurrency or len(asks))
    started = time.perf_counter()

    async def client(ask: Ask, due: float) -> None:
        async with clients:
            answer = await endpoint.ask(ask)
        answer.sent = due
        answers.append(answer)
        advance()

    async with asyncio.TaskGroup() as group:
        for ask, seconds in zip(asks, arrivals(config.request_rate, config.seed), strict=False):
            due = started + seconds
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(client(ask, due))
    return answers


def _refuse_if_all_failed(answers: Sequence[Answer]) -> None:
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors and len(errors) == len(answers):
        raise Unavailable(f"all {len(errors)} requests failed, the first because: {errors[0]}")


def summarize(
    config: ServeBenchConfig, answers: Sequence[Answer], seconds: float, cpu_seconds: float
) -> ServeBenchResult:
    """answers: of `seconds`; at least one without an error."""
    good = [answer for answer in answers if answer.error is None]
    times = {
        "ttft_ms": [answer.ttft_ms for answer in good],
        "tpot_ms": [tpot for answer in good if (tpot := answer.tpot_ms) is not None],
        "itl_ms": list(itertools.chain.from_iterable(answer.itl_ms for answer in good)),
        "e2e_ms": [answer.e2e_ms for answer in good],
    }
    num_kept = sum(config.slo.is_met(answer.ttft_ms, answer.tpot_ms) for answer in good)
    num_tokens = sum(answer.num_tokens for answer in good)
    prompt_tokens = [answer.num_prompt_tokens for answer in good]
    return ServeBenchResult(
        concurrency=config.concurrency,
        request_rate=config.request_rate,
        seconds=seconds,
        num_requests=len(good),
        failures=dict(Counter(answer.error for answer in answers if answer.error is not None)),
        num_short=sum(answer.num_tokens < answer.output_len for answer in good),
        num_input_tokens=None if None in prompt_tokens else sum(filter(None, prompt_tokens)),
        num_output_tokens=num_tokens,
        tokens_per_chunk=num_tokens / sum(len(answer.chunks) for answer in good),
        client_cpu_share=cpu_seconds / seconds,
        output_tokens_per_second=num_tokens / seconds,
        requests_per_second=len(good) / seconds,
        goodput_requests_per_second=num_kept / seconds if config.slo.is_set else None,
        figures={name: value for each, values in times.items() for name, value in summary(each, values).items()},
    )
