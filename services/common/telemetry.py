"""Logs, configured in `main` only, and Prometheus metrics."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from relevo.core.errors import StartupError

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Set where a request enters a task; every log line below carries it. `extra={"request_id": …}` does the same."""


trace_id: ContextVar[str] = ContextVar("trace_id", default="")
"""The same, of the trace that the request belongs to: 32 hexadecimal digits; "" = none."""


def trace_id_of(traceparent: str) -> str:
    """Of a W3C trace context that we have made; "" of none."""
    return traceparent[3:35]


traceparent: ContextVar[str] = ContextVar("traceparent", default="")
"""W3C trace context for the gRPC calls that are made for a request, as metadata of that name."""


def enter_trace(context: str) -> None:
    """In the task that works on a request, from now on: log lines and calls belong to its trace. "": to none."""
    traceparent.set(context)
    trace_id.set(trace_id_of(context))


def trace_metadata() -> tuple[tuple[str, str], ...] | None:
    """For a call, of this task's trace."""
    context = traceparent.get()
    return (("traceparent", context),) if context else None


def enter_callers_trace(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """In a handler: what its caller's metadata say."""
    for name, value in metadata or ():
        if name == "traceparent" and isinstance(value, str) and len(value) == 55:
            enter_trace(value)


class _Formatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s relevo-{role}: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        of_record = getattr(record, "request_id", "") or request_id.get()
        of_trace = getattr(record, "trace_id", "") or trace_id.get()
        named = [f"{name}={value}" for name, value in (("request_id", of_record), ("trace_id", of_trace)) if value]
        return f"{text} [{' '.join(named)}]" if named else text


def configure_logging(role: str, level: str) -> None:
    """All logs to standard error. Called once, by `main`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("asyncio", "grpc", "httpx", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(root.level, logging.WARNING))


def make_registry() -> CollectorRegistry:
    """A process's own registry, with the interpreter's and the process's figures in it."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render_metrics(registry: CollectorRegistry) -> tuple[bytes, str]:
    """Body and content type of a /metrics reply."""
    return generate_latest(registry), CONTENT_TYPE_LATEST


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Serve /metrics from a thread of its own; returns the port and what stops it.

    Raises StartupError if the port is taken.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise StartupError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another --metrics-port"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
