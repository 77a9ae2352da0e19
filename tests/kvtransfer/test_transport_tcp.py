"""The two ends of tcp, without agents around them: right bytes, and every way in which a peer can be wrong."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import xxhash

from relevo.core.errors import Unavailable
from services.common.security import Tls
from services.kvtransfer.arena import Arena
from services.kvtransfer.transports import Outcome, WantedBlock, wire
from services.kvtransfer.transports.tcp_puller import TcpPuller
from services.kvtransfer.transports.tcp_server import TcpDataServer, listen
from services.kvtransfer.transports.wire import GREETING_BYTES, HEADER, HELLO_BYTES, MAGIC, OK, REQUEST, client_tls
from services.pb import kvlink_pb2

from .blocks import block_data, until

BLOCK_BYTES = 700_000  # several pieces, and no multiple of them
NUM_SLOTS = 6
TOKEN = b"t" * 16
LINK_ID, SECRET = b"l" * 16, b"s" * 32

Open = Callable[..., Awaitable[TcpPuller]]


class Pins:
    """Slots that the stream of TOKEN has pinned."""

    def __init__(self) -> None:
        self.slots = set(range(NUM_SLOTS))

    def has_pinned_slot(self, token: bytes, slot: int) -> bool:
        return token == TOKEN and slot in self.slots


class Source:
    """A server with NUM_SLOTS blocks."""

    def __init__(self, server: TcpDataServer, pins: Pins, arena: Arena) -> None:
        self.server = server
        self.pins = pins
        self.checksums = []
        for slot in range(NUM_SLOTS):
            data = block_data(slot) * (BLOCK_BYTES // 5000)
            arena.block(slot)[:] = data
            self.checksums.append(xxhash.xxh3_64_intdigest(data))

    def wanted(self, *slots: int) -> list[WantedBlock]:
        return [WantedBlock(slot, memoryview(bytearray(BLOCK_BYTES)), self.checksums[slot]) for slot in slots]


def data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data-")]


def num_data_fds() -> int:
    """Sockets, and what probes are sent from."""
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            count += str(fd.readlink()).startswith(("socket:", "/memfd:relevo"))
    return count


@pytest.fixture(autouse=True)
async def nothing_leaks() -> AsyncIterator[None]:
    assert data_threads() == []
    before = num_data_fds()
    yield
    await until(lambda: not data_threads())
    await until(lambda: num_data_fds() <= before)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def start_source(stack: AsyncExitStack, tmp_path: Path, tls: ssl.SSLContext | None = None) -> Source:
    arena = Arena(tmp_path, NUM_SLOTS * (BLOCK_BYTES + 8192))
    stack.callback(arena.close)
    arena.cut(BLOCK_BYTES)
    pins = Pins()
    listener = listen("127.0.0.1", 0)
    stack.callback(listener.close)
    server = TcpDataServer(arena, pins, listener, f"127.0.0.1:{listener.getsockname()[1]}", tls)
    stack.push_async_callback(server.close)
    task = asyncio.create_task(server.run())
    stack.callback(task.cancel)
    server.admit(LINK_ID, SECRET)
    return Source(server, pins, arena)


@pytest.fixture
async def source(stack: AsyncExitStack, tmp_path: Path) -> Source:
    return await start_source(stack, tmp_path)


def make_puller(
    stack: AsyncExitStack, address: str, secret: bytes = SECRET, tls: ssl.SSLContext | None = None
) -> TcpPuller:
    puller = TcpPuller(kvlink_pb2.TransportOffer(transport="tcp", address=address), LINK_ID, secret, tls)
    stack.push_async_callback(puller.close)
    return puller


async def pull(puller: TcpPuller, blocks: list[WantedBlock]) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    await puller.pull(TOKEN, blocks, outcomes.__setitem__)
    return outcomes


async def test_blocks_arrive_checked(stack: AsyncExitStack, source: Source) -> None:
    puller = make_puller(stack, source.server.address)
    figures = await puller.probe()
    assert figures.bytes_per_second > 1e6
    assert 0 < figures.latency_seconds < 1
    blocks = source.wanted(3, 0, 5, 1)
    blocks[2] = WantedBlock(5, blocks[2].into, checksum=1)
    source.pins.slots.remove(1)
    assert await pull(puller, blocks) == {
        0: Outcome.ARRIVED,
        1: Outcome.ARRIVED,
        2: Outcome.CORRUPT,
        3: Outcome.NOT_PINNED,
    }
    for block, slot in zip(blocks[:2], (3, 0), strict=True):
        assert bytes(block.into) == block_data(slot) * (BLOCK_BYTES // 5000)
    assert source.server.num_blocks == 3


async def test_many_pulls_share_the_connections(stack: AsyncExitStack, source: Source) -> None:
    puller = make_puller(stack, source.server.address)
    await puller.probe()
    wanted = [source.wanted(*range(NUM_SLOTS)) for _ in range(8)]
    for outcomes in await asyncio.gather(*(pull(puller, blocks) for blocks in wanted)):
        assert outcomes == dict.fromkeys(range(NUM_SLOTS), Outcome.ARRIVED)
    assert all(xxhash.xxh3_64_intdigest(block.into) == block.checksum for blocks in wanted for block in blocks)


async def test_pulling_from_nobody_is_unavailable(stack: AsyncExitStack) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        puller = make_puller(stack, f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(Unavailable, match="no data connection"):
            await puller.probe()
        with pytest.raises(Unavailable):
            await pull(puller, [WantedBlock(0, memoryview(bytearray(8)), 0)])


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n" * 8, MAGIC + bytes(HELLO_BYTES), b"\xff" * 4096])
async def test_garbage_on_the_data_port_is_refused_and_counted(
    stack: AsyncExitStack, source: Source, garbage: bytes
) -> None:
    loop = asyncio.get_running_loop()
    host, _, port = source.server.address.rpartition(":")
    with socket.socket() as stranger:
        stranger.setblocking(False)
        await loop.sock_connect(stranger, (host, int(port)))
        assert (await loop.sock_recv(stranger, GREETING_BYTES)).startswith(MAGIC)
        await loop.sock_sendall(stranger, garbage)
        await until(lambda: source.server.num_refused == 1)
        await until(lambda: data_threads() == [])
    puller = make_puller(stack, source.server.address)
    await puller.probe()
    assert await pull(puller, source.wanted(0)) == {0: Outcome.ARRIVED}


async def test_garbage_after_the_hello_ends_the_connection(stack: AsyncExitStack, source: Source) -> None:
    host, _, port = source.server.address.rpartition(":")

    def misbehave() -> bytes:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            greeting = connection.recv(GREETING_BYTES)
            connection.sendall(wire.hello(greeting, LINK_ID, SECRET))
            assert connection.recv(HEADER.size) == HEADER.pack(OK, 0)
            connection.sendall(REQUEST.pack(77, 0, TOKEN))
            return connection.recv(1)

    assert await asyncio.to_thread(misbehave) == b""
    assert source.server.num_refused == 1


async def test_stranger_who_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    monkeypatch.setattr(wire, "STALL_SECONDS", 0.2)
    host, _, port = source.server.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        await until(lambda: source.server.num_refused == 1)


async def test_stranger_who_says_it_byte_by_byte_is_dropped(source: Source) -> None:
    host, _, port = source.server.address.rpartition(":")

    def trickle() -> float:
        began = time.monotonic()
        with socket.create_connection((host, int(port))) as connection, suppress(OSError):
            for byte in MAGIC + bytes(HELLO_BYTES):
                connection.sendall(bytes([byte]))
                time.sleep(0.2)
        return time.monotonic() - began

    assert await asyncio.to_thread(trickle) < 2 * wire.HELLO_SECONDS
    assert source.server.num_refused == 1
    assert source.server._connections == {}


async def test_wrong_secret_is_refused(stack: AsyncExitStack, source: Source) -> None:
    puller = make_puller(stack, source.server.address, secret=b"x" * 32)
    with pytest.raises(Unavailable):
        await puller.probe()
    assert source.server.num_refused == 1


async def test_end_of_the_link_cuts_off_its_connections(stack: AsyncExitStack, source: Source) -> None:
    puller = make_puller(stack, source.server.address)
    await puller.probe()
    source.server.end_link(LINK_ID)
    with pytest.raises(Unavailable):
        await pull(puller, source.wanted(0, 1))
    with pytest.raises(Unavailable):
        await puller.probe()


async def test_cancelled_pull_ends_soon_and_others_go_on(stack: AsyncExitStack, source: Source) -> None:
    puller = make_puller(stack, source.server.address)
    await puller.probe()
    for _ in range(20):
        blocks = source.wanted(*range(NUM_SLOTS))
        pulling = asyncio.create_task(pull(puller, blocks))
        await asyncio.sleep(0)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        after = [bytes(block.into) for block in blocks]
        assert await pull(puller, source.wanted(2)) == {0: Outcome.ARRIVED}
        assert [bytes(block.into) for block in blocks] == after, "somebody wrote after the pull had ended"


# --- sources that go wrong in mid-block ---


@contextmanager
def bad_source(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A data port that welcomes, answers probes rightly, and the first READ with `answer`. Its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        connection.sendall(MAGIC + secrets.token_bytes(16))
        connection.recv(HELLO_BYTES, socket.MSG_WAITALL)
        connection.sendall(HEADER.pack(OK, 0))
        while request := connection.recv(REQUEST.size, socket.MSG_WAITALL):
            operation, number, _ = REQUEST.unpack(request)
            if operation == wire.READ:
                answer(connection)
                return
            connection.sendall(HEADER.pack(OK, number) + bytes(number))

    def serve_all() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            accepted.append(connection)
            threading.Thread(target=quietly, args=(connection,), daemon=True).start()

    def quietly(connection: socket.socket) -> None:
        try:
            serve(connection)
        except OSError:
            return

    acceptor = threading.Thread(target=serve_all, daemon=True)
    acceptor.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)
        for connection in accepted:
            connection.close()


def stop_half_way(connection: socket.socket) -> None:
    connection.sendall(HEADER.pack(OK, BLOCK_BYTES) + bytes(BLOCK_BYTES // 2))


def close_half_way(connection: socket.socket) -> None:
    stop_half_way(connection)
    connection.shutdown(socket.SHUT_RDWR)


def send_too_much(connection: socket.socket) -> None:
    connection.sendall(HEADER.pack(OK, BLOCK_BYTES * 2) + bytes(BLOCK_BYTES * 2))


def send_noise(connection: socket.socket) -> None:
    connection.sendall(b"\xfe" * BLOCK_BYTES)


@pytest.mark.parametrize("answer", [stop_half_way, close_half_way, send_too_much, send_noise])
async def test_source_that_goes_wrong_in_mid_block_is_unavailable(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], None]
) -> None:
    monkeypatch.setattr(wire, "STALL_SECONDS", 0.5)
    with bad_source(answer) as address:
        puller = make_puller(stack, address)
        await puller.probe()
        block = WantedBlock(0, memoryview(bytearray(BLOCK_BYTES)), checksum=1)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await pull(puller, [block])
        assert time.monotonic() - began < 3
        with pytest.raises(Unavailable):
            await pull(puller, [block])
        await puller.close()


async def test_deadline_of_the_caller_cuts_off_a_source_that_stopped(stack: AsyncExitStack) -> None:
    with bad_source(stop_half_way) as address:
        puller = make_puller(stack, address)
        await puller.probe()
        blocks = [WantedBlock(slot, memoryview(bytearray(BLOCK_BYTES)), checksum=1) for slot in range(3)]
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pull(puller, blocks)
        assert time.monotonic() - began < 3, "it waits for what is under way, and no longer"
        await puller.close()


# --- TLS ---


def make_certificates(folder: Path) -> Tls:
    """A certificate for 127.0.0.1 that signs itself, by openssl."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=relevo -addext subjectAltName=IP:127.0.0.1 \
        -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return Tls(cert_path=cert, key_path=key, ca_path=cert)


async def test_tls_with_certificates_on_both_sides(stack: AsyncExitStack, tmp_path: Path) -> None:
    tls = make_certificates(tmp_path)
    source = await start_source(stack, tmp_path, wire.server_tls(tls))
    puller = make_puller(stack, source.server.address, tls=client_tls(tls))
    await puller.probe()
    blocks = source.wanted(*range(NUM_SLOTS))
    assert await pull(puller, blocks) == dict.fromkeys(range(NUM_SLOTS), Outcome.ARRIVED)
    without_certificate = make_puller(stack, source.server.address, tls=client_tls(Tls(ca_path=tls.ca_path)))
    with pytest.raises(Unavailable):
        await without_certificate.probe()
    plain = make_puller(stack, source.server.address)
    with pytest.raises(Unavailable):
        await plain.probe()
    source.server.end_link(LINK_ID)
    with pytest.raises(Unavailable):
        await pull(puller, source.wanted(0))
