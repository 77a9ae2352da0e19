"""A client that costs little: keep-alive connections, bytes counted and not parsed. For `relevo bench router`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from relevo.core.errors import RelevoError

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_END = b"0\r\n\r\n"  # of a chunked body
_EVENT = b"data: {"


@dataclass(slots=True)
class Load:
    """What came of a number of requests. ttft_seconds: until the first event, or the whole body."""

    seconds: float = 0.0
    num_requests: int = 0
    num_events: int = 0
    ttft_seconds: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Raises RelevoError for every answer but 200."""

    def __init__(self) -> None:
        self.num_events = 0
        self.first_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""
        self._left = -1  # of a body with a length; -1: the head is not complete, or the body is chunked
        self._is_chunked = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    async def ask(self, request: bytes) -> None:
        assert self._transport is not None
        self._waiter = asyncio.get_running_loop().create_future()
        self._head, self._left, self._is_chunked, self._tail = b"", -1, False, b""
        self.num_events, self.first_at = 0, 0.0
        self._transport.write(request)
        await self._waiter

    def data_received(self, data: bytes) -> None:
        if self._left < 0 and not self._is_chunked:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._end(RelevoError(f"the endpoint answered {head[:40]!r}: {data[:200]!r}"))
                return
            length = _LENGTH.search(head)
            self._is_chunked = length is None
            self._left = int(length[1]) if length is not None else -1
        if data and not self.first_at:
            self.first_at = time.perf_counter()
        if self._is_chunked:
            self.num_events += data.count(_EVENT)
            self._tail = (self._tail + data)[-len(_END) :]
            if self._tail == _END:
                self._end(None)
        else:
            self._left -= len(data)
            if self._left <= 0:
                self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(RelevoError(f"the endpoint closed the connection: {error}"))

    def close(self) -> None:
        if self._transport is not None:
            self._waiter = None
            self._transport.abort()

    def _end(self, error: RelevoError | None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)


def post(host: str, port: int, path: str, body: bytes) -> bytes:
    """A request, as bytes."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def closed_loop(host: str, port: int, requests: Sequence[bytes], concurrency: int, seconds: float) -> Load:
    """So many clients, each asking again when it was answered, until the time is over."""
    load = Load()
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, host, port))[1] for _ in range(concurrency)]
    began = time.perf_counter()
    end = began + seconds

    async def client(number: int, connection: Connection) -> None:
        index = number
        while (sent := time.perf_counter()) < end:
            await connection.ask(requests[index % len(requests)])
            load.num_requests += 1
            load.num_events += connection.num_events
            load.ttft_seconds.append(connection.first_at - sent)
            index += concurrency

    try:
        async with asyncio.TaskGroup() as tasks:
            for number, connection in enumerate(connections):
                tasks.create_task(client(number, connection))
    finally:
        for connection in connections:
            connection.close()
    load.seconds = time.perf_counter() - began
    return load
