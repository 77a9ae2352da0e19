"""A collector: OpenTelemetry's TraceService, which keeps what it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class ReceivedSpan:
    """parent_id: "" of one without. Times in nanoseconds since 1970."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: tuple[str, ...]
    is_error: bool


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """spans: in the order in which they came. Any thread."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        received = [
            _read(span, _values(of_resource.resource.attributes)["service.name"])
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]
        with self._changed:
            self.spans += received
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str, seconds: float = 20) -> list[ReceivedSpan]:
        """Its spans, as soon as the request's own is among them. Raises AssertionError."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                found = [span for span in self.spans if span.trace_id == trace_id]
                names = {span.span_id for span in found}
                if found and all(span.parent_id in names for span in found if span.name != "http.request"):
                    return found
                assert self._changed.wait(max(0.0, deadline - time.monotonic())), f"{trace_id}: {found}"


def _read(span: Any, service: str) -> ReceivedSpan:
    return ReceivedSpan(
        span.name,
        service,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        tuple(event.name for event in span.events),
        span.status.code == 2,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def otlp_receiver() -> Iterator[tuple[OtlpReceiver, str]]:
    """The receiver, and its address."""
    receiver = OtlpReceiver()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(5)
