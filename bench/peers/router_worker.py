"""What other projects' routers are measured before: an OpenAI server over HTTP without a model.

As services/router/bench_worker.py, which speaks our own contract: lines on standard input set the tokens a second of
all streams together ("rate 40000"), or one step after another ("rate 0"), or whole answers at once ("rate inf").
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from typing import cast

import orjson
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
_INFO = orjson.dumps(
    {"status": "ok", "model_path": "bench", "object": "list", "data": [{"id": "bench", "object": "model"}]}
)
_EVENT = orjson.dumps(
    {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1795000000,
        "model": "bench",
        "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
    }
)
_CHUNK_BODY = b"data: " + _EVENT + b"\n\n"
_CHUNK = b"%x\r\n%b\r\n" % (len(_CHUNK_BODY), _CHUNK_BODY)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Server:
    """Steps all streams."""

    def __init__(self) -> None:
        self.rate = 0.0
        self._left: dict[Connection, int] = {}
        self._filled = asyncio.Event()

    def begin(self, connection: Connection, num_tokens: int) -> None:
        self._left[connection] = num_tokens
        self._filled.set()

    def forget(self, connection: Connection) -> None:
        self._left.pop(connection, None)

    async def step_on(self) -> None:
        loop = asyncio.get_running_loop()
        next_step = loop.time()
        while True:
            if not self._left:
                self._filled.clear()
                await self._filled.wait()
                next_step = loop.time()
            for connection, left in list(self._left.items()):
                count = left if self.rate == math.inf else 1
                self._left[connection] = left - count
                connection.transport.write(_CHUNK * count + (_DONE if left == count else b""))
                if left == count:
                    del self._left[connection]
            wait = 0.0
            if 0 < self.rate < math.inf:
                next_step += max(1, len(self._left)) / self.rate
                wait = max(0.0, next_step - loop.time())
            await asyncio.sleep(wait)


class Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.forget(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while self._take():
            pass

    def _take(self) -> bool:
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return False
        lower = head.lower()
        start = lower.find(b"content-length:")
        length = int(lower[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
        if b"transfer-encoding: chunked" in lower:
            body, found, self._data = rest.partition(b"\r\n0\r\n\r\n")
            if not found:
                self._data = head + b"\r\n\r\n" + rest
                return False
            self._answer(head.split(b" ", 2)[1], body.partition(b"\r\n")[2])  # one chunk: they are small
            return True
        if len(rest) < length:
            return False
        self._data = rest[length:]
        self._answer(head.split(b" ", 2)[1], rest[:length])
        return True

    def _answer(self, path: bytes, body: bytes) -> None:
        if path != b"/v1/completions":
            self._send(_INFO)
            return
        asked = orjson.loads(body)
        num_tokens = int(asked.get("max_tokens") or 16)
        if asked.get("stream"):
            self.transport.write(_HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n")
            self._server.begin(self, num_tokens)
            return
        choice = {"index": 0, "text": " token" * num_tokens, "logprobs": None, "finish_reason": "length"}
        usage = {"prompt_tokens": 256, "completion_tokens": num_tokens, "total_tokens": 256 + num_tokens}
        self._send(orjson.dumps(orjson.loads(_EVENT) | {"choices": [choice], "usage": usage}))

    def _send(self, body: bytes) -> None:
        self.transport.write(_HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(body) + body)


async def main(ready_fd: int) -> None:
    server = Server()
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)
    stepping = asyncio.create_task(server.step_on())
    port = listening.sockets[0].getsockname()[1]
    os.write(ready_fd, (json.dumps({"address": f"127.0.0.1:{port}"}) + "\n").encode())
    os.close(ready_fd)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        server.rate = float(line.split()[1])
    stepping.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ready-fd", type=int, required=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(parser.parse_args().ready_fd))
