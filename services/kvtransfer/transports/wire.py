"""What goes over a data connection, and sockets that wait no longer than they may. Blocking: for data threads.

    server → puller   greeting: magic (4 bytes), nonce (16)
    puller → server   hello: magic, link id (16), HMAC-SHA256(the link's secret, nonce) (32)
    puller → server   as often as it likes, requests: operation (u8), 3 bytes of nothing, number (u32), token (16)
    server → puller   for each request, in order: status (u8), 3 bytes of nothing, number of bytes (u32), these bytes

READ asks for a slot: `number` is the slot, `token` names the Fetch stream that has it pinned. PROBE asks for `number`
bytes that mean nothing. All integers are big-endian. With TLS the same goes inside of it. The secret itself came over
the link's control stream, from a peer that is authenticated there; the nonce makes a hello worthless to who saw it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import socket
import ssl
import struct
import time
from contextlib import suppress

from services.common.security import Tls
from services.kvtransfer.transports import STALL_SECONDS

MAGIC = b"RKV2"
NONCE_BYTES = 16
LINK_ID_BYTES = 16
TOKEN_BYTES = 16
GREETING_BYTES = len(MAGIC) + NONCE_BYTES
HELLO_BYTES = len(MAGIC) + LINK_ID_BYTES + hashlib.sha256().digest_size
REQUEST = struct.Struct("!B3xI16s")
HEADER = struct.Struct("!B3xI")
READ, PROBE = 1, 2
OK, NOT_PINNED = 0, 1
HELLO_SECONDS = 2.0

_TIMEVAL = struct.Struct("@ll")


class Garbage(Exception):
    """The peer does not speak this protocol, or is not who it says."""


def hello(greeting: bytes, link_id: bytes, secret: bytes) -> bytes:
    """Raises Garbage if the greeting is none."""
    if len(greeting) != GREETING_BYTES or not greeting.startswith(MAGIC):
        raise Garbage("it does not greet as a data port of this version does")
    return MAGIC + link_id + _proof(secret, greeting[len(MAGIC) :])


def check_hello(message: bytes, nonce: bytes, secret: bytes) -> bool:
    return hmac.compare_digest(message[len(MAGIC) + LINK_ID_BYTES :], _proof(secret, nonce))


def link_id_of(message: bytes) -> bytes:
    """Raises Garbage if it is no hello."""
    if not message.startswith(MAGIC):
        raise Garbage(f"a hello that begins with {message[:4]!r}")
    return message[len(MAGIC) : len(MAGIC) + LINK_ID_BYTES]


def _proof(secret: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, nonce, "sha256")


class Wire:
    """A connected socket, blocking. Every read and write raises OSError or EOFError within STALL_SECONDS of silence,
    except where it may be idle.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tls = isinstance(connection, ssl.SSLSocket)
        if self._tls:
            connection.settimeout(STALL_SECONDS)
        else:
            # The kernel's own time limits: with Python's, each read and write would be two system calls.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(STALL_SECONDS))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(STALL_SECONDS))

    def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """more: something follows at once, to go into the same packet."""
        try:
            self._socket.sendall(data, 0 if self._tls or not more else socket.MSG_MORE)
        except BlockingIOError:
            raise TimeoutError("it takes no more bytes") from None

    def send_file(self, fd: int, view: memoryview, start: int, num_bytes: int) -> None:
        """Bytes of a file, of which view is the mapping. They go from the page cache to the socket; with TLS, through
        its cipher.
        """
        if self._tls:
            self._socket.sendall(view[start : start + num_bytes])
            return
        end = start + num_bytes
        try:
            while start < end:
                start += os.sendfile(self._socket.fileno(), fd, start, end - start)
        except BlockingIOError:
            raise TimeoutError("it takes no more bytes") from None

    def receive(self, num_bytes: int, within_seconds: float = math.inf) -> bytes:
        """within_seconds: for all of it, should it come byte by byte."""
        buffer = bytearray(num_bytes)
        self.receive_into(memoryview(buffer), within_seconds)
        return bytes(buffer)

    def receive_into(self, into: memoryview, within_seconds: float = math.inf) -> None:
        """All of it."""
        received, end = 0, time.monotonic() + within_seconds
        while received < len(into):
            try:
                count = self._socket.recv_into(into[received:])  # MSG_WAITALL is a third slower: measured on loopback
            except BlockingIOError:
                raise TimeoutError(f"no byte for {STALL_SECONDS:g} s") from None
            if not count:
                raise EOFError("closed by the peer")
            received += count
            if received < len(into) and time.monotonic() > end:
                raise TimeoutError(f"it takes longer than {within_seconds:g} s")

    def receive_some(self, limit: int) -> bytes:
        """What is there, after however long: b"" when the peer has closed."""
        while True:
            try:
                return self._socket.recv(limit)
            except (BlockingIOError, TimeoutError):
                continue  # idle: whoever ends the link shuts the socket down

    def abort(self) -> None:
        """From any thread: whoever reads or writes gets an error at once."""
        with suppress(OSError):  # it was not connected any more
            # Not SSLSocket's own, which would also forget the cipher under a thread that is using it.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def server_tls(tls: Tls | None) -> ssl.SSLContext | None:
    if tls is None or tls.cert_path is None or tls.key_path is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.cert_path, tls.key_path)
    if tls.ca_path is not None:
        context.load_verify_locations(tls.ca_path)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(tls: Tls | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(cafile=tls.ca_path)
    if tls.cert_path is not None and tls.key_path is not None:
        context.load_cert_chain(tls.cert_path, tls.key_path)
    return context


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
