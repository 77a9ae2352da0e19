"""Clients that send too much, too slowly or nonsense, or do not read: cut off in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from relevo.core.errors import StartupError
from relevo.core.request import FinishReason
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.pb import messages_pb2
from services.router.generation import EndEvent, TokensEvent
from services.router.http.connection import MAX_HEADERS, MAX_PIPELINED, ConnectionLimits
from services.router.http.server import HttpOptions, load_tls
from tests.router.http.conftest import Edge, Served, make_served, running
from tests.router.http.fakes import HANG, Step
from tests.router.http.test_hang_up import begun, posted, until
from tests.support.certificates import make_certificates

BODY = {"prompt": "a", "max_tokens": 2}
MAX_HEAD_BYTES = 8 << 10


@pytest.fixture
async def strict(shared: Served) -> AsyncIterator[Edge]:
    """An edge without much patience; with enough for a busy machine."""
    shared.dispatcher.reset()
    limits = ConnectionLimits(
        max_connections=8, max_head_bytes=MAX_HEAD_BYTES, head_seconds=1.0, body_seconds=1.0, write_seconds=1.0
    )
    async with running(shared, HttpOptions(limits=limits, keep_alive_seconds=1.0)) as edge:
        yield edge
        await until(lambda: not edge.connections)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(edge: Edge, data: bytes = b"", tls: ssl.SSLContext | None = None) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=tls)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def reply_to(edge: Edge, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of the one answer after which the server hangs up."""
    async with connected(edge, data) as (reader, _):
        return parse_error(await read_all(reader))


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        return await reader.read()


def parse_error(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    error = orjson.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


async def assert_serves(edge: Edge) -> None:
    reply = await edge.http.post("/v1/completions", json=BODY)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("sent", [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Sl", b"\r\n"])
async def test_a_head_that_does_not_come_is_cut(strict: Edge, sent: bytes) -> None:
    status, error = await reply_to(strict, sent)
    assert status == 408
    assert error["type"] == "invalid_request_error"
    assert strict.num_cut("slow_head") == 1


async def test_a_head_line_by_line_is_cut_and_others_are_served(strict: Edge) -> None:
    async with connected(strict, b"GET /health HTTP/1.1\r\n") as (_, writer):

        async def drip() -> None:
            while True:
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        while not strict.num_cut("slow_head"):
            await assert_serves(strict)
        dripping.cancel()
        await asyncio.wait([dripping])


async def test_a_body_that_does_not_come_is_cut(strict: Edge) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
    status, _ = await reply_to(strict, head)
    assert status == 408
    chunked = b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\n'
    status, _ = await reply_to(strict, chunked)
    assert status == 408
    assert strict.num_cut("slow_body") == 2
    assert not strict.dispatcher.generations
    await assert_serves(strict)


async def test_a_refused_body_that_goes_on_is_cut(strict: Edge) -> None:
    """The answer was given after the head; the connection would be kept for another request."""
    head = b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with connected(strict, head) as (reader, writer):
        async with asyncio.timeout(5):
            await reader.readuntil(b"404 Not Found")
            while strict.connections:
                writer.write(b"1\r\nx\r\n")
                await asyncio.sleep(0.01)


async def test_an_idle_connection_is_kept_for_a_while(strict: Edge) -> None:
    async with connected(strict) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b'{"status":"ok"}')
        assert await read_all(reader) == b""
    assert not strict.num_cut("slow_head")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * MAX_HEAD_BYTES,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X" * (4 * MAX_HEAD_BYTES),
    ],
)
async def test_a_large_head_is_a_431(strict: Edge, head: bytes) -> None:
    status, error = await reply_to(strict, head)
    assert status == 431
    assert "larger than 8192 bytes" in error["message"] or "more than 128 headers" in error["message"]
    assert strict.num_cut("head_too_large") == 1


