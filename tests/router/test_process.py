"""The router as a process, with fake workers behind it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from services.common.grpc import make_channel
from services.pb import router_pb2, router_pb2_grpc
from tests.support.certificates import make_certificates
from tests.support.fake_workers import FakeDecode, FakePrefill
from tests.support.no_torch import HIDE_TORCH

pytestmark = pytest.mark.timeout(60)

NO_TORCH = f"{HIDE_TORCH}\nfrom services.router.__main__ import main\nmain()"


def test_never_imports_torch_where_it_is_installed() -> None:
    code = "import sys, services.router.__main__; print([name for name in sys.modules if name.startswith('torch')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr


def test_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-m", "services.router", "--decode", "127.0.0.1:1", "--http-port", port, "--port", "0"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 1
        (line,) = run.stderr.splitlines()
        assert line.startswith(f"relevo-router: error: cannot listen on 127.0.0.1:{port}: Address already in use")


def test_world_open_router_without_a_secret_does_not_start() -> None:
    """Its gRPC port, that is: the HTTP port has keys of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "services.router", "--decode", "127.0.0.1:1", "--http-port=0", "--host=::", "--port=0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("relevo-router: error: --host :: can be reached from other hosts")


async def test_serves_drains_and_leaves() -> None:
    decode, prefill = FakeDecode("decode-0"), FakePrefill("prefill-0", block_size=4)
    await prefill.start()
    async with router(prefill.address, decode) as (process, ready), httpx.AsyncClient(timeout=20) as client:
        url = ready["http"]
        assert ready["role"] == "router"
        assert (await client.get(f"{url}/health")).status_code == 200
        async with make_channel(ready["address"]) as channel:
            reply = await router_pb2_grpc.RouterStub(channel).ListWorkers(router_pb2.ListWorkersRequest(), timeout=10)
        assert sorted(state.info.worker_id for state in reply.workers) == ["decode-0", "prefill-0"]
        gate = decode.behaviour.gates["token-2"] = asyncio.Event()
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            await until_refused(url)
            gate.set()  # what had begun is finished
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert await asyncio.to_thread(process.wait, 20) == 0
    await prefill.stop()


async def test_request_that_outlives_the_drain_is_cut_off() -> None:
    decode = FakeDecode("decode-0")
    async with (
        router("", decode, "--drain-seconds", "0.2") as (process, ready),
        httpx.AsyncClient(timeout=20) as client,
    ):
        decode.behaviour.gates["token-2"] = asyncio.Event()
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
        async with client.stream("POST", f"{ready['http']}/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            with suppress(httpx.HTTPError):
                assert "data: [DONE]" not in [line async for line in lines]
        assert await asyncio.to_thread(process.wait, 20) == 0
        await decode.journal.wait("decode-0", "stream_end")


async def test_keys_file_and_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text(f"one:{hashlib.sha256(b'key-of-one').hexdigest()}\n")
    keys.chmod(0o600)
    flags = [f"--api-keys-file={keys}", f"--http-tls-cert={tmp_path}/peer.pem", f"--http-tls-key={tmp_path}/peer.key"]
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    async with router("", FakeDecode("decode-0"), *flags) as (_, ready), httpx.AsyncClient(verify=trusted) as client:
        assert ready["http"].startswith("https://127.0.0.1:")
        url = f"{ready['http']}/v1/models"
        assert (await client.get(url)).status_code == 401
        assert (await client.get(url, headers={"authorization": "Bearer key-of-one"})).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(url.replace("https:", "http:"))


@asynccontextmanager
async def router(
    prefill: str, decode: FakeDecode, *flags: str
) -> AsyncIterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """Ready, on free ports, in a Python without torch. Killed at the end if it is still there."""
    await decode.start()
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-c", NO_TORCH, "--port=0", "--http-port=0", f"--ready-fd={write_fd}", *flags]
    command += [f"--prefill={prefill}", f"--decode={decode.address}"]
    process = subprocess.Popen(command, pass_fds=(write_fd,))  # noqa: ASYNC220 (spawning is quick)
    os.close(write_fd)
    try:
        with os.fdopen(read_fd) as ready:
            line = await asyncio.to_thread(ready.readline)
        assert line, "the router ended before it was ready; its log says why"
        yield process, json.loads(line)
    finally:
        process.kill()
        await asyncio.to_thread(process.wait, 20)
        await decode.stop()


async def until_refused(url: str) -> None:
    """Until nobody listens there any more; the test's time limit bounds it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        await asyncio.sleep(0.01)
