"""The router as a process that finds its workers in Redis or by DNS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from relevo.core.errors import StartupError
from services.common.config import parse_settings
from services.router.config import RouterSettings
from tests.support.fake_workers import FakeDecode
from tests.support.redis_server import running_redis

pytestmark = pytest.mark.timeout(60)

SECRET = "open-sesame"


@asynccontextmanager
async def router(*flags: str, dies: bool = False, **environment: str) -> AsyncIterator[tuple[str, int]]:
    """Its URL and pid. It is ready whether or not there are workers. dies: by SIGKILL, from the test."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "services.router", "--port=0", "--http-port=0", f"--ready-fd={write_fd}", *flags]
    process = subprocess.Popen(command, pass_fds=(write_fd,), env={**os.environ, **environment})  # noqa: ASYNC220
    os.close(write_fd)
    try:
        with os.fdopen(read_fd) as ready:
            line = await asyncio.to_thread(ready.readline)
        assert line, "the router ended before it was ready; its log says why"
        yield json.loads(line)["http"], process.pid
    finally:
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == (-signal.SIGKILL if dies else 0)


async def until_health(client: httpx.AsyncClient, url: str, sign: str, status: int = 200) -> str:
    """Until /health says so."""
    async with asyncio.timeout(20):
        while True:
            reply = await client.get(f"{url}/health")
            if reply.status_code == status and sign in reply.text:
                return reply.text
            await asyncio.sleep(0.02)


def command_line(pid: int) -> str:
    """As `ps` shows it."""
    return Path(f"/proc/{pid}/cmdline").read_text()


async def complete(client: httpx.AsyncClient, url: str) -> None:
    reply = await client.post(f"{url}/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4})
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 4


async def test_router_serves_who_signs_in_and_goes_on_without_redis(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="the extra relevo[redis] is not installed")
    from services.common.discovery.fleet_redis import FleetRedis, Member

    worker = FakeDecode("decode-0")
    await worker.start()
    with running_redis(tmp_path, SECRET) as server:
        redis = FleetRedis(server.url, "blue")
        flags = ("--discovery=redis", "--fleet-name=blue", "--discovery-ttl-seconds=60")
        async with router(*flags, RELEVO_REDIS_URL=server.url) as (url, pid), httpx.AsyncClient(timeout=20) as client:
            assert SECRET not in await asyncio.to_thread(command_line, pid)
            await until_health(client, url, "none is connected", 503)
            await redis.renew(Member("decode", worker.address, worker.info.incarnation, "decode-0"), 60.0)
            assert "warning" not in await until_health(client, url, "ok")
            await complete(client, url)
            server.stop()
            assert SECRET not in await until_health(client, url, "is gone")
            await complete(client, url)
            metrics = (await client.get(f"{url}/metrics")).text
            assert "relevo_fleet_discovery_stopped 1.0" in metrics
            assert 'condition="ready",role="decode"} 1.0' in metrics.replace(f'address="{worker.address}",', "")
        await redis.close()
    await worker.stop()


async def test_router_without_redis_starts_and_says_what_is_missing() -> None:
    async with (
        router("--discovery=redis", RELEVO_REDIS_URL=f"redis://:{SECRET}@127.0.0.1:1/0") as (url, _),
        httpx.AsyncClient(timeout=20) as client,
    ):
        assert SECRET not in await until_health(client, url, "is gone", 503)


async def test_router_resolves_names() -> None:
    worker = FakeDecode("decode-0")
    await worker.start()
    port = worker.address.rpartition(":")[2]
    async with (
        router("--discovery=dns", f"--decode=localhost:{port}", "--dns-seconds=0.2") as (url, _),
        httpx.AsyncClient(timeout=20) as client,
    ):
        await until_health(client, url, "ok")
        await complete(client, url)
    await worker.stop()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--discovery=redis"], "--discovery redis needs --redis-url (or RELEVO_REDIS_URL)"),
        (["--discovery=redis", "--redis-url=redis://h/0", "--decode=a:1"], "are for --discovery static or dns"),
        (["--discovery=dns"], "--decode is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(StartupError) as caught:
        parse_settings(RouterSettings, flags)
    assert reason in caught.value.message


async def test_one_of_two_routers_may_be_killed(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="the extra relevo[redis] is not installed")
    from services.common.discovery.fleet_redis import FleetRedis, Member

    first, second = FakeDecode("decode-0"), FakeDecode("decode-1")
    await first.start()
    await second.start()
    with running_redis(tmp_path) as server:
        redis = FleetRedis(server.url, "default")
        flags = ("--discovery=redis", "--discovery-ttl-seconds=60", f"--redis-url={server.url}")
        async with (
            router(*flags) as (survivor, _),
            router(*flags, dies=True) as (victim, pid),
            httpx.AsyncClient(timeout=20) as client,
        ):
            await redis.renew(Member("decode", first.address, first.info.incarnation, "decode-0"), 60.0)
            for url in (survivor, victim):
                await until_health(client, url, "ok")
                await complete(client, url)
            os.kill(pid, signal.SIGKILL)
            await redis.renew(Member("decode", second.address, second.info.incarnation, "decode-1"), 60.0)
            await redis.leave(Member("decode", first.address, first.info.incarnation, "decode-0"))
            await second.journal.wait("decode-1", "watch")
            await first.journal.wait("decode-0", "stream_end", 2)  # of each router
            await complete(client, survivor)
            assert len(second.journal.all("decode-1", "submit")) == 1
        await redis.close()
    await first.stop()
    await second.stop()
