"""Random requests against our own OpenAPI, and a storm of what is none: never a 5xx, and nothing stays behind.

RELEVO_STORM_REQUESTS=100000 makes the storm as large as that; `make test` sends some thousands.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sys
from pathlib import Path

import psutil
import pytest

from services.router.http.connection import ConnectionLimits
from services.router.http.server import HttpOptions
from tests.router.http.conftest import Edge, Served, running
from tests.router.http.test_hang_up import until

NUM_REQUESTS = int(os.environ.get("RELEVO_STORM_REQUESTS", "3000"))
NUM_AT_ONCE = 100
MAX_GROWTH_BYTES = 16 << 20

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def test_requests_made_of_our_own_schema_get_no_5xx(edge: Edge, tmp_path: Path) -> None:
    """Right and wrong ones; and replies are what the schema says."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{edge.port}/openapi.json"]
    command += ["--checks", CHECKS, "--mode", "all", "--max-examples", "15", "--seed", "1", "--no-color"]
    command += ["--generation-database", "none", "--phases", "coverage,fuzzing"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert edge.dispatcher.generations, "some are right"


RIGHT = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n"
    b'{"prompt": "a","max_tokens":1}'
)


def malformed(draw: random.Random) -> bytes:
    """A request that is cut, changed in some bytes, or nothing like one."""
    match draw.randrange(5):
        case 0:
            return RIGHT[: draw.randrange(len(RIGHT))]
        case 1:
            changed = bytearray(RIGHT)
            for _ in range(draw.randrange(1, 6)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            return bytes(changed)
        case 2:
            return draw.randbytes(draw.randrange(1, 300))
        case 3:
            at = draw.randrange(len(RIGHT))
            return RIGHT[:at] + draw.randbytes(draw.randrange(1, 50)) + RIGHT[at:]
        case _:
            return RIGHT[:40] + b"X: " + b"y" * draw.randrange(40_000) + b"\r\n"


async def send_one(edge: Edge, raw: bytes, way: int) -> int | None:
    """The status, if there was one. way: 0 = wait for the answer, 1 = close the writing half and wait, 2 = just go."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    except ConnectionError:
        return None
    try:
        writer.write(raw)
        if way == 1:
            writer.write_eof()
        if way < 2:
            line = await reader.readline()
            return int(line.split()[1]) if line else None
    except (ConnectionError, ValueError):
        pass
    finally:
        writer.transport.abort()
    return None


async def storm(edge: Edge, num: int, draw: random.Random) -> dict[int | None, int]:
    statuses: dict[int | None, int] = {}

    async def sender(share: int) -> None:
        for _ in range(share):
            status = await send_one(edge, malformed(draw), draw.randrange(3))
            statuses[status] = statuses.get(status, 0) + 1

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_AT_ONCE):
            group.create_task(sender(num // NUM_AT_ONCE))
    return statuses


@pytest.mark.timeout(1800 if NUM_REQUESTS > 10_000 else 120)
async def test_a_storm_of_nonsense_leaves_nothing_behind(shared: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Half-open connections stay open all through it; memory and files are as they were, and the server serves."""
    shared.dispatcher.reset()
    draw = random.Random(7)
    limits = ConnectionLimits(head_seconds=0.25, body_seconds=0.25, write_seconds=0.5)
    process = psutil.Process()
    async with running(shared, HttpOptions(limits=limits)) as edge:
        await storm(edge, 1000, draw)  # caches and pools fill
        await until(lambda: not edge.connections)
        shared.dispatcher.reset()
        gc.collect()
        rss, num_fds = process.memory_info().rss, process.num_fds()
        async with contextlib.AsyncExitStack() as half_open:
            for _ in range(200):
                _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
                half_open.callback(lambda each: each.transport.abort(), writer)
                writer.write(RIGHT[:50])
            statuses = await storm(edge, NUM_REQUESTS, draw)
        assert edge.num_cut("slow_head") >= 200
        await until(lambda: not edge.connections and process.num_fds() == num_fds)
        shared.dispatcher.reset()
        gc.collect()
        grown = process.memory_info().rss - rss
        assert grown < MAX_GROWTH_BYTES
        assert not [status for status in statuses if status is not None and status >= 500], statuses
        assert {200, 400, 408, 431} <= statuses.keys()
        async with asyncio.timeout(20):  # a machine that is busy may need longer than these limits
            while await send_one(edge, RIGHT, 0) != 200:
                pass
    assert not caplog.records, "nonsense must not fill the log"
    print(f"{sum(statuses.values())} requests: {statuses}; RSS grew by {grown / 2**20:.1f} MiB")
