"""A plain TCP connection: from the arena's file to the socket, from the socket into the arena, no copy in Python.

    puller → server   hello: magic (4 bytes), pull token (16)      then, as often as it likes: slot (u32, big-endian)
    server → puller   for each slot, in order: status (u8: 0 = here it is, 1 = not pinned), and if 0 the slot's bytes

Needs plain asyncio: uvloop has no sock_sendfile.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct

from relevo.core.errors import StartupError, Unavailable
from services.kvtransfer.arena import Arena
from services.kvtransfer.reader import PULL_TOKEN_BYTES
from services.kvtransfer.transports import PinnedSlots

logger = logging.getLogger(__name__)

_MAGIC = b"RKV1"
_HELLO_BYTES = len(_MAGIC) + PULL_TOKEN_BYTES
_SLOT = struct.Struct("!I")
_OK, _NOT_PINNED = b"\x00", b"\x01"
_MAX_CONNECTIONS = 256  # one a pulling stream; further ones are refused by closing them
_CONNECT_SECONDS = 2.0
_ACCEPT_AGAIN_SECONDS = 0.2
_STALL_SECONDS = 5.0  # a slot that has not got through after this, and a second per 8 MiB, never will


class TcpDataServer:
    """Serves slots that are pinned by the stream whose token the connection has shown."""

    def __init__(self, arena: Arena, pinned: PinnedSlots, listener: socket.socket, address: str) -> None:
        self.address = address
        self._arena = arena
        self._pinned = pinned
        self._listener = listener
        self._connections: dict[asyncio.Task[None], bytes] = {}  # → token

    def end_stream(self, token: bytes) -> None:
        for task, of_token in list(self._connections.items()):
            if of_token == token:
                task.cancel()

    async def run(self) -> None:
        """Accept connections until cancelled; the listener stays its owner's."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # out of file descriptors, or the peer left at once
                    logger.warning("data port: cannot accept a connection: %s", error)
                    await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                    continue
                if len(self._connections) >= _MAX_CONNECTIONS:
                    logger.warning("data port: refused a connection, %d are open", len(self._connections))
                    connection.close()
                    continue
                task = group.create_task(self._serve(connection))
                self._connections[task] = b""
                task.add_done_callback(self._connections.pop)

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                _prepare(connection)
                async with asyncio.timeout(_CONNECT_SECONDS):
                    hello = await _receive_exactly(connection, _HELLO_BYTES)
                token = hello[len(_MAGIC) :]
                if not hello.startswith(_MAGIC):
                    return
                task = asyncio.current_task()
                assert task is not None
                self._connections[task] = token
                await self._serve_slots(connection, token)
            except (OSError, TimeoutError, EOFError) as error:
                logger.debug("data connection ended: %r", error)

    async def _serve_slots(self, connection: socket.socket, token: bytes) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # No time limit here: blocks are asked for as they are sealed. end_stream() ends it.
            (slot,) = _SLOT.unpack(await _receive_exactly(connection, _SLOT.size))
            async with asyncio.timeout(_stall_seconds(self._arena.slot_bytes)):
                if not self._pinned.has_pinned_slot(token, slot):
                    await loop.sock_sendall(connection, _NOT_PINNED)
                    continue
                await loop.sock_sendall(connection, _OK)
                num_bytes = self._arena.slot_bytes
                await loop.sock_sendfile(connection, self._arena.file, slot * num_bytes, num_bytes, fallback=False)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for TcpDataServer. Raises StartupError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} for data: {error.strerror}; choose another --data-port"
        ) from error
    listener.setblocking(False)
    return listener


class TcpDataConnection:
    """Pulls the slots of one stream at another agent."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        self._socket = connection
        self._address = address

    @classmethod
    async def open(cls, address: str, token: bytes) -> TcpDataConnection:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        connection: socket.socket | None = None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
                family, kind, protocol, _, target = infos[0]
                connection = socket.socket(family, kind, protocol)
                _prepare(connection)
                await loop.sock_connect(connection, target)
                await loop.sock_sendall(connection, _MAGIC + token)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, OSError | TimeoutError | ValueError):
                raise Unavailable(f"no data connection to {address}: {error or 'no answer'}") from error
            raise
        return cls(connection, address)

    async def request(self, slots: list[int]) -> None:
        try:
            async with asyncio.timeout(_STALL_SECONDS):
                await asyncio.get_running_loop().sock_sendall(self._socket, b"".join(map(_SLOT.pack, slots)))
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"data connection to {self._address} broke: {error or 'stalled'}") from error

    async def receive(self, into: memoryview) -> bool:
        try:
            async with asyncio.timeout(_stall_seconds(len(into))):
                if await _receive_exactly(self._socket, 1) != _OK:
                    return False
                await _receive_into(self._socket, into)
        except (OSError, TimeoutError, EOFError) as error:
            raise Unavailable(f"data connection to {self._address} broke: {error or 'stalled'}") from error
        return True

    def close(self) -> None:
        self._socket.close()


def _prepare(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _stall_seconds(num_bytes: int) -> float:
    return _STALL_SECONDS + num_bytes / (8 << 20)


async def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    await _receive_into(connection, memoryview(buffer))
    return bytes(buffer)


async def _receive_into(connection: socket.socket, into: memoryview) -> None:
    loop = asyncio.get_running_loop()
    received = 0
    while received < len(into):
        count = await loop.sock_recv_into(connection, into[received:])
        if not count:
            raise EOFError("closed by the peer")
        received += count
