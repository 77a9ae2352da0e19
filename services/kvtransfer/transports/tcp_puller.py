"""The pulling end of tcp: one thread a data connection, from the socket straight into the arena."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

import xxhash

from relevo.core.errors import Unavailable
from services.kvtransfer.transports import Figures, Outcome, WantedBlock
from services.kvtransfer.transports.wire import (
    GREETING_BYTES,
    HEADER,
    HELLO_SECONDS,
    NOT_PINNED,
    OK,
    PROBE,
    READ,
    REQUEST,
    TOKEN_BYTES,
    Garbage,
    Wire,
    hello,
)
from services.kvtransfer.transports.work import PullWork
from services.pb import kvlink_pb2

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
_WORTH_ANOTHER = 1.25  # by how much twice as many connections must be quicker
_WORTH_SHARING_BYTES = 1 << 20  # less than this goes over one connection
_MIN_WINDOW_BYTES = 4 << 20  # asked for and not come yet, a connection; more where the link is long
_MAX_WINDOW_BYTES = 64 << 20
_PIECE_BYTES = 256 << 10  # is checked while it is in the core's cache
_PROBE_SECONDS = 0.02  # a transfer that takes this long tells the bandwidth
_PROBE_ROUND_TRIPS = 16  # or this many round trips, on a long link: TCP starts slowly
_MAX_PROBE_SECONDS = 0.5
_FIRST_PROBE_BYTES = 256 << 10
_MAX_PROBE_BYTES = 32 << 20
_NUM_PINGS = 8
_JOIN_SECONDS = 2.0


class TcpPuller:
    """Opens more connections than one only if a probe says that they help."""

    name = "tcp"

    def __init__(self, offer: kvlink_pb2.TransportOffer, link_id: bytes, secret: bytes, tls: ssl.SSLContext | None):
        self._offer = offer
        self._link_id = link_id
        self._secret = secret
        self._tls = tls
        self._connections: list[_Connection] = []
        self._window_bytes = _MIN_WINDOW_BYTES

    async def probe(self) -> Figures:
        await self._add_connections(1)
        latency = min([await self._connections[0].run(_ping) for _ in range(_NUM_PINGS)])
        rate = await self._measure(latency)
        while len(self._connections) * 2 <= MAX_CONNECTIONS:
            before = len(self._connections)
            await self._add_connections(before)
            of_more = await self._measure(latency)
            if of_more < rate * _WORTH_ANOTHER:
                await self._remove_connections(before)
                break
            rate = of_more
        window = int(2 * rate * latency / len(self._connections))
        self._window_bytes = min(_MAX_WINDOW_BYTES, max(_MIN_WINDOW_BYTES, window))
        return Figures(rate, latency, len(self._connections))

    async def pull(self, token: bytes, blocks: Sequence[WantedBlock], answered: Callable[[int, Outcome], None]) -> None:
        if not blocks:
            return
        if not self._connections:
            raise Unavailable(f"the data connections to {self._offer.address} are closed")
        work = PullWork(token, blocks, answered)
        num_bytes = len(blocks) * len(blocks[0].into)
        num_sharing = max(1, min(len(self._connections), len(blocks), num_bytes // _WORTH_SHARING_BYTES))
        window = max(2, min(self._window_bytes // len(blocks[0].into), -(-len(blocks) // num_sharing)))
        # The least busy first.
        for connection in sorted(self._connections, key=lambda each: each.jobs.qsize())[:num_sharing]:
            connection.jobs.put(partial(_pull, work, window))
        await work.finish(self.cut_off)

    def cut_off(self) -> None:
        for connection in self._connections:
            connection.wire.abort()

    async def close(self) -> None:
        await self._remove_connections(0)

    async def _measure(self, latency: float) -> float:
        """Bytes per second over all connections together."""
        num_bytes, enough = _FIRST_PROBE_BYTES, max(_PROBE_SECONDS, _PROBE_ROUND_TRIPS * latency)
        best, began = 0.0, time.monotonic()
        while True:
            jobs = [connection.run(partial(_receive_zeros, num_bytes)) for connection in self._connections]
            start = time.monotonic()
            await asyncio.gather(*jobs)
            seconds = time.monotonic() - start
            best = max(best, num_bytes * len(jobs) / seconds)
            if seconds >= enough or num_bytes >= _MAX_PROBE_BYTES or time.monotonic() - began > _MAX_PROBE_SECONDS:
                return best
            num_bytes *= 2 if seconds * 4 > enough else 4

    async def _add_connections(self, count: int) -> None:
        for _ in range(count):
            wire = await asyncio.to_thread(self._connect)
            self._connections.append(_Connection(wire, self._offer.address))

    async def _remove_connections(self, num_left: int) -> None:
        ended, self._connections = self._connections[num_left:], self._connections[:num_left]
        for connection in ended:
            connection.jobs.put(None)
            connection.wire.abort()
        if ended:
            await asyncio.to_thread(_join, ended)

    def _connect(self) -> Wire:
        """In a thread. Raises Unavailable."""
        address = self._offer.address
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        connection: socket.socket | None = None
        try:
            connection = socket.create_connection((host, int(port)), timeout=HELLO_SECONDS)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_hostname=host)
            wire = Wire(connection)
            _introduce(wire, self._link_id, self._secret)
        except (OSError, EOFError, ValueError, Garbage) as error:
            if connection is not None:
                connection.close()
            raise Unavailable(f"no data connection to {address}: {error or 'closed by the peer'}") from error
        return wire


def _introduce(wire: Wire, link_id: bytes, secret: bytes) -> None:
    wire.send(hello(wire.receive(GREETING_BYTES), link_id, secret))
    if HEADER.unpack(wire.receive(HEADER.size)) != (OK, 0):
        raise Garbage("it did not welcome us")


class _Connection:
    """A thread that does one job after another. Once broken, it fails them all."""

    def __init__(self, wire: Wire, address: str) -> None:
        self.wire = wire
        self.address = address
        self.jobs: SimpleQueue[Callable[[_Connection], None] | None] = SimpleQueue()
        self.broken: Exception | None = None
        self.scratch = memoryview(bytearray(_PIECE_BYTES))
        self.thread = threading.Thread(target=self._run, name="data-pull", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            job(self)
        self.wire.close()

    async def run(self, task: Callable[[Wire, memoryview], float]) -> float:
        """Do this in the thread. Raises Unavailable if it fails."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float] = loop.create_future()

        def settle(result: float | Exception) -> None:
            if future.done():
                return  # cancelled
            if isinstance(result, Exception):
                future.set_exception(Unavailable(f"data connection to {self.address} broke: {result}"))
            else:
                future.set_result(result)

        def job(_: _Connection) -> None:
            try:
                result: float | Exception = task(self.wire, self.scratch)
            except (OSError, EOFError, Garbage) as error:
                result = self.broken = error
                self.wire.abort()
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, result)

        self.jobs.put(job)
        return await future