async def test_heads_within_the_limit_pass_also_in_pieces(strict: Edge) -> None:
    head = b"GET /version HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (MAX_HEAD_BYTES - 200) + b"\r\n\r\n"
    async with connected(strict) as (reader, writer):
        for _ in range(3):
            for piece in (head[:10], head[10:3000], head[3000:]):
                writer.write(piece)
                await writer.drain()
            await reader.readuntil(b"}")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_a_400(strict: Edge, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    status, error = await reply_to(strict, sent)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert not caplog.records, "whoever sends nonsense must not fill the log"


async def test_nonsense_behind_a_request_is_not_mixed_into_its_answer(strict: Edge) -> None:
    strict.dispatcher.script = lambda request: [TokensEvent([300]), HANG]
    async with posted(strict, BODY | {"stream": True}) as (reader, writer):
        await reader.readuntil(b"data: ")
        writer.write(b"nonsense\r\n\r\n")
        assert b"HTTP/1.1 400" not in await read_all(reader)
    [generation] = await begun(strict, 1)
    async with asyncio.timeout(5):
        await generation.closed.wait()


async def test_requests_behind_another_are_answered_in_order_and_bounded(strict: Edge) -> None:
    strict.dispatcher.script = lambda request: [HANG]
    get = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    async with connected(strict, get * MAX_PIPELINED) as (reader, _):
        for _ in range(MAX_PIPELINED):
            await reader.readuntil(b"}")
    async with posted(strict, BODY) as (reader, writer):
        await begun(strict, 1)
        for _ in range(MAX_PIPELINED + 1):
            writer.write(get)
        status, _ = parse_error(await read_all(reader))
    assert status == 400
    assert strict.num_cut("pipelined") == 1
    async with posted(strict, BODY) as (reader, writer):
        await begun(strict, 2)
        writer.write(b"POST /version HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
        status, _ = parse_error(await read_all(reader))
    assert status == 413
    async with asyncio.timeout(5):
        for generation in strict.dispatcher.generations:
            await generation.closed.wait()


async def test_who_leaves_with_requests_behind_a_running_one_is_noticed(strict: Edge) -> None:
    strict.dispatcher.script = lambda request: [HANG]
    async with posted(strict, BODY) as (_, writer):
        [generation] = await begun(strict, 1)
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        await writer.drain()
    async with asyncio.timeout(5):
        await generation.closed.wait()


async def test_a_wish_for_another_protocol_is_passed_over(strict: Edge) -> None:
    """As Java's HttpClient sends it by default, with a body; in one piece or two."""
    raw = orjson.dumps(BODY)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nContent-Length: %d\r\n\r\n" % len(raw)
    )
    for pieces in ((head + raw,), (head, raw), (head[:100], head[100:] + raw)):
        async with connected(strict) as (reader, writer):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 OK")
            await reader.readuntil(b'"usage"')
    websocket = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with connected(strict, websocket) as (reader, _):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")


async def test_connections_beyond_the_limit_are_a_503(strict: Edge) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(connected(strict, b"GET /"))
        await until(lambda: len(strict.connections) == 8)
        status, error = await reply_to(strict, b"")
        assert status == 503
        assert error["type"] == "service_unavailable_error"
    await until(lambda: len(strict.connections) == 0)
    await assert_serves(strict)


async def test_one_who_does_not_read_is_cut_and_others_are_served(strict: Edge, tokenizer: Tokenizer) -> None:
    longest = max(range(300, 4000), key=lambda token_id: len(tokenizer.token_text(token_id)))

    def flood(request: messages_pb2.GenerationRequest) -> Iterator[Step]:
        while request.prompt_token_ids[0] == 5:
            yield TokensEvent([longest] * 200)
            yield 0.0
        yield EndEvent(FinishReason.LENGTH)

    strict.dispatcher.script = flood
    async with posted(strict, {"prompt": [5], "stream": True}):
        [slow] = await begun(strict, 1)
        async with asyncio.timeout(10):
            while not slow.closed.is_set():
                reply = await strict.http.post("/v1/completions", json={"prompt": [6]})
                assert reply.status_code == 200
    assert strict.num_cut("slow_reader") == 1


async def test_a_slow_reader_that_does_read_is_not_cut(strict: Edge, tokenizer: Tokenizer) -> None:
    """It takes longer than the limit altogether, but goes on taking."""
    longest = max(range(300, 4000), key=lambda token_id: len(tokenizer.token_text(token_id)))

    def flood(request: messages_pb2.GenerationRequest) -> Iterator[Step]:
        for _ in range(20_000):
            yield TokensEvent([longest] * 200)
            yield 0.0
        yield EndEvent(FinishReason.LENGTH)

    strict.dispatcher.script = flood
    loop = asyncio.get_running_loop()
    async with posted(strict, {"prompt": [5], "stream": True}) as (reader, _):
        began = loop.time()
        while loop.time() < began + 2.0:
            assert len(await reader.read(1 << 20)) > 0
            await asyncio.sleep(0.01)
        assert len(strict.connections) == 1


async def test_a_whole_answer_that_nobody_reads_does_not_stay(strict: Edge, tokenizer: Tokenizer) -> None:
    """It is written at once; the server has nothing more to do with it than to wait for its reader."""
    longest = max(range(300, 4000), key=lambda token_id: len(tokenizer.token_text(token_id)))

    def flood(request: messages_pb2.GenerationRequest) -> list[Step]:
        return [TokensEvent([longest] * 1_000_000), EndEvent(FinishReason.LENGTH)]

    strict.dispatcher.script = flood
    async with posted(strict, {"prompt": [5]}, "Connection: close\r\n"):
        await begun(strict, 1)
        await until(lambda: not strict.connections)
    assert strict.num_cut("slow_reader") == 1


async def test_origins_are_let_in_by_name_only(
    shared: Served, edge: Edge, tokenizer: Tokenizer, defaults: GenerationDefaults
) -> None:
    asking = {"origin": "https://app.example", "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "authorization,content-type"
    assert (await edge.http.options("/v1/completions", headers=asking)).status_code == 405
    closed = await edge.http.post("/v1/completions", json=BODY, headers={"origin": "https://app.example"})
    assert not [name for name in closed.headers if name.startswith("access-control")]
    served = make_served(tokenizer, defaults, api_key="secret", cors_origins=("https://app.example",))
    async with running(served) as opened:
        reply = await opened.http.options("/v1/completions", headers=asking)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        reply = await opened.http.options("/v1/completions", headers=asking | {"origin": "https://evil.example"})
        assert reply.status_code == 400
        headers = {"origin": "https://app.example", "authorization": "Bearer secret"}
        for stream in (False, True):
            reply = await opened.http.post("/v1/completions", json=BODY | {"stream": stream}, headers=headers)
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        reply = await opened.http.get("/v1/models", headers={"origin": "https://app.example"})
        assert reply.status_code == 401


async def test_tls(shared: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_certificates(tmp_path)
    tls = load_tls(tmp_path / "peer.pem", tmp_path / "peer.key")
    limits = ConnectionLimits(head_seconds=0.2, write_seconds=0.4)
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    shared.dispatcher.reset()
    async with running(shared, HttpOptions(tls=tls, limits=limits)) as edge:
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{edge.port}", verify=trusting) as client:
            reply = await client.post("/v1/completions", json=BODY | {"stream": True})
            assert reply.text.endswith("[DONE]\n\n")
        async with connected(edge, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") as (reader, _):
            assert b"HTTP" not in await read_all(reader)
        async with connected(edge, b"GET /he", trusting) as (reader, _):
            assert parse_error(await read_all(reader))[0] == 408
        await until(lambda: not edge.connections)
    assert not caplog.records


def test_bad_certificates_are_named(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    assert load_tls(None, None) is None
    with pytest.raises(StartupError, match="belong together"):
        load_tls(tmp_path / "peer.pem", None)
    with pytest.raises(StartupError, match=r"--http-tls-key .*: No such file"):
        load_tls(tmp_path / "peer.pem", tmp_path / "nothing")
    with pytest.raises(StartupError, match="no certificate and its key"):
        load_tls(tmp_path / "peer.pem", tmp_path / "stranger.key")
