"""python -m services.prefill and services.decode: ready lines, health, drain, and starts that fail with one line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.grpc import make_channel
from services.pb import worker_pb2, worker_pb2_grpc
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.tiny_models import TinyModels
from tests.workers.harness import decode_stream, prefill_stream, submit_decode
from tests.workers.pair import Pair

START_SECONDS = 60
SMALL = ("--attention-backend", "reference", "--kv-cache-memory", "8MiB")


@dataclass
class Spawned:
    process: subprocess.Popen[bytes]
    ready: dict[str, Any]

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)


class Processes:
    def __init__(self, tmp_path: Path) -> None:
        self._arena_dir = tmp_path
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, service: str, *flags: str) -> Spawned:
        """Start it and wait for its ready line."""
        ready, fd = os.pipe()
        command = [sys.executable, "-m", f"services.{service}", "--port", "0", "--ready-fd", str(fd), *flags]
        process = subprocess.Popen(command, pass_fds=(fd,))
        self._started.append(process)
        os.close(fd)
        with os.fdopen(ready) as lines:
            line = lines.readline()
        return Spawned(process, json.loads(line) if line else {})

    def start_agent(self) -> Spawned:
        return self.start("kvtransfer", "--kv-arena", "8MiB", "--arena-dir", str(self._arena_dir))

    def kill_all(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait(20)


@dataclass
class Peer:
    channel: grpc.aio.Channel


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.kill_all()


def refusal(service: str, *flags: str) -> str:
    """Standard error of a start that must fail with exit code 1."""
    command = [sys.executable, "-m", f"services.{service}", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert result.returncode == 1, result.stderr
    return result.stderr


def test_prefill_without_agent_does_not_start() -> None:
    stderr = refusal("prefill")
    assert stderr.startswith("relevo-prefill: error: --kv-agent (or RELEVO_KV_AGENT) is missing: ")
    assert stderr.count("\n") == 1


def test_agent_that_never_answers_stops_the_start(tiny_models: TinyModels) -> None:
    path = str(tiny_models.path("llama"))
    flags = ("--model", path, "--kv-agent", "127.0.0.1:1", "--attach-timeout-seconds", "0.5", "--port", "0")
    stderr = refusal("decode", *flags, *SMALL)
    assert "relevo-decode: error: --kv-agent 127.0.0.1:1: nobody answers there after 0.5 s" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_world_open_worker_without_a_secret_does_not_start(service: str) -> None:
    stderr = refusal(service, "--host", "0.0.0.0", "--port", "0", "--kv-agent", "127.0.0.1:1")
    assert f"relevo-{service}: error: --host 0.0.0.0 can be reached from other hosts" in stderr
    assert "set RELEVO_KV_TOKEN (or --kv-token-file)" in stderr
    assert stderr.count("\n") == 1


async def test_split_over_processes_then_drain(processes: Processes, tiny_models: TinyModels) -> None:
    """A request that runs when SIGTERM comes is finished; the exit code is 0."""
    path = tiny_models.path("llama")
    model = (
        "--model",
        str(path),
        "--attention-backend",
        "reference",
        "--kv-cache-memory",
        "8MiB",
        "--dtype",
        "float32",
    )
    agent = processes.start_agent()
    prefill = processes.start("prefill", *model, "--kv-agent", agent.ready["address"])
    decode = processes.start("decode", *model, "--kv-agent", agent.ready["address"], "--worker-id", "decode-7")
    assert decode.ready["role"] == "decode" and decode.ready["id"] == "decode-7"
    to_prefill_channel = make_channel(prefill.ready["address"])
    to_decode_channel = make_channel(decode.ready["address"])
    try:
        await check_identity(to_decode_channel, agent.ready["address"])
        async with (
            prefill_stream(Peer(to_prefill_channel)) as to_prefill,
            decode_stream(Peer(to_decode_channel)) as to_decode,
        ):
            pair = Pair(to_prefill, to_decode, max_tokens=NUM_TOKENS)
            assert await pair.serve(1, prompts()[3]) == transformers_greedy(path)[3]
            await to_decode.send(submit_decode(2, prompts()[3], max_tokens=300))
            await to_decode.next(2, "accepted")
            decode.process.send_signal(signal.SIGTERM)
            token_ids, ended = await to_decode.rest(2)
            assert token_ids and not ended.HasField("error")
            assert await to_decode.wait_closed() is grpc.StatusCode.OK
    finally:
        await to_prefill_channel.close()
        await to_decode_channel.close()
    assert await asyncio.to_thread(decode.end) == 0
    assert await asyncio.to_thread(prefill.end) == 0
    assert await asyncio.to_thread(agent.end) == 0


async def check_identity(channel: grpc.aio.Channel, agent_address: str) -> None:
    worker: Any = worker_pb2_grpc.WorkerStub(channel)
    info = await worker.GetInfo(worker_pb2.GetInfoRequest(), timeout=5)
    assert info.role == worker_pb2.ROLE_DECODE and info.worker_id == "decode-7"
    assert info.agent_address == agent_address and len(info.layout_fingerprint) == 32
    health: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="relevo.v1.DecodeService")
    assert (await health.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
