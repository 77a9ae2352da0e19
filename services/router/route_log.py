"""What became of placements: the last ones, for whoever asks why, and whether predictions come true."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Histogram

from relevo.core.placement import Placement
from services.router.timeline import Timeline

logger = logging.getLogger(__name__)

MAX_RECORDS = 1000
MIN_OBSERVATIONS = 32  # before anything is said of drift
WARNING_SECONDS = 60.0  # between two warnings of the same kind
MAX_TTFT_FACTOR = 2.0  # predicted against actual, of all together: beyond it the rates are not what workers say
MIN_TTFT_ERROR_MS = 500.0  # a mean error below this may be the machine's, not the rates'
MAX_CACHED_ERROR = 0.1  # of the prompts' tokens: beyond it the index is not what workers hold

_MEMORY = 0.98  # of the past, with each request: some 50 requests are remembered

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4, 10)
_TOKEN_BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


@dataclass(slots=True, eq=False)
class Route:
    """One try at serving a request. Milliseconds; None: not known yet, or never to be.

    passed_over: addresses of workers that were no candidates, and why
    predicted: as long as the request has not had its first token from there, only the prediction is known
    """

    placement: Placement
    predicted_ttft_ms: float
    predicted_cached_tokens: int
    actual_ttft_ms: float | None = None
    actual_cached_tokens: int | None = None
    refused: str | None = None  # why the worker was left for another
    passed_over: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class RouteRecord:
    """placed_at: seconds since 1970. started, first_token_at, last_token_at, ended_at: seconds, on time.perf_counter

    outcome: "stop" or "length"; "closed" if its reader wanted no more (a stop string, or the client left); else why it
    failed. "": it has not ended
    """

    request_id: str
    num_prompt_tokens: int
    placed_at: float = field(default_factory=time.time)
    routes: list[Route] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    num_output_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float = 0.0
    ended_at: float | None = None
    outcome: str = ""

    def note_tokens(self, num_output_tokens: int) -> None:
        """So many are there now."""
        self.num_output_tokens = num_output_tokens
        self.last_token_at = now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now

    def note_end(self, outcome: str) -> None:
        """The first time counts."""
        if self.ended_at is None:
            self.ended_at = time.perf_counter()
            self.outcome = outcome

    def explain(self, max_candidates: int | None = None) -> dict[str, Any]:
        """As JSON: every try with its candidates' terms, cheapest first. `omitted`: how many were left out."""
        return {
            "request_id": self.request_id,
            "num_prompt_tokens": self.num_prompt_tokens,
            "placed_at": self.placed_at,
            "routes": [_explain(route, max_candidates) for route in self.routes],
        }


class RouteLog:
    """The last MAX_RECORDS requests that were placed."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, RouteRecord] = OrderedDict()

    def add(self, record: RouteRecord) -> None:
        self._records[record.request_id] = record
        self._records.move_to_end(record.request_id)
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)

    @property
    def records(self) -> Collection[RouteRecord]:
        """The oldest first."""
        return self._records.values()

    def find(self, request_id: str) -> list[RouteRecord]:
        """That of the request, or those of its choices, which are named after it: ID-0, ID-1, …"""
        prefix = f"{request_id}-"
        return [record for name, record in self._records.items() if name == request_id or name.startswith(prefix)]


class Predictions:
    """Predicted against actual, as histograms; a WARNING when they drift apart."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"relevo_route_{name}", what, buckets=buckets, registry=registry)

        self._predicted_ttft = histogram(
            "predicted_ttft_seconds", "From placement to the first token, as predicted.", _TTFT_BUCKETS
        )
        self._actual_ttft = histogram("actual_ttft_seconds", "From placement to the first token.", _TTFT_BUCKETS)
        self._ttft_ratio = histogram("ttft_ratio", "Actual time to the first token by predicted.", _RATIO_BUCKETS)
        self._predicted_cached = histogram(
            "predicted_cached_tokens", "Tokens of a prompt that its workers had cached, as predicted.", _TOKEN_BUCKETS
        )
        self._actual_cached = histogram(
            "actual_cached_tokens", "Tokens of a prompt that its workers had cached.", _TOKEN_BUCKETS
        )
        self._cached_error = histogram(
            "cached_tokens_error", "Cached tokens of a prompt, predicted and actual: how far apart.", _TOKEN_BUCKETS
        )
        self._ttft = _Drift()
        self._cached = _Drift()

    def observe_ttft(self, route: Route) -> None:
        assert route.actual_ttft_ms is not None
        predicted_ms, actual_ms = route.predicted_ttft_ms, route.actual_ttft_ms
        self._predicted_ttft.observe(predicted_ms / 1000)
        self._actual_ttft.observe(actual_ms / 1000)
        self._ttft_ratio.observe(actual_ms / max(predicted_ms, 0.001))
        drift = self._ttft
        drift.add(predicted_ms, actual_ms)
        factor = drift.actual / max(drift.predicted, 0.001)
        error_ms = abs(drift.actual - drift.predicted) / drift.weight
        is_off = not 1 / MAX_TTFT_FACTOR <= factor <= MAX_TTFT_FACTOR and error_ms > MIN_TTFT_ERROR_MS
        if is_off and drift.may_warn():
            logger.warning(
                "placement predicts badly: first tokens come after %.0f ms on average, %.0f ms were predicted",
                drift.actual / drift.weight,
                drift.predicted / drift.weight,
            )

    def observe_cached(self, route: Route, num_prompt_tokens: int) -> None:
        assert route.actual_cached_tokens is not None
        predicted, actual = route.predicted_cached_tokens, route.actual_cached_tokens
        self._predicted_cached.observe(predicted)
        self._actual_cached.observe(actual)
        self._cached_error.observe(abs(actual - predicted))
        drift = self._cached
        drift.add(num_prompt_tokens, abs(actual - predicted))
        if drift.actual > MAX_CACHED_ERROR * drift.predicted and drift.may_warn():
            logger.warning(
                "what is known of workers' caches is off: by %.0f %% of prompts' tokens on average",
                100 * drift.actual / drift.predicted,
            )


class _Drift:
    """Sums that forget."""

    def __init__(self) -> None:
        self.predicted = self.actual = self.weight = 0.0
        self._num_observed = 0
        self._warned_at = float("-inf")

    def add(self, predicted: float, actual: float) -> None:
        self.predicted = _MEMORY * self.predicted + predicted
        self.actual = _MEMORY * self.actual + actual
        self.weight = _MEMORY * self.weight + 1
        self._num_observed += 1

    def may_warn(self) -> bool:
        """If so, that counts as a warning."""
        now = time.monotonic()
        if self._num_observed < MIN_OBSERVATIONS or now - self._warned_at < WARNING_SECONDS:
            return False
        self._warned_at = now
        return True


def _explain(route: Route, max_candidates: int | None) -> Mapping[str, Any]:
    candidates = route.placement.candidates
    shown = candidates[:max_candidates]
    return {
        "predicted_ttft_ms": round(route.predicted_ttft_ms, 3),
        "actual_ttft_ms": None if route.actual_ttft_ms is None else round(route.actual_ttft_ms, 3),
        "predicted_cached_tokens": route.predicted_cached_tokens,
        "actual_cached_tokens": route.actual_cached_tokens,
        "refused": route.refused,
        "passed_over": route.passed_over,
        "candidates": [
            {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(candidate).items()}
            for candidate in shown
        ],
        "omitted": len(candidates) - len(shown),
    }
