"""The ASGI response that pulls generations, and its two ways of writing: server-sent events, or one JSON object.

The response owns a TaskGroup: one task a choice if there are several, and one that waits for the client to hang up.
Whatever ends the group early cancels what pulls the choices, and each of them closes its generation. Heads go through
the app's layers, bodies go straight to the server: between a token and the socket there are the detokenizer and orjson.

A slow reader: `send` waits, so its choices are not pulled; their queues in dispatch are bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from relevo.core.errors import RelevoError
from services.router.http.answer import Answer, Payloads, Usage, count_usage, keep_best
from services.router.http.choice import Choice, Delta
from services.router.http.errors import error_reply, internal_error
from services.router.http.exchange import CLIENT_LEFT, TIMINGS_HEADER, Exchange
from services.router.http.explain import explaining
from services.router.http.metrics import EdgeMetrics, RequestTimes

logger = logging.getLogger(__name__)

TIMINGS_FIELD = "relevo_timings"  # of a stream's last event
_DONE = b"data: [DONE]\n\n"


class Writer(Protocol):
    """send: through the app's layers, for heads."""

    async def write(self, choice: Choice, delta: Delta, send: Send) -> None: ...

    async def finish(self, usage: Usage, send: Send, timings: Mapping[str, float] | None) -> None: ...


class GenerationResponse(Response):
    """Pulls all choices side by side and hands their deltas to the writer as they come.

    An error before anything was sent leaves as an exception, for a proper status; one after that becomes an event.
    """

    def __init__(
        self,
        exchange: Exchange,
        choices: Sequence[Choice],
        prompt_lengths: Sequence[int],
        writer: Writer,
        metrics: EdgeMetrics,
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self._choices = choices
        self._prompt_lengths = prompt_lengths
        self._writer = writer
        self._metrics = metrics
        self._times = RequestTimes(metrics, exchange.arrived)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._exchange.explains:
            send = explaining(send, self._choices)
        with self._metrics.running.track_inprogress():
            try:
                async with asyncio.TaskGroup() as group:
                    watcher = group.create_task(_watch(receive))
                    await self._pull_all(group, send)
                    watcher.cancel()
            except ExceptionGroup as failed:
                await self._fail(_cause(failed))
                return
        usage = count_usage(self._choices, self._prompt_lengths)
        details = usage["prompt_tokens_details"]
        self._times.answered(usage["prompt_tokens"], details["cached_tokens"] if details else 0)
        await self._writer.finish(usage, send, _timings(self._choices) if self._exchange.tells_timings else None)

    async def _pull_all(self, group: asyncio.TaskGroup, send: Send) -> None:
        if len(self._choices) == 1:  # nearly always: a task of its own would cost a tenth of the request
            await self._pull(self._choices[0], send)
        else:
            await asyncio.wait([group.create_task(self._pull(choice, send)) for choice in self._choices])

    async def _pull(self, choice: Choice, send: Send) -> None:
        try:
            finish_reason = None
            while finish_reason is None:
                delta = await choice.next()
                if delta.num_tokens:
                    self._times.tokens(choice.index, delta.num_tokens)
                await self._writer.write(choice, delta, send)
                finish_reason = delta.finish_reason
            self._metrics.finished.labels(finish_reason).inc()
            choice.timeline.end()
        finally:
            choice.timeline.end("cancelled")
            await choice.aclose()

    async def _fail(self, error: Exception) -> None:
        if isinstance(error, _ClientLeft):
            self._exchange.outcome = CLIENT_LEFT
            return
        if not self._exchange.started:
            raise error
        request_id = self._exchange.request_id
        shown = error if isinstance(error, RelevoError) else internal_error(request_id)
        self._exchange.outcome = shown.http_status
        await self._exchange.send(_body(_events([error_reply(shown)]), more=False))
        if shown is not error:
            raise error
        logger.warning("request %s failed in the middle of its stream: %s", request_id, shown.message)


class EventWriter:
    """Server-sent events: all that one event of a generation adds is one write."""

    def __init__(self, exchange: Exchange, payloads: Payloads, *, include_usage: bool, alone: bool) -> None:
        """alone: there is one choice; else they write one after the other, the head before all of them"""
        self._exchange = exchange
        self._payloads = payloads
        self._include_usage = include_usage
        self._turn = None if alone else asyncio.Lock()

    async def write(self, choice: Choice, delta: Delta, send: Send) -> None:
        if self._turn is None:
            await self._write(choice, delta, send)
        else:
            async with self._turn:
                await self._write(choice, delta, send)

    async def _write(self, choice: Choice, delta: Delta, send: Send) -> None:
        chunks = self._payloads.chunks(choice, delta)
        if not self._exchange.started:
            await send(_head(*_EVENT_HEADERS))
        body = _body(_events(chunks)) if chunks else None
        if choice.timeline.second_at is None and delta.num_tokens:
            choice.timeline.written()  # not after the write: it may wake the client, and the client take this core
        if body:
            await self._exchange.send(body)

    async def finish(self, usage: Usage, send: Send, timings: Mapping[str, float] | None) -> None:
        last = b""
        if self._include_usage or timings is not None:
            chunk = dict(self._payloads.usage_chunk(usage))
            if not self._include_usage:
                del chunk["usage"]
            if timings is not None:
                chunk[TIMINGS_FIELD] = timings
            last = _events([chunk])
        await self._exchange.send(_body(last + _DONE, more=False))


class WholeWriter:
    """One JSON object when all choices have ended. keep: so many of each prompt's, the likeliest."""

    def __init__(self, payloads: Payloads, choices: Sequence[Choice], *, keep: int) -> None:
        self._payloads = payloads
        self._keep = keep
        self._answers = {choice.index: Answer(choice) for choice in choices}

    async def write(self, choice: Choice, delta: Delta, send: Send) -> None:
        if delta.num_tokens:
            choice.timeline.written()
        self._answers[choice.index].add(delta)

    async def finish(self, usage: Usage, send: Send, timings: Mapping[str, float] | None) -> None:
        body = orjson.dumps(self._payloads.whole(keep_best(list(self._answers.values()), self._keep), usage))
        told = [(TIMINGS_HEADER, orjson.dumps(timings))] if timings is not None else []
        await send(_head((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *told))
        await send(_body(body, more=False))


def _timings(choices: Sequence[Choice]) -> Mapping[str, float]:
    """Of the choice that had a token first."""
    first = min(choices, key=lambda choice: choice.timeline.first_at or float("inf"))
    return first.timeline.timings()


class _ClientLeft(Exception):
    """Ends the TaskGroup; never leaves this module."""


_EVENT_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx collects events before it passes them on
)


async def _watch(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _ClientLeft


def _cause(failed: ExceptionGroup[Exception]) -> Exception:
    """That the client left explains all other errors; else the first one counts."""
    left = (error for error in failed.exceptions if isinstance(error, _ClientLeft))
    return next(left, failed.exceptions[0])


def _events(payloads: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(payload) for payload in payloads)


def _head(*headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def _body(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
