"""The last five minutes, a sample a second, made of what the route log has anyway."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from services.router.route_log import RouteRecord

SECONDS = 300
TTFT_WINDOW_SECONDS = 10.0  # first tokens are rare: a percentile of one second's would jump
MAX_TTFTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Milliseconds, tokens a second; None: nothing came to be measured.

    at: seconds since 1970. seconds: since the sample before
    ttft: of the first tokens of the last TTFT_WINDOW_SECONDS. tpot: of each that got tokens since then
    running, queued: requests, now
    """

    at: float
    seconds: float
    ttft_p50: float | None
    ttft_p95: float | None
    tpot_p50: float | None
    tpot_p95: float | None
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    requests_per_second: float
    running: int
    queued: int


@dataclass(slots=True)
class Flow:
    """Tokens a second between this router and a worker: of prompts whose first token it computed, and of answers."""

    prompt_tokens_per_second: float = 0.0
    computed_tokens_per_second: float = 0.0
    output_tokens_per_second: float = 0.0


@dataclass(slots=True)
class _Since:
    """What came since the last sample."""

    tpots_ms: list[float] = field(default_factory=list)
    num_first_tokens: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    flows: dict[str, Flow] = field(default_factory=lambda: defaultdict(Flow))


class History:
    """flows: by the worker's address, of the last sample"""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=SECONDS)
        self.flows: Mapping[str, Flow] = {}
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=MAX_TTFTS)  # when, and milliseconds
        self._before: dict[str, tuple[int, float]] = {}  # requests that had not ended: tokens, and when the last came
        self._sampled_at = time.perf_counter()

    def sample(self, records: Iterable[RouteRecord], *, running: int, queued: int) -> None:
        """Add one. records: the route log's. Requests that it has forgotten since the last sample are missed."""
        now = time.perf_counter()
        seconds = max(now - self._sampled_at, 1e-3)
        since = self._collect(records)
        self._sampled_at = now
        while self._ttfts and self._ttfts[0][0] < now - TTFT_WINDOW_SECONDS:
            self._ttfts.popleft()
        for flow in since.flows.values():
            flow.prompt_tokens_per_second = round(flow.prompt_tokens_per_second / seconds, 1)
            flow.computed_tokens_per_second = round(flow.computed_tokens_per_second / seconds, 1)
            flow.output_tokens_per_second = round(flow.output_tokens_per_second / seconds, 1)
        self.flows = since.flows
        ttfts = sorted(ttft_ms for _, ttft_ms in self._ttfts)
        tpots = sorted(since.tpots_ms)
        self.samples.append(
            Sample(
                at=round(time.time(), 3),
                seconds=round(seconds, 6),
                ttft_p50=percentile(ttfts, 0.5),
                ttft_p95=percentile(ttfts, 0.95),
                tpot_p50=percentile(tpots, 0.5),
                tpot_p95=percentile(tpots, 0.95),
                output_tokens_per_second=round(since.num_output_tokens / seconds, 1),
                prompt_tokens_per_second=round(since.num_prompt_tokens / seconds, 1),
                requests_per_second=round(since.num_first_tokens / seconds, 2),
                running=running,
                queued=queued,
            )
        )

    def flow(self, address: str) -> Mapping[str, float]:
        return asdict(self.flows.get(address, Flow()))

    def _collect(self, records: Iterable[RouteRecord]) -> _Since:
        since = _Since()
        before, self._before = self._before, {}
        for record in records:
            if record.ended_at is None:
                self._before[record.request_id] = record.num_output_tokens, record.last_token_at
            elif record.ended_at <= self._sampled_at:
                continue
            if record.first_token_at is not None:
                num_before, last_at = before.get(record.request_id, (0, 0.0))
                self._add(record, num_before, last_at, since)
        return since

    def _add(self, record: RouteRecord, num_before: int, last_at: float, since: _Since) -> None:
        assert record.first_token_at is not None
        num_new = record.num_output_tokens - num_before
        best = record.routes[-1].placement.best
        if not num_before:  # its first token came since
            self._ttfts.append((record.first_token_at, 1e3 * (record.first_token_at - record.started)))
            since.num_first_tokens += 1
            since.num_prompt_tokens += record.num_prompt_tokens
            flow = since.flows[best.prefill or best.decode]
            flow.prompt_tokens_per_second += record.num_prompt_tokens
            flow.computed_tokens_per_second += best.num_uncached_tokens
            num_before, last_at = 1, record.first_token_at
        since.num_output_tokens += num_new
        since.flows[best.decode].output_tokens_per_second += num_new
        if record.num_output_tokens > num_before:
            since.tpots_ms.append(1e3 * (record.last_token_at - last_at) / (record.num_output_tokens - num_before))


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """By nearest rank, of ascending values."""
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2) if ordered else None


def describe_request(record: RouteRecord) -> Mapping[str, Any]:
    """As JSON. Milliseconds; null: not yet, or never.

    state: placing, waiting (for its first token), streaming or ended
    outcome: RouteRecord's. num_cached_tokens: as predicted until it is known
    """
    first, ended = record.first_token_at, record.ended_at
    route = record.routes[-1] if record.routes else None
    best = route.placement.best if route is not None else None
    cached = None
    if route is not None:
        known = route.actual_cached_tokens
        cached = route.predicted_cached_tokens if known is None else known
    num_gaps = record.num_output_tokens - 1
    tpot_ms = 1e3 * (record.last_token_at - first) / num_gaps if first is not None and num_gaps > 0 else None
    return {
        "id": record.request_id,
        "placed_at": record.placed_at,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": cached,
        "num_output_tokens": record.num_output_tokens,
        "ttft_ms": None if first is None else round(1e3 * (first - record.started), 2),
        "tpot_ms": None if tpot_ms is None else round(tpot_ms, 2),
        "total_ms": None if ended is None else round(1e3 * (ended - record.started), 2),
        "state": "ended" if ended is not None else "waiting" if first is None else "streaming",
        "outcome": record.outcome or None,
        "prefill": None if best is None else best.prefill,
        "decode": None if best is None else best.decode,
        "num_tries": len(record.routes),
    }
