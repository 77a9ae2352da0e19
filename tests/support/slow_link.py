"""A slow link between two network namespaces: by the kernel's netem where it has that, else packet by packet in here.

    python -m tests.support.slow_link NAMESPACE_A NAMESPACE_B DELAY_SECONDS LOSS BYTES_PER_SECOND

opens a tun device in each (a tun device hands packets to a program) and passes packets on: each is delayed, lost with
some probability, and waits for its turn under the cap; a queue that is too long loses what does not fit. It prints a
line when it is ready, and ends when its standard input does.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 1, 0x1000
MAX_QUEUE_SECONDS = 0.2  # of bytes under the cap
MTU = 9000
ADDRESSES = ("10.93.71.1", "10.93.71.2")


@dataclass(frozen=True)
class Shape:
    """Of each direction."""

    delay_seconds: float
    loss: float
    bytes_per_second: float


class Unsupported(Exception):
    """Says what this machine lacks."""


@contextmanager
def slow_link(shape: Shape, *, by_kernel: bool) -> Iterator[tuple[tuple[str, str], subprocess.Popen[bytes] | None]]:
    """Two namespaces with ADDRESSES, and the process between them, if there is one. Raises Unsupported."""
    namespaces = (f"relevo-a-{os.getpid()}", f"relevo-b-{os.getpid()}")
    with ExitStack() as stack:
        for namespace in namespaces:
            _run("ip", "netns", "add", namespace)
            stack.callback(_run, "ip", "netns", "del", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        if by_kernel:
            _link_by_kernel(namespaces, shape)
            yield namespaces, None
        else:
            yield namespaces, stack.enter_context(_relay(namespaces, shape))


def _link_by_kernel(namespaces: tuple[str, str], shape: Shape) -> None:
    device = f"rl{os.getpid()}"
    _run("ip", "link", "add", f"{device}0", "netns", namespaces[0], "type", "veth",
         "peer", "name", f"{device}1", "netns", namespaces[1])  # fmt: skip
    for number, (namespace, address) in enumerate(zip(namespaces, ADDRESSES, strict=True)):
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", f"{device}{number}")
        _run("ip", "-n", namespace, "link", "set", f"{device}{number}", "up")
        _run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", f"{device}{number}", "root", "netem",
             "delay", f"{shape.delay_seconds * 1000:g}ms", "loss", f"{shape.loss:%}",
             "rate", f"{shape.bytes_per_second * 8:.0f}bit")  # fmt: skip


@contextmanager
def _relay(namespaces: tuple[str, str], shape: Shape) -> Iterator[subprocess.Popen[bytes]]:
    figures = [str(shape.delay_seconds), str(shape.loss), str(shape.bytes_per_second)]
    command = [sys.executable, "-m", "tests.support.slow_link", *namespaces, *figures]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise Unsupported("no tun device can be opened (/dev/net/tun)")
            for namespace, address in zip(namespaces, ADDRESSES, strict=True):
                _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "tun0")
                _run("ip", "-n", namespace, "link", "set", "tun0", "mtu", str(MTU), "up")
            yield process
        finally:
            process.kill()


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except FileNotFoundError as error:
        raise Unsupported(f"{command[0]} is not installed (Debian: iproute2)") from error
    except subprocess.CalledProcessError as error:
        raise Unsupported(f"{' '.join(command)}: {error.stderr.decode().strip()}") from error


# --- the process between them ---


class _Direction:
    """Packets from one device to the other, in order of arrival."""

    def __init__(self, source: int, target: int, shape: Shape) -> None:
        self.source = source
        self._target = target
        self._shape = shape
        self._random = random.Random(source)
        self._free_at = 0.0  # when the last byte of the queue has gone
        self._under_way: list[tuple[float, int, bytes]] = []
        self._count = 0

    def take(self) -> None:
        packet = os.read(self.source, 65536)
        now = time.monotonic()
        if self._random.random() < self._shape.loss or self._free_at - now > MAX_QUEUE_SECONDS:
            return
        self._free_at = max(self._free_at, now) + len(packet) / self._shape.bytes_per_second
        self._count += 1
        heapq.heappush(self._under_way, (self._free_at + self._shape.delay_seconds, self._count, packet))

    def deliver(self) -> float:
        """What is due; returns when the next one is."""
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            with suppress(OSError):  # the other end is not up (yet): lost
                os.write(self._target, heapq.heappop(self._under_way)[2])
        return self._under_way[0][0] if self._under_way else float("inf")


def _open_tun(namespace: str) -> int:
    """A tun device in a namespace. This process stays in its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
        return fd
    finally:
        libc.setns(here, CLONE_NEWNET)
        os.close(here)
        os.close(there)


def main(namespaces: tuple[str, str], shape: Shape) -> None:
    fds = [_open_tun(namespace) for namespace in namespaces]
    print("ready", flush=True)
    directions = [_Direction(fds[0], fds[1], shape), _Direction(fds[1], fds[0], shape)]
    poller: Any = select.poll()
    for fd in (*fds, 0):
        poller.register(fd, select.POLLIN)
    while True:
        due = min(direction.deliver() for direction in directions) - time.monotonic()
        timeout = None if due == float("inf") else max(0, due * 1000)
        for fd, events in poller.poll(timeout):
            if fd == 0:
                return
            for direction in directions:
                if direction.source == fd and events & select.POLLIN:
                    direction.take()


if __name__ == "__main__":
    main((sys.argv[1], sys.argv[2]), Shape(*map(float, sys.argv[3:6])))
