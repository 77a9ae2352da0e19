"""What the HTTP edge measures, under the names that the field knows, prefixed relevo_."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.router.http.hot_metrics import HotCounter, HotHistogram

# Seconds. vLLM's bounds, so that dashboards carry over.
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


MAX_CLIENTS = 100  # named in metrics; what others do is added up under "other"


class EdgeMetrics:
    """Counters and histograms of one router, in the registry that /metrics shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "relevo_http_requests",
            "HTTP requests by route and status; 499: the client left before the end.",
            ("endpoint", "status"),
            registry=registry,
        )
        self._client_requests = Counter(
            "relevo_http_client_requests",
            "HTTP requests by the name of their API key.",
            ("client", "status"),
            registry=registry,
        )
        self._clients: set[str] = set()
        self.running = Gauge("relevo_http_requests_generating", "Requests being generated.", registry=registry)
        self.finished = Counter(
            "relevo_request_success", "Choices that came to their end.", ("finished_reason",), registry=registry
        )
        self.prompt_tokens = Counter("relevo_prompt_tokens", "Prompt tokens of answered requests.", registry=registry)
        self.cached_prompt_tokens = Counter(
            "relevo_prompt_tokens_cached", "Prompt tokens whose KV was not computed anew.", registry=registry
        )
        self.generation_tokens = HotCounter("relevo_generation_tokens", "Output tokens relayed.", registry=registry)
        self.time_to_first_token = Histogram(
            "relevo_time_to_first_token_seconds",
            "From a request's arrival to its first output token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = HotHistogram(
            "relevo_inter_token_latency_seconds",
            "Between a choice's output tokens; tokens that come together share their time.",
            buckets=_ITL_BUCKETS,
            registry=registry,
        )
        self.e2e_request_latency = Histogram(
            "relevo_e2e_request_latency_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=_E2E_BUCKETS,
            registry=registry,
        )

    def count_client(self, name: str, status: int) -> None:
        """One of the names that the keys file gives; the first so many that come have figures of their own."""
        if name not in self._clients:
            if len(self._clients) >= MAX_CLIENTS:
                name = "other"
            else:
                self._clients.add(name)
        self._client_requests.labels(name, str(status)).inc()


class RequestTimes:
    """One request's observations. arrived: seconds, on the clock of time.perf_counter."""

    def __init__(self, metrics: EdgeMetrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}  # by choice: when its latest token came

    def tokens(self, choice_index: int, num_tokens: int) -> None:
        now = time.perf_counter()
        last = self._last.get(choice_index)
        if not self._last:
            self._metrics.time_to_first_token.observe(now - self._arrived)
        if last is not None:
            self._metrics.inter_token_latency.observe((now - last) / num_tokens, num_tokens)
        self._last[choice_index] = now
        self._metrics.generation_tokens.value += num_tokens

    def answered(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._metrics.cached_prompt_tokens.inc(num_cached_tokens)
        self._metrics.e2e_request_latency.observe(time.perf_counter() - self._arrived)
