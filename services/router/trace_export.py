"""Spans to an OTLP collector. Imported only where there is an endpoint: opentelemetry is not light."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from relevo import __version__
from services.router.timeline import Span
from services.router.tracing import TraceContext

logger = logging.getLogger(__name__)

MAX_QUEUED = 8192  # spans; the oldest are dropped beyond
MAX_BATCH = 512
EXPORT_SECONDS = 5.0  # for one batch, tries and all
SHUTDOWN_SECONDS = 2.0
MAX_RESOURCES = 1024  # workers come and go

_FLAGS = TraceFlags(TraceFlags.SAMPLED)


class SpanQueue:
    """put() never waits and never raises."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        """exporter: for tests; None: OTLP over gRPC to endpoint."""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it says everything with every batch; we, once
        if exporter is None:
            insecure = True if "://" not in endpoint else None
            exporter = OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=EXPORT_SECONDS)
        self._processor = BatchSpanProcessor(
            _Reporting(exporter, endpoint),
            max_queue_size=MAX_QUEUED,
            max_export_batch_size=MAX_BATCH,
            schedule_delay_millis=1000,
        )
        self._resources: dict[tuple[str, str], Resource] = {}

    def put(self, context: TraceContext, spans: Sequence[Span]) -> None:
        """The first is the request's own."""
        offset = time.time_ns() - time.perf_counter_ns()

        def nanoseconds(seconds: float) -> int:
            return offset + round(seconds * 1e9)

        contexts = [
            SpanContext(context.trace_id, context.span_id if not place else random.getrandbits(64) or 1, False, _FLAGS)
            for place in range(len(spans))
        ]
        caller = SpanContext(context.trace_id, context.parent_id, True, _FLAGS) if context.parent_id else None
        for place, span in enumerate(spans):
            parent = caller if span.parent is None else contexts[span.parent]
            has_failed = "error.type" in span.attributes
            self._processor.on_end(
                ReadableSpan(
                    span.name,
                    context=contexts[place],
                    parent=parent,
                    resource=self._resource(span),
                    attributes=_plain(span.attributes),
                    events=[Event(name, _plain(about), nanoseconds(at)) for at, name, about in span.events],
                    kind=SpanKind.SERVER if not place else SpanKind.INTERNAL,
                    status=Status(StatusCode.ERROR) if has_failed else Status(StatusCode.UNSET),
                    start_time=nanoseconds(span.began_at),
                    end_time=nanoseconds(max(span.began_at, span.ended_at)),
                )
            )

    def flush(self) -> None:
        """Blocking: export what is queued."""
        self._processor.force_flush(int(1e3 * EXPORT_SECONDS))

    def close(self) -> None:
        """Blocking, for SHUTDOWN_SECONDS and a little."""
        self._processor._batch_processor.shutdown(int(1e3 * SHUTDOWN_SECONDS))  # its own shutdown() has no bound

    def _resource(self, span: Span) -> Resource:
        key = (span.service, span.instance)
        if key not in self._resources:
            if len(self._resources) >= MAX_RESOURCES:
                self._resources.clear()
            about = {"service.name": f"relevo-{span.service}", "service.version": __version__}
            if span.instance:
                about["service.instance.id"] = span.instance
            self._resources[key] = Resource(about)
        return self._resources[key]


class _Reporting(SpanExporter):
    """Says once that spans are lost, and once that they are not any more."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:
            logger.debug("exporting spans failed", exc_info=True)
            result = SpanExportResult.FAILURE
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            logger.warning("the collector at %s takes no traces: they are lost, requests are not", self._endpoint)
        elif self._fails and not fails:
            logger.info("the collector at %s takes traces again", self._endpoint)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, str | int | float | bool)}