def _join(connections: Sequence[_Connection]) -> None:
    for connection in connections:
        connection.thread.join(_JOIN_SECONDS)


def _pull(work: PullWork, max_window: int, connection: _Connection) -> None:
    """In a connection's thread: its share of a pull."""
    if connection.broken is not None:
        work.fail(_broke(connection, connection.broken))
        return
    if not work.begin():
        return
    try:
        _pull_blocks(work, max_window, connection.wire)
    except (OSError, EOFError, Garbage) as error:
        connection.broken = error
        connection.wire.abort()
        work.end(_broke(connection, error))
    else:
        work.end()


def _broke(connection: _Connection, error: Exception) -> Exception:
    return ConnectionError(f"data connection to {connection.address} broke: {error}")


def _pull_blocks(work: PullWork, max_window: int, wire: Wire) -> None:
    """Keeps a window of requests ahead of what comes, so that the link never waits for us."""
    window: deque[int] = deque()
    while True:
        if len(window) <= max_window // 2:
            fresh: list[int] = []
            while len(window) + len(fresh) < max_window and (index := work.take()) is not None:
                fresh.append(index)
            if fresh:
                wire.send(b"".join(REQUEST.pack(READ, work.blocks[index].slot, work.token) for index in fresh))
                window.extend(fresh)
        if not window:
            return
        index = window.popleft()
        work.answer(index, _receive_block(wire, work.blocks[index]))


def _receive_block(wire: Wire, block: WantedBlock) -> Outcome:
    status, num_bytes = HEADER.unpack(wire.receive(HEADER.size))
    if (status, num_bytes) == (NOT_PINNED, 0):
        return Outcome.NOT_PINNED
    if (status, num_bytes) != (OK, len(block.into)):
        raise Garbage(f"status {status} with {num_bytes} bytes, not {OK} with {len(block.into)}")
    digest = xxhash.xxh3_64()
    for start in range(0, num_bytes, _PIECE_BYTES):
        piece = block.into[start : start + _PIECE_BYTES]
        wire.receive_into(piece)
        digest.update(piece)
    return Outcome.ARRIVED if digest.intdigest() == block.checksum else Outcome.CORRUPT


def _ping(wire: Wire, scratch: memoryview) -> float:
    start = time.monotonic()
    _receive_zeros(0, wire, scratch)
    return time.monotonic() - start


def _receive_zeros(num_bytes: int, wire: Wire, scratch: memoryview) -> float:
    wire.send(REQUEST.pack(PROBE, num_bytes, bytes(TOKEN_BYTES)))
    if HEADER.unpack(wire.receive(HEADER.size)) != (OK, num_bytes):
        raise Garbage("that was no answer to a probe")
    for start in range(0, num_bytes, len(scratch)):
        wire.receive_into(scratch[: min(len(scratch), num_bytes - start)])
    return 0.0
