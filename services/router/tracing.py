"""Which requests' traces are kept, and their way to a collector (docs/adr/0020).

The decision is made at the end of a request, when it is known whether it failed or was slow. What is kept is made into
spans then and queued; a thread exports. A collector that is slow or gone costs spans, never a request.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter

from services.router.timeline import Span, Timeline

if TYPE_CHECKING:
    from services.router.trace_export import SpanQueue

logger = logging.getLogger(__name__)

DEFAULT_RATIO = 0.01
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """parent_id: the caller's span. span_id: ours, of the request. is_asked: the caller keeps its part of the trace."""

    trace_id: int
    span_id: int
    parent_id: int | None = None
    is_asked: bool = False

    def traceparent(self, *, is_sampled: bool) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(is_sampled):02x}"


def read_traceparent(header: bytes | None) -> TraceContext:
    """What W3C's header says; a trace of its own where there is none, or none that is valid."""
    found = _TRACEPARENT.fullmatch(header.strip()) if header else None
    span_id = random.getrandbits(64) or 1
    if found is not None and found[1] != b"ff" and not (found[1] == b"00" and found[5]):
        trace_id, parent_id = int(found[2], 16), int(found[3], 16)
        if trace_id and parent_id:
            return TraceContext(trace_id, span_id, parent_id, bool(int(found[4], 16) & _SAMPLED))
    return TraceContext(random.getrandbits(128) or 1, span_id)


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """endpoint: of an OTLP collector, gRPC: host:port, http://… or https://…; None: nothing is exported

    ratio: of the requests that are neither slow nor failed; slow_ms: from arrival to the end, None: none is slow
    """

    endpoint: str | None = None
    ratio: float = DEFAULT_RATIO
    slow_ms: float | None = None


def tracing_config(endpoint: str | None, ratio: float | None, slow_ms: float | None) -> TracingConfig:
    """What is not given is taken from OpenTelemetry's own variables. Raises ValueError."""
    environ = os.environ
    endpoint = (
        endpoint
        or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or None
    )
    if ratio is None:
        given = environ.get("OTEL_TRACES_SAMPLER_ARG", "")
        try:
            ratio = float(given) if given else DEFAULT_RATIO
        except ValueError:
            ratio = -1.0
        if not 0 <= ratio <= 1:
            raise ValueError(f"OTEL_TRACES_SAMPLER_ARG is {given!r}: a number from 0 to 1 is right")
    return TracingConfig(endpoint=endpoint, ratio=ratio, slow_ms=slow_ms)


class Tracer:
    """Of one router with an endpoint."""

    def __init__(self, config: TracingConfig, queue: SpanQueue, registry: CollectorRegistry) -> None:
        self._config = config
        self._queue = queue
        self._threshold = round(config.ratio * 2**56)
        self._kept = Counter(
            "relevo_router_traces",
            "Requests by why their trace was kept: `asked` (by the caller's traceparent), "
            "`error`, `slow`, `sampled`; or `dropped`",
            ("decision",),
            registry=registry,
        )

    def is_sampled(self, context: TraceContext) -> bool:
        """As it is known at the start; by the trace's id, so that all routers decide alike."""
        return context.is_asked or (context.trace_id & (2**56 - 1)) < self._threshold

    def ended(
        self, context: TraceContext, name: str, arrived: float, status: int, timelines: Sequence[Timeline]
    ) -> None:
        """name: of the route. arrived: on the clock of time.perf_counter. status: what the client got."""
        seconds = time.perf_counter() - arrived
        decision = self._decide(context, seconds, status, timelines)
        self._kept.labels(decision).inc()
        if decision != "dropped":
            self._queue.put(context, _with_root(name, arrived, status, timelines))

    def _decide(self, context: TraceContext, seconds: float, status: int, timelines: Sequence[Timeline]) -> str:
        if context.is_asked:
            return "asked"
        if status >= 500 or any(timeline.error not in (None, "cancelled") for timeline in timelines):
            return "error"
        if self._config.slow_ms is not None and seconds * 1e3 >= self._config.slow_ms:
            return "slow"
        return "sampled" if self.is_sampled(context) else "dropped"


def _with_root(name: str, arrived: float, status: int, timelines: Sequence[Timeline]) -> list[Span]:
    """All choices' spans under the request's."""
    about: dict[str, Any] = {"http.route": name, "http.response.status_code": status}
    if status >= 500:
        about["error.type"] = str(status)
    spans: list[Span] = []
    for number, timeline in enumerate(timelines):
        own = timeline.spans()
        if not number:
            root = own[0]
            spans.append(
                Span(
                    root.name,
                    root.service,
                    arrived,
                    time.perf_counter(),
                    {**root.attributes, **about},
                    None,
                    "",
                    root.events,
                )
            )
        shift = len(spans) - 1
        for span in own[1:]:
            parent = 0 if not span.parent else span.parent + shift
            attributes = span.attributes if len(timelines) == 1 else {**span.attributes, "relevo.choice": number}
            spans.append(
                Span(
                    span.name,
                    span.service,
                    span.began_at,
                    span.ended_at,
                    attributes,
                    parent,
                    span.instance,
                    span.events,
                )
            )
    return spans or [Span("http.request", "router", arrived, time.perf_counter(), about)]
