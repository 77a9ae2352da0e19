"""A stand-in for an OpenAI endpoint: raw HTTP on 127.0.0.1, answers with stated delays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeEndpoint:
    """ttft_seconds before the first token, then itl_seconds before each chunk of tokens_per_chunk.

    usage: "last": in a message of its own at the end; "each": with every chunk; None: never
    empty_last: a last chunk without a token, which only tells the reason
    max_tokens: what it gives at most, whatever is asked for
    fail_every: each n-th request is answered with 500
    break_after: the stream of a request breaks with an error message after so many tokens
    """

    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0
    tokens_per_chunk: int = 1
    usage: str | None = "last"
    empty_last: bool = False
    with_text: bool = True
    max_tokens: int = 1 << 30
    fail_every: int | None = None
    break_after: int | None = None
    lists_models: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_open: int = 0
    max_open: int = 0
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeEndpoint]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next((int(line[16:]) for line in head.split("\r\n") if line.startswith("content-length: ")), 0)
            body = await reader.readexactly(length)
            if head.startswith("get /v1/models"):
                models = json.dumps({"data": [{"id": "fake"}]}).encode()
                _head(writer, "200 OK" if self.lists_models else "404 Not Found", "application/json")
                writer.write(models if self.lists_models else b"{}")
            else:
                await self._complete(json.loads(body), writer)
            await writer.drain()
        finally:
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        if self.fail_every and len(self.bodies) % self.fail_every == 0:
            _head(writer, "500 Internal Server Error", "application/json")
            writer.write(b'{"error":\n {"message": "no luck"}}')
            return
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            _head(writer, "200 OK", "text/event-stream")
            await self._stream(min(body["max_tokens"], self.max_tokens), writer)
        finally:
            self.num_open -= 1

    async def _stream(self, num_tokens: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.ttft_seconds)
        sent = 0
        while sent < num_tokens:
            if sent:
                await asyncio.sleep(self.itl_seconds)
            sent = min(num_tokens, sent + self.tokens_per_chunk)
            ends = sent == num_tokens and not self.empty_last
            event = _chunk("x" if self.with_text else "", "length" if ends else None)
            if self.usage == "each":
                event["usage"] = {"prompt_tokens": 3, "completion_tokens": sent}
            _event(writer, event)
            await writer.drain()
            if self.break_after is not None and sent >= self.break_after:
                _event(writer, {"error": {"message": "worker died"}})
                return
        if self.empty_last:
            _event(writer, _chunk("", "length"))
        if self.usage == "last":
            _event(writer, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": num_tokens}})
        writer.write(b"data: [DONE]\n\n")


def _chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def _head(writer: asyncio.StreamWriter, status: str, content_type: str) -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nConnection: close\r\n\r\n".encode())


def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")
