"""What a container's health check asks, and what a worker answers whose engine hangs."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import pytest

from services.common.grpc import GrpcServer, make_server
from services.common.security import Security
from services.common.stuck import STUCK_FACTOR, is_stuck
from services.worker.health import tell_health


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    """It asks everybody else for a token."""
    server = make_server([], "127.0.0.1", 0, Security(token="a token of sixteen characters"))
    await server.start()
    yield server
    await server.stop(0)


async def ask(address: str) -> tuple[int | None, str]:
    """Exit code, and all that was said."""
    command = (sys.executable, "-m", "services.common.health", address, "--timeout-seconds", "5")
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    said = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, b"".join(said).decode().strip()


async def test_exit_code_follows_the_servers_health(server: GrpcServer) -> None:
    assert await ask(server.address) == (0, "SERVING")
    await server.set_serving(False)
    assert await ask(server.address) == (1, f"relevo-health: {server.address}: NOT_SERVING")
    await server.set_serving(True)
    await server.drain()
    await server.set_serving(True)
    code, said = await ask(server.address)
    assert (code, said.rpartition(" ")[2]) == (1, "NOT_SERVING"), "a server that leaves does not come back"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1/health"])
async def test_nobody_there_is_one_line(address: str) -> None:
    code, said = await ask(address)
    assert code == 1
    assert said.startswith(f"relevo-health: {address} does not answer: ")
    assert "\n" not in said


async def test_what_is_no_address_is_told() -> None:
    code, said = await ask("decode")
    assert code == 1
    assert "host:port is" in said


@pytest.mark.parametrize(("status", "code"), [("200 OK", 0), ("503 Service Unavailable", 1)])
async def test_routers_are_asked_over_http(status: str, code: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 11\r\n\r\nnone is her".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as http:
        port = http.sockets[0].getsockname()[1]
        returncode, said = await ask(f"http://127.0.0.1:{port}/health")
    assert returncode == code
    assert said.endswith("503: none is her" if code else "SERVING")


class Recorder:
    def __init__(self) -> None:
        self.told: asyncio.Queue[bool] = asyncio.Queue()

    async def set_serving(self, is_serving: bool) -> None:
        self.told.put_nowait(is_serving)


async def test_stuck_engine_is_told_once_and_so_is_its_end() -> None:
    ages = [(0.0, 0.1), (1.5, 0.1), (3.0, 0.1), (9.0, 0.1), (0.0, 9.0), (3.0, 9.0), (60.0, 9.0)]
    recorder = Recorder()
    remaining = iter(ages)
    looking = asyncio.create_task(tell_health(recorder, lambda: next(remaining, ages[-1]), 2.0, look_seconds=0.0))
    told = [await asyncio.wait_for(recorder.told.get(), 10) for _ in range(3)]
    looking.cancel()
    assert told == [False, True, False]
    assert recorder.told.empty()


def test_long_step_is_not_stuck_where_steps_are_long() -> None:
    assert is_stuck(31.0, 1.0, 30.0)
    assert not is_stuck(31.0, 31.0 / STUCK_FACTOR, 30.0)
