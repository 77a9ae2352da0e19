"""The outermost layer: request ids, keys, the count of answers, and the net under everything.

Heads of responses (`http.response.start`) go through it, and get their x-request-id here. Token streams go past it:
they write their bodies to `Exchange.send`, which is the server's own.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relevo.core.errors import InvalidRequest, RelevoError, Unauthenticated
from services.common.telemetry import trace_id
from services.router.admitted import Standing
from services.router.http.errors import error_response, internal_error
from services.router.http.keys import ApiKey, KeyRing
from services.router.http.limits import Limiter, LocalLimiter, Permit
from services.router.http.metrics import EdgeMetrics
from services.router.timeline import Timeline
from services.router.tracing import TraceContext, Tracer, read_traceparent

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
MAX_REQUEST_ID_CHARS = 128
MAX_TIMEOUT_MS = 2**31 - 1
MAX_WAITED_SECONDS = 60.0  # what says to have waited longer before it came was sent by another clock
_REQUEST_START = re.compile(rb"(?:t=)?(\d{1,12}(?:\.\d{1,9})?)")
OPEN_PATHS = frozenset({"/health", "/ui"})  # the page itself has no data: it asks for the key, and comes with it
_OPEN_FOLDER = "/ui/"
TIMINGS_HEADER = b"x-relevo-timings"

_SCOPE_KEY = "relevo.exchange"


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its answer.

    arrived: seconds, on the clock of time.perf_counter; received: when its body was there
    explains: the client asks why its request goes where it goes
    waited_seconds: before it arrived, by the X-Request-Start of the client or of a proxy
    trace: None unless there is a tracer, or the client has sent a traceparent
    tells_timings: the client asks where its time went
    timelines: of its choices
    client: the API key it came with; None where keys are not asked for
    key_salt: goes before the request's own cache_salt; "" = blocks are shared between API keys
    outcome: the status that is counted; differs from the one sent if a stream fails half way or its client leaves
    """

    request_id: str
    send: Send
    timeout_ms: int | None = None
    explains: bool = False
    client: ApiKey | None = None
    key_salt: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    received: float | None = None
    waited_seconds: float = 0.0
    trace: TraceContext | None = None
    tells_timings: bool = False
    timelines: list[Timeline] = field(default_factory=list)
    started: bool = False
    outcome: int = CLIENT_LEFT

    @staticmethod
    def of(scope: Scope) -> Exchange:
        exchange = scope[_SCOPE_KEY]
        assert isinstance(exchange, Exchange)
        return exchange

    def remaining_ms(self) -> int:
        """What is left of the client's deadline: 0 = it set none, negative = it is over."""
        if self.timeout_ms is None:
            return 0
        left = self.timeout_ms - round((time.perf_counter() - self.arrived) * 1e3)
        return left or -1

    def standing(self, priority: int) -> Standing:
        """In the queue. Raises InvalidRequest if its key may not ask for so much."""
        if self.client is None:
            return Standing(priority=priority)
        if priority < self.client.priority:
            raise InvalidRequest(
                f"priority {priority} is more urgent than the API key {self.client.name!r} may ask for:"
                f" {self.client.priority} or more",
                "priority",
            )
        return Standing(self.client.name, priority, self.client.weight)


