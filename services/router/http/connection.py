"""One client's connection: uvicorn's httptools protocol, with bounds on what a client sends and how long it takes.

A connection is at any time in one of these states, and in none of them for longer than a client may keep it there:

    head      until the head of a request is complete               head_seconds
    body      from there until its body is                          body_seconds
    working   until the answer is written: the request's own deadline
    stalled   more than 64 KiB of the answer wait for the client    write_seconds for each 48 KiB that it takes
    idle      between two requests                                  uvicorn's keep-alive
    closing   the rest of the answer goes out                       write_seconds

watch_connections looks at all of them every so often: requests need no timers of their own for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httptools
import orjson
from prometheus_client import CollectorRegistry, Counter
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from relevo.core.errors import InvalidRequest, PayloadTooLarge, RelevoError, Unavailable
from services.router.http.errors import error_reply

logger = logging.getLogger(__name__)

MAX_HEADERS = 128
MAX_PIPELINED = 16  # requests sent while another is being answered; no client that we know sends any
MAX_WATCH_SECONDS = 0.5
_HEADER_OVERHEAD_BYTES = 4  # ": " and the end of the line
_HOP_HEADERS = frozenset({b"connection", b"upgrade", b"http2-settings"})


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """max_connections: who comes beyond them gets a 503. max_head_bytes: request line and headers together."""

    max_connections: int = 4096
    max_head_bytes: int = 32 << 10
    head_seconds: float = 15.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0

    @property
    def watch_seconds(self) -> float:
        """How often to look: often enough for the shortest limit."""
        return min(MAX_WATCH_SECONDS, self.head_seconds / 4, self.body_seconds / 4, self.write_seconds / 4)


class HeadTooLarge(InvalidRequest):
    """Request line and headers exceed the limit."""

    http_status = 431


class TooSlow(InvalidRequest):
    """The client took too long to send its request."""

    http_status = 408


class ConnectionMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.cut = Counter(
            "relevo_http_connections_cut",
            "Connections that the router ended: `slow_head`, `slow_body`, `slow_reader`, "
            "`head_too_large`, `malformed`, `pipelined`, `too_many`",
            ("reason",),
            registry=registry,
        )


def limited_protocol(limits: ConnectionLimits, metrics: ConnectionMetrics) -> type[HttpToolsProtocol]:
    """For uvicorn's Config.http, which takes a class that it calls with arguments of its own."""
    return type("BoundProtocol", (LimitedProtocol,), {"limits": limits, "metrics": metrics})


