"""Latency and throughput of an engine by itself: no process, no socket, no tokenizer in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relevo.bench.statistics import summary
from relevo.bench.workload import random_prompts
from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import SamplingParams
from relevo.engine.engine import Engine

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """prefill_ms: from submitting a batch to the last of its first tokens
    tpot_ms: of each request, as in `relevo bench serve`; step_ms: of steps in which each request got one token
    """

    batch_size: int
    input_len: int
    output_len: int
    num_runs: int
    prefill_tokens_per_second: float
    output_tokens_per_second: float
    figures: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        figures: dict[str, float] = fields.pop("figures")
        return fields | figures


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """All requests are there from the start; seconds from then until the last has ended."""

    num_requests: int
    num_input_tokens: int
    num_output_tokens: int
    seconds: float
    requests_per_second: float
    input_tokens_per_second: float
    output_tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Run:
    """What one batch did, on time.perf_counter()'s clock. token_times: of each request, when its tokens came."""

    started: float
    ended: float
    token_times: list[list[float]]
    decode_seconds: list[float]


def bench_latency(
    engine: Engine, *, batch_size: int, input_len: int, output_len: int, num_runs: int, seed: int = 0
) -> LatencyResult:
    """Batches of `batch_size` requests that come together; one run more, unmeasured, goes before.

    Raises InvalidRequest for a batch that the engine would not compute at once.
    """
    if batch_size > engine.info.max_num_seqs:
        raise InvalidRequest(f"batch size {batch_size} is beyond max_num_seqs {engine.info.max_num_seqs}", "batch_size")
    runs = []
    for index in range(num_runs + 1):
        prompts = random_prompts(
            batch_size,
            input_len=input_len,
            vocab_size=engine.info.vocab_size,
            seed=seed + 1000 * batch_size + index,
        )
        runs.append(_run(engine, [(prompt, output_len) for prompt in prompts]))
    del runs[0]
    prefill = [max(times[0] for times in run.token_times) - run.started for run in runs]
    tpot = [(times[-1] - times[0]) / (output_len - 1) for run in runs for times in run.token_times if output_len > 1]
    values = {
        "prefill_ms": prefill,
        "ttft_ms": [times[0] - run.started for run in runs for times in run.token_times],
        "tpot_ms": tpot,
        "step_ms": [seconds for run in runs for seconds in run.decode_seconds],
    }
    return LatencyResult(
        batch_size=batch_size,
        input_len=input_len,
        output_len=output_len,
        num_runs=num_runs,
        prefill_tokens_per_second=batch_size * input_len * num_runs / sum(prefill),
        output_tokens_per_second=batch_size * output_len * num_runs / sum(run.ended - run.started for run in runs),
        figures={
            name: value
            for each, seconds in values.items()
            for name, value in summary(each, [1e3 * each_seconds for each_seconds in seconds]).items()
        },
    )


def bench_throughput(
    engine: Engine, requests: Sequence[tuple[Sequence[int], int]], advance: Advance = lambda: None
) -> ThroughputResult:
    """requests: prompt and output length of each, in tokens. Raises InvalidRequest for one that can't be served."""
    run = _run(engine, requests, advance)
    num_input = sum(len(prompt) for prompt, _ in requests)
    num_output = sum(len(times) for times in run.token_times)
    seconds = run.ended - run.started
    return ThroughputResult(
        num_requests=len(requests),
        num_input_tokens=num_input,
        num_output_tokens=num_output,
        seconds=seconds,
        requests_per_second=len(requests) / seconds,
        input_tokens_per_second=num_input / seconds,
        output_tokens_per_second=num_output / seconds,
    )


def _run(engine: Engine, requests: Sequence[tuple[Sequence[int], int]], advance: Advance = lambda: None) -> _Run:
    built = [
        engine.make_request(
            f"bench-{index}", prompt, SamplingParams(max_tokens=output_len, temperature=0.0, seed=0, ignore_eos=True)
        )
        for index, (prompt, output_len) in enumerate(requests)
    ]
    token_times: dict[str, list[float]] = {request.request_id: [] for request in built}
    decode_seconds = []
    started = now = time.perf_counter()
    for request in built:
        engine.submit(request)
    while engine.has_unfinished_requests:
        before = now
        result = engine.step()
        now = time.perf_counter()
        for tokens in result.tokens:
            token_times[tokens.request_id] += [now] * len(tokens.token_ids)
        if len(result.tokens) == len(built) == result.num_scheduled_tokens:
            decode_seconds.append(now - before)
        for _ in result.ended:
            advance()
    return _Run(started, now, list(token_times.values()), decode_seconds)