class ExchangeLayer:
    """ASGI app around the API's app."""

    def __init__(
        self,
        api: ASGIApp,
        keys: KeyRing | None,
        metrics: EdgeMetrics,
        *,
        salt_by_api_key: bool = False,
        limiter: Limiter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """keys: None = open to everybody. tracer: None = nothing is exported.

        limiter: counts what keys with limits do; None: in this process
        """
        self._api = api
        self._keys = keys
        self._salt_by_api_key = salt_by_api_key
        self._limiter = LocalLimiter() if limiter is None else limiter
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), send)
        scope[_SCOPE_KEY] = exchange
        exchange.trace = self._trace(scope)
        if exchange.trace is not None:
            trace_id.set(f"{exchange.trace.trace_id:032x}")

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.started = True
                exchange.outcome = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(exchange)]
            await send(message)

        permit: Permit | None = None
        try:
            if self._keys is not None and not _is_open(scope["path"]):
                permit = await self._let_in(self._keys, exchange, scope)
            exchange.timeout_ms = _timeout_ms(scope)
            exchange.explains = _header(scope, b"x-relevo-explain") == b"1"
            exchange.waited_seconds = _waited_seconds(_header(scope, b"x-request-start"))
            exchange.tells_timings = _header(scope, TIMINGS_HEADER) == b"1"
            await self._api(scope, receive, send_head)
        except RelevoError as error:
            await error_response(error)(scope, receive, send_head)
        except Exception:
            logger.exception("request %s: internal error", exchange.request_id)
            exchange.outcome = 500
            if not exchange.started:
                await error_response(internal_error(exchange.request_id))(scope, receive, send_head)
        finally:
            if permit is not None:
                await permit.release()
            route = scope.get("route")
            endpoint = getattr(route, "path", "other")
            self._metrics.requests.labels(endpoint, str(exchange.outcome)).inc()
            if exchange.client is not None:
                self._metrics.count_client(exchange.client.name, exchange.outcome)
            _log(exchange, endpoint)
            if self._tracer is not None and exchange.trace is not None:
                self._tracer.ended(exchange.trace, endpoint, exchange.arrived, exchange.outcome, exchange.timelines)
            del scope[_SCOPE_KEY]  # it has uvicorn's `send`, which has the scope: garbage that only gc would find

    def _trace(self, scope: Scope) -> TraceContext | None:
        header = _header(scope, b"traceparent")
        if scope["method"] != "POST" or (header is None and self._tracer is None):
            return None
        return read_traceparent(header)

    def _headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", exchange.request_id.encode())]
        if exchange.trace is not None:
            headers.append((b"traceparent", self.traceparent(exchange.trace).encode()))
        return headers

    def traceparent(self, trace: TraceContext) -> str:
        """What the client and the workers are told."""
        is_sampled = trace.is_asked if self._tracer is None else self._tracer.is_sampled(trace)
        return trace.traceparent(is_sampled=is_sampled)

    async def _let_in(self, keys: KeyRing, exchange: Exchange, scope: Scope) -> Permit | None:
        """Find out whose request it is. Raises Unauthenticated; Exhausted if its key may not send another one now."""
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        key = key.strip()
        if not key:
            raise Unauthenticated("no API key: send it in the header 'Authorization: Bearer KEY'")
        client = keys.find(key) if scheme.lower() == b"bearer" else None
        if client is None:
            raise Unauthenticated("the API key in the header 'Authorization' is not this server's")
        exchange.client = client
        if self._salt_by_api_key:
            exchange.key_salt = _key_salt(key)
        if client.is_limited and scope["method"] == "POST":  # looking costs nothing
            return await self._limiter.acquire(client)
        return None


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(_OPEN_FOLDER)


def _log(exchange: Exchange, endpoint: str) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        seconds = time.perf_counter() - exchange.arrived
        client = f" of {exchange.client.name}" if exchange.client is not None else ""
        logger.debug("request %s%s: %s %d in %.3f s", exchange.request_id, client, endpoint, exchange.outcome, seconds)


async def handle_bug(request: Request, error: Exception) -> Response:
    """The answer to an exception that is no RelevoError; starlette raises it again, and the layer logs it."""
    return error_response(internal_error(Exchange.of(request.scope).request_id))


def _key_salt(key: bytes) -> str:
    """Of fixed length, so that no cache_salt makes one key's salt another's. Workers get it, and learn nothing."""
    return hashlib.sha256(b"relevo cache salt of an API key\0" + key).hexdigest()


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            assert isinstance(value, bytes)
            return value
    return None


def _waited_seconds(request_start: bytes | None) -> float:
    """Since `t=SECONDS` (since 1970), as nginx, Heroku and others have it; 0 if that cannot be: clocks differ."""
    found = _REQUEST_START.fullmatch(request_start) if request_start is not None else None
    seconds = time.time() - float(found[1]) if found is not None else 0.0
    return seconds if 0 < seconds < MAX_WAITED_SECONDS else 0.0


def _request_id(scope: Scope) -> str:
    """The client's, if it is one that can go into logs and headers; else a new one."""
    given = (_header(scope, b"x-request-id") or b"").decode("latin-1")
    if 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(16)


def _timeout_ms(scope: Scope) -> int | None:
    given = _header(scope, b"x-request-timeout-ms")
    if given is None:
        return None
    if not given.isdigit() or not 1 <= int(given[:20]) <= MAX_TIMEOUT_MS:
        shown = given[:40].decode("latin-1")
        raise InvalidRequest(
            f"x-request-timeout-ms must be a number of milliseconds from 1 to {MAX_TIMEOUT_MS}, not {shown!r}",
            "x-request-timeout-ms",
        )
    return int(given)
