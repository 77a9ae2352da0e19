"""Which traces are kept, and that a collector that is not there disturbs nobody."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from services.router.timeline import Span, Timeline
from services.router.trace_export import SpanQueue
from services.router.tracing import TraceContext, Tracer, TracingConfig, read_traceparent, tracing_config
from tests.support.otlp_receiver import otlp_receiver

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Kept(SpanQueue):
    def __init__(self) -> None:
        self.kept: list[Sequence[Span]] = []

    def put(self, context: TraceContext, spans: Sequence[Span]) -> None:
        self.kept.append(spans)


def decide(config: TracingConfig, context: TraceContext, *, status: int = 200, took: float = 0.0) -> int:
    queue = Kept()
    timeline = Timeline(time.perf_counter() - took)
    Tracer(config, queue, CollectorRegistry()).ended(context, "/v1/completions", timeline.arrived, status, [timeline])
    return len(queue.kept)


@pytest.mark.parametrize(
    ("header", "is_asked"),
    [(f"00-{TRACE}-b7ad6b7169203331-01", True), (f"00-{TRACE}-b7ad6b7169203331-00", False),
     (f"cc-{TRACE}-b7ad6b7169203331-01-more", True)],
)  # fmt: skip
def test_callers_context_goes_on(header: str, is_asked: bool) -> None:
    context = read_traceparent(header.encode())
    assert f"{context.trace_id:032x}" == TRACE
    assert context.parent_id == 0xB7AD6B7169203331
    assert context.is_asked is is_asked
    assert context.traceparent(is_sampled=True).split("-")[1] == TRACE
    assert len(context.traceparent(is_sampled=True)) == 55


@pytest.mark.parametrize(
    "header",
    [None, b"", b"nonsense", f"ff-{TRACE}-b7ad6b7169203331-01".encode(), f"00-{'0' * 32}-b7ad6b7169203331-01".encode(),
     f"00-{TRACE}-{'0' * 16}-01".encode(), f"00-{TRACE}-b7ad6b7169203331-01-more".encode()],
)  # fmt: skip
def test_no_valid_context_begins_a_trace(header: bytes | None) -> None:
    context = read_traceparent(header)
    assert context.trace_id not in (0, int(TRACE, 16))
    assert context.parent_id is None and not context.is_asked


def test_errors_slow_ones_and_those_asked_for_are_kept_whatever_the_ratio() -> None:
    config, plain = TracingConfig(ratio=0.0, slow_ms=500), TraceContext(7, 7)
    assert decide(config, plain) == 0
    assert decide(config, plain, status=429) == 0
    assert decide(config, plain, status=503) == 1
    assert decide(config, plain, took=0.6) == 1
    assert decide(config, TraceContext(7, 7, 1, True)) == 1


def test_ratio_is_kept_by_the_traces_id() -> None:
    """So that two routers decide alike. 2,000 draws: off by 3 points once in some thousand runs at most."""
    config = TracingConfig(ratio=0.1)
    contexts = [read_traceparent(None) for _ in range(2000)]
    first = [decide(config, context) for context in contexts]
    assert first == [decide(config, context) for context in contexts]
    assert 0.07 < sum(first) / len(first) < 0.13


def test_opentelemetrys_variables_hold_where_no_option_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    assert tracing_config(None, None, None) == TracingConfig(endpoint="http://collector:4317", ratio=0.5)
    assert tracing_config("here:1", 0.25, 9.0) == TracingConfig(endpoint="here:1", ratio=0.25, slow_ms=9.0)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "often")
    with pytest.raises(ValueError, match="OTEL_TRACES_SAMPLER_ARG is 'often'"):
        tracing_config(None, None, None)


def test_collector_gets_spans_by_service() -> None:
    with otlp_receiver() as (receiver, endpoint):
        queue = SpanQueue(endpoint)
        now = time.perf_counter()
        root = Span("http.request", "router", now - 1, now, {"gen_ai.request.model": "m", "none": None})
        child = Span("decode", "decode", now - 0.5, now, {"tokens": 3}, 0, "d0")
        queue.put(TraceContext(5, 6), [root, child])
        queue.flush()
        found = {span.name: span for span in receiver.trace(f"{5:032x}")}
        queue.close()
    assert found["decode"].parent_id == found["http.request"].span_id == f"{6:016x}"
    assert (found["decode"].service, found["decode"].attributes) == ("relevo-decode", {"tokens": 3})
    assert found["http.request"].end - found["http.request"].start == pytest.approx(1e9, abs=1e6)


def test_no_collector_is_said_once_and_ends_soon(caplog: pytest.LogCaptureFixture) -> None:
    with otlp_receiver() as (_, endpoint):
        pass  # gone
    queue = SpanQueue(endpoint)
    now = time.perf_counter()
    caplog.set_level(logging.INFO)
    for _ in range(3):
        queue.put(TraceContext(5, 6), [Span("http.request", "router", now, now, {})])
        queue.flush()
    began_at = time.monotonic()
    queue.close()
    assert time.monotonic() - began_at < 10
    assert [record.name for record in caplog.records if "takes no traces" in record.getMessage()] == [
        "services.router.trace_export"
    ]
