"""An endpoint that answers as it was told, on 127.0.0.1, in threads of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

HOLD, BREAK = object(), object()


class FakeEndpoint:
    """answers: of requests, in their order: (status, JSON), or a stream of: text; an event; HOLD: until the client
    leaves, and `left` is set then; BREAK: the connection ends. A stream that comes to its end has usage and [DONE].

    bodies: what was asked
    pages: what GET gives, by path
    """

    def __init__(self) -> None:
        self.answers: SimpleQueue[tuple[int, Any] | Sequence[Any]] = SimpleQueue()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.pages: dict[str, tuple[int, Any]] = {"/v1/models": (200, {"data": [{"id": "fake"}]})}
        self.left = threading.Event()
        self.url = ""


@contextmanager
def running_endpoint() -> Iterator[FakeEndpoint]:
    endpoint = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._reply(*endpoint.pages.get(self.path, (404, {"error": {"message": f"there is no {self.path}"}})))

        def do_POST(self) -> None:
            endpoint.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            answer = endpoint.answers.get(timeout=10)
            if isinstance(answer, tuple):
                self._reply(*answer)
            else:
                self._stream(answer)

        def _reply(self, status: int, body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, pieces: Sequence[Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for piece in pieces:
                if piece is HOLD:
                    self.connection.settimeout(20)
                    assert self.connection.recv(1) == b""
                    endpoint.left.set()
                    return
                if piece is BREAK:
                    return
                event = {"choices": [{"delta": {"content": piece}}]} if isinstance(piece, str) else piece
                self._event(json.dumps(event))
            self._event(json.dumps({"choices": [], "usage": {"completion_tokens": len(pieces)}}))
            self._event("[DONE]")

        def _event(self, data: str) -> None:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()
