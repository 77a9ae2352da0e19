"""What the hand-over costs a request: `relevo bench handover`.

A split stack (one prefill, one decode worker) and then an aggregated one answer the same prompts, one at a time. Told
apart are:

- tail: from the first token, when decode hears of it, until the last of the blocks is in decode's pool, checked:
  what the hand-over costs beyond prefill's computing. All else of it happens while the next chunk is computed.
- overlap: the share of the blocks that was there when decode heard of the first token.
- copies: time that both workers' threads spent copying and checking.
- TTFT split ÷ aggregated: all of it, with the calls, the announcing and the second engine's share of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from relevo.bench.endpoint import Answer, connect
from relevo.bench.workload import random_asks
from relevo.core.errors import RelevoError
from relevo.stack import Stack, StackConfig

_REQUEST_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class HandoverBenchConfig:
    """stack: as for the split run; topology and metrics are set here. output_len: tokens, at least 2."""

    stack: StackConfig
    input_lens: Sequence[int] = (256, 2048, 16_384)
    num_requests: int = 4
    output_len: int = 8
    vocab_size: int = 1000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class HandoverCase:
    """Medians over the requests, but for overlap and copies, which are means. Milliseconds; ratios are of 1."""

    input_len: int
    num_blocks: float  # handed over, of one request
    num_bytes: float
    ttft_ms: float
    second_token_ms: float  # after the first
    tail_ms: float
    overlap: float
    copies_ms: float
    aggregated_ttft_ms: float
    aggregated_second_token_ms: float

    @property
    def tail_share(self) -> float:
        """Of the time to the first token."""
        return self.tail_ms / self.ttft_ms


@dataclass(slots=True)
class _Run:
    """One topology's answers, and the figures of each."""

    ttft_ms: list[float] = field(default_factory=list)
    second_token_ms: list[float] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)


async def bench_handover(config: HandoverBenchConfig, tell: Callable[[str], None]) -> list[HandoverCase]:
    """tell: called with what is being done. Raises RelevoError if a stack does not start or a request fails."""
    split = await _run(config, "disaggregated", tell)
    aggregated = await _run(config, "aggregated", tell)
    return [_case(length, split[length], aggregated[length]) for length in config.input_lens]


def as_dicts(cases: Sequence[HandoverCase]) -> list[dict[str, Any]]:
    return [asdict(case) | {"tail_share": case.tail_share} for case in cases]


async def _run(config: HandoverBenchConfig, topology: Any, tell: Callable[[str], None]) -> dict[int, _Run]:
    is_split = topology == "disaggregated"
    options = {name: getattr(config.stack, name) for name in config.stack.__dataclass_fields__}
    runs: dict[int, _Run] = {}
    with Stack(StackConfig(**options | {"topology": topology, "metrics": is_split})) as stack:
        tell(f"starting the {topology} stack")
        stack.start()
        async with httpx.AsyncClient(base_url=stack.endpoint, timeout=_REQUEST_SECONDS) as client:
            endpoint = await connect(client, None)
            for number, length in enumerate(config.input_lens):
                run = runs[length] = _Run()
                asks = random_asks(
                    config.num_requests + 1,
                    input_len=length,
                    output_len=config.output_len,
                    vocab_size=config.vocab_size,
                    seed=config.seed + 1000 * number,
                )
                for index, ask in enumerate(asks):
                    tell(f"{topology}, {length} tokens, request {index} of {config.num_requests}")
                    before = await _figures(client, stack)
                    answer = await endpoint.ask(ask)
                    if index:  # the first one warms up
                        _note(run, answer, before, await _figures(client, stack))
    return runs


def _note(run: _Run, answer: Answer, before: dict[str, float], after: dict[str, float]) -> None:
    if answer.error is not None:
        raise RelevoError(f"a request failed: {answer.error}")
    run.ttft_ms.append(answer.ttft_ms)
    run.second_token_ms.append(1e3 * (answer.chunks[1][0] - answer.chunks[0][0]) if len(answer.chunks) > 1 else 0.0)
    run.figures.append({name: value - before.get(name, 0.0) for name, value in after.items()})


async def _figures(client: httpx.AsyncClient, stack: Stack) -> dict[str, float]:
    """ "worker name{direction}" → value, of the workers' hand-over figures."""
    found: dict[str, float] = {}
    for name, port in stack.metrics_ports.items():
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        for family in text_string_to_metric_families(text):
            if family.name.startswith("relevo_handover_"):
                for sample in family.samples:
                    key = f"{name} {sample.name} {sample.labels.get('direction', '')}".strip()
                    if not sample.name.endswith("_bucket"):
                        found[key] = sample.value
    return found


def _case(length: int, split: _Run, aggregated: _Run) -> HandoverCase:
    def each(name: str) -> list[float]:
        return [figures.get(name, 0.0) for figures in split.figures]

    def mean(name: str) -> float:
        return sum(each(name)) / len(split.figures)

    copies = mean("prefill-0 relevo_handover_copy_seconds_total out") + mean(
        "decode-0 relevo_handover_copy_seconds_total in"
    )
    return HandoverCase(
        input_len=length,
        num_blocks=mean("decode-0 relevo_handover_blocks_total in"),
        num_bytes=mean("decode-0 relevo_handover_bytes_total in"),
        ttft_ms=median(split.ttft_ms),
        second_token_ms=median(split.second_token_ms),
        tail_ms=1e3 * median(each("decode-0 relevo_handover_tail_seconds_sum")),
        overlap=min(1.0, mean("decode-0 relevo_handover_overlap_ratio_sum")),  # of differences of sums
        copies_ms=1e3 * copies,
        aggregated_ttft_ms=median(aggregated.ttft_ms),
        aggregated_second_token_ms=median(aggregated.second_token_ms),
    )
