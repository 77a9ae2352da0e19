"""The serving end of tcp: one thread a data connection, from the arena's file to the socket."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable

from relevo.core.errors import StartupError
from services.kvtransfer.arena import Arena
from services.kvtransfer.transports import PinnedSlots
from services.kvtransfer.transports.wire import (
    HEADER,
    HELLO_BYTES,
    HELLO_SECONDS,
    MAGIC,
    NONCE_BYTES,
    NOT_PINNED,
    OK,
    PROBE,
    READ,
    REQUEST,
    Garbage,
    Wire,
    check_hello,
    link_id_of,
)
from services.pb import kvlink_pb2

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024  # further ones are refused by closing them
MAX_PROBE_BYTES = 64 << 20  # in one request
_PROBE_BYTES = 1 << 20  # of zeros, which a probe gets as often as it takes
_REQUESTS_AT_ONCE = 256
_ACCEPT_AGAIN_SECONDS = 0.2


class TcpDataServer:
    """Serves slots that are pinned by the Fetch stream whose token the request shows, on connections that have proved
    to belong to a link.

    num_refused: connections that sent garbage, a wrong proof, or nothing. num_broken: that ended in mid-block.
    seconds: that went into sending num_bytes, of all connections together
    on_sent: called with the seconds that each block took, in its connection's thread
    """

    def __init__(
        self,
        arena: Arena,
        pinned: PinnedSlots,
        listener: socket.socket,
        address: str,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self.on_sent: Callable[[float], None] | None = None
        self.num_refused = 0
        self.num_broken = 0
        self.num_bytes = 0
        self.num_blocks = 0
        self.seconds = 0.0
        self._arena = arena
        self._mapping = arena.view
        self._pinned = pinned
        self._listener = listener
        self._tls = tls
        self._lock = threading.Lock()
        self._secrets: dict[bytes, bytes] = {}  # by link id
        self._connections: dict[Wire, bytes] = {}  # → link id; b"" before its hello
        self._threads: set[threading.Thread] = set()
        self._probe_fd = os.memfd_create("relevo-probe")
        os.truncate(self._probe_fd, _PROBE_BYTES)
        self._zeros = memoryview(bytes(_PROBE_BYTES))

    def offer(self) -> kvlink_pb2.TransportOffer:
        return kvlink_pb2.TransportOffer(transport="tcp", address=self.address)

    def admit(self, link_id: bytes, secret: bytes) -> None:
        with self._lock:
            self._secrets[link_id] = secret

    def end_link(self, link_id: bytes) -> None:
        with self._lock:
            self._secrets.pop(link_id, None)
            ended = [wire for wire, of_link in self._connections.items() if of_link == link_id]
        for wire in ended:
            wire.abort()

    async def run(self) -> None:
        """Accept connections until cancelled; the listener stays its owner's."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of file descriptors, or the peer left at once
                logger.warning("data port: cannot accept a connection: %s", error)
                await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                continue
            if len(self._threads) >= MAX_CONNECTIONS:
                logger.warning("data port: refused a connection, %d are open", len(self._threads))
                self.num_refused += 1
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="data-port", daemon=True)
            self._threads.add(thread)
            thread.start()

    async def close(self) -> None:
        """After run(): all connections are closed, and their threads gone, within seconds."""
        with self._lock:
            self._secrets.clear()
            wires = list(self._connections)
        for wire in wires:
            wire.abort()
        await asyncio.to_thread(self._join)
        os.close(self._probe_fd)

    def _join(self) -> None:
        for thread in list(self._threads):
            thread.join(HELLO_SECONDS + 1)

    def _serve(self, connection: socket.socket) -> None:
        """In a thread."""
        wire: Wire | None = None
        try:
            wire = self._wire(connection)
            self._serve_requests(wire, self._admitted(wire))
        except Garbage as error:
            self.num_refused += 1
            logger.warning("data port: a connection was refused: %s", error)
        except (OSError, EOFError) as error:
            self.num_broken += 1
            logger.debug("data port: a connection ended: %r", error)
        finally:
            with self._lock:
                if wire is not None:
                    del self._connections[wire]
                self._threads.discard(threading.current_thread())
            connection.close()
            if wire is not None:
                wire.close()

    def _wire(self, connection: socket.socket) -> Wire:
        """Raises Garbage if it cannot do TLS, where that is asked for."""
        connection.settimeout(HELLO_SECONDS)
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            wire = Wire(connection)
        except OSError as error:
            raise Garbage(f"no hello: {error}") from error
        with self._lock:
            self._connections[wire] = b""
        return wire

    def _admitted(self, wire: Wire) -> bytes:
        """The link to which it belongs. Raises Garbage if its hello is wrong."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            wire.send(MAGIC + nonce)
            message = wire.receive(HELLO_BYTES, HELLO_SECONDS)
        except (OSError, EOFError) as error:
            raise Garbage(f"no hello: {error}") from error
        link_id = link_id_of(message)
        with self._lock:
            secret = self._secrets.get(link_id)
            if secret is None or not check_hello(message, nonce, secret):
                raise Garbage("its proof is wrong, or its link has ended")
            self._connections[wire] = link_id
        wire.send(HEADER.pack(OK, 0))
        return link_id

    def _serve_requests(self, wire: Wire, link_id: bytes) -> None:
        buffer = b""
        while link_id in self._secrets:
            fresh = wire.receive_some(REQUEST.size * _REQUESTS_AT_ONCE)
            if not fresh:
                return
            buffer += fresh
            num_whole = len(buffer) // REQUEST.size * REQUEST.size
            for operation, number, token in REQUEST.iter_unpack(buffer[:num_whole]):
                if operation == READ:
                    self._send_slot(wire, token, number)
                elif operation == PROBE and number <= MAX_PROBE_BYTES:
                    self._send_probe(wire, number)
                else:
                    raise Garbage(f"operation {operation} with {number}")
            buffer = buffer[num_whole:]

    def _send_slot(self, wire: Wire, token: bytes, slot: int) -> None:
        start = time.monotonic()
        if not self._pinned.has_pinned_slot(token, slot):
            wire.send(HEADER.pack(NOT_PINNED, 0))
            return
        # The pin may end while the bytes go out, if the puller has left or was cut off. Should it still take what comes
        # then, its checksum tells.
        num_bytes = self._arena.block_bytes
        wire.send(HEADER.pack(OK, num_bytes), more=True)
        wire.send_file(self._arena.file.fileno(), self._mapping, slot * self._arena.slot_bytes, num_bytes)
        seconds = time.monotonic() - start
        with self._lock:
            self.num_bytes += num_bytes
            self.num_blocks += 1
            self.seconds += seconds
        if self.on_sent is not None:
            self.on_sent(seconds)

    def _send_probe(self, wire: Wire, num_bytes: int) -> None:
        wire.send(HEADER.pack(OK, num_bytes), more=num_bytes > 0)
        for start in range(0, num_bytes, _PROBE_BYTES):
            wire.send_file(self._probe_fd, self._zeros, 0, min(_PROBE_BYTES, num_bytes - start))


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