async def watch_connections(connections: Iterable[object], limits: ConnectionLimits) -> None:
    """Never returns. connections: uvicorn's own set."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(limits.watch_seconds)
        now = loop.time()
        for connection in list(connections):
            assert isinstance(connection, LimitedProtocol)
            connection.check_time(now)


class LimitedProtocol(HttpToolsProtocol):
    limits: ConnectionLimits
    metrics: ConnectionMetrics

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # Deadlines, on the loop's clock; None where there is nothing to wait for.
        self._read_deadline: float | None = None
        self._write_deadline: float | None = None
        self._close_deadline: float | None = None
        self._running: RequestResponseCycle | None = None  # self.cycle is the last that was read, which may wait for it
        self._in_head = True
        self._num_fed_bytes = 0  # since the head began: the parser does not show what it has of an unfinished header
        self._num_head_bytes = 0  # that it has shown
        self._upgrades = False

    def check_time(self, now: float) -> None:
        """Cut the connection if it is over its time."""
        if self.transport.is_closing():  # asyncio waits without a bound for what was written to be read
            if self._close_deadline is None:
                self._close_deadline = now + self.limits.write_seconds
            elif now > self._close_deadline:
                self._abort("slow_reader")
        elif self._write_deadline is not None and now > self._write_deadline:
            self._abort("slow_reader")
        elif self._read_deadline is not None and now > self._read_deadline:
            if self.flow.read_paused:  # it is us who don't read
                self._read_deadline = now + self.limits.body_seconds
            elif self._in_head:
                self._refuse("slow_head", TooSlow(f"no whole head within {self.limits.head_seconds:g} s"))
            else:
                self._refuse("slow_body", TooSlow(f"no whole body within {self.limits.body_seconds:g} s"))

    # --- Called by the transport ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:  # uvloop's TLS never ends a write under such a limit
            # Write at once what is given to it: else uvloop keeps a token until all others of this turn are made, too.
            transport.set_write_buffer_limits(high=0)
        self._read_deadline = self.loop.time() + self.limits.head_seconds
        if len(self.connections) > self.limits.max_connections:
            self._refuse("too_many", Unavailable("the server has as many connections as it may have"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._in_head:
            self._num_fed_bytes += len(data)
            if self._read_deadline is None and not self._is_working():
                self._read_deadline = self.loop.time() + self.limits.head_seconds
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, RelevoError):
                self._refuse("head_too_large" if isinstance(cause, HeadTooLarge) else "pipelined", cause)
            else:
                self._refuse("malformed", InvalidRequest("this is not a valid HTTP/1.1 request"))
        else:
            if self._in_head and self._num_fed_bytes > self.limits.max_head_bytes:
                self._refuse("head_too_large", self._head_too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.time() + self.limits.write_seconds

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_deadline = None

    # --- Called by the parser; what they raise becomes the context of data_received's HttpParserError -------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = 0
        self._read_deadline = self.loop.time() + self.limits.head_seconds

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value))
        if len(self.headers) > MAX_HEADERS:
            raise HeadTooLarge(f"the request has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise InvalidRequest(f"at most {MAX_PIPELINED} requests may wait behind the one that is being answered")
        self._upgrades = self.parser.should_upgrade()
        if self._upgrades:
            return  # _feed goes on with it
        super().on_headers_complete()
        self.flow.resume_reading()  # uvicorn pauses it behind a running request, and would not see its client leave
        self._in_head = False
        self._read_deadline = self.loop.time() + self.limits.body_seconds

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            raise PayloadTooLarge(f"a request behind another one may have {HIGH_WATER_LIMIT} bytes of body")

    def on_message_complete(self) -> None:
        if self._upgrades:
            return
        super().on_message_complete()
        self._in_head = True
        self._num_fed_bytes = 0
        self._read_deadline = None

    # --- Called by uvicorn ----------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # --- Helpers --------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        """A wish for another protocol is one that need not be granted (RFC 9110, 7.8), but the parser stops there and
        would lose the body: so it is given the request again, without the wish. Java's HttpClient has it by default.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method = self.parser.get_method()
            if method == b"CONNECT":
                raise httptools.HttpParserError("CONNECT is for proxies") from None
            version = self.parser.get_http_version().encode()
            headers = [b"%b: %b\r\n" % header for header in self.headers if header[0] not in _HOP_HEADERS]
            head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(headers))
            self.parser = httptools.HttpRequestParser(self)
            self._feed(head + data[upgrade.args[0] :])

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes + _HEADER_OVERHEAD_BYTES
        if self._num_head_bytes > self.limits.max_head_bytes:
            raise self._head_too_large()

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"request line and headers are larger than {self.limits.max_head_bytes} bytes")

    def _refuse(self, reason: str, error: RelevoError) -> None:
        """Say why, if nothing was said yet, and hang up; whoever works on a request here hears that its client left."""
        if self._running is not None and self._running.response_started and not self._running.response_complete:
            self._abort(reason)
            return
        self._leave()
        self._count_cut(reason)
        self._read_deadline = None
        body = orjson.dumps(error_reply(error))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.http_status] + head + body)
        self.transport.close()

    def _is_working(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _leave(self) -> None:
        """Tell whoever works on a request; uvicorn would tell it to the last one that was read, begun or not."""
        self.pipeline.clear()
        if self._running is not None and self._is_working():
            self._running.disconnected = True
            self._running.message_event.set()

    def _abort(self, reason: str) -> None:
        self._count_cut(reason)
        self._close_deadline = self.loop.time() + self.limits.write_seconds
        self.transport.abort()

    def _count_cut(self, reason: str) -> None:
        self.metrics.cut.labels(reason).inc()
        logger.debug("connection from %s cut: %s", self.client, reason)
