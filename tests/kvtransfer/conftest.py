"""Real agents: in this process for most tests, so that their store can be checked; as processes for the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.common.lifecycle import Process
from services.kvtransfer.agent import Agent, start_agent
from services.kvtransfer.client import KvAgentClient
from services.kvtransfer.config import KvTransferSettings

from .blocks import ARENA_BYTES, BLOCK_BYTES, FINGERPRINT, until_unused

StartAgent = Callable[..., Awaitable[Agent]]
Connect = Callable[..., Awaitable[KvAgentClient]]
SpawnAgent = Callable[..., "AgentProcess"]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartAgent]:
    """Starts agents; at the test's end each must have nothing in use, and its audit must add up."""
    agents: list[Agent] = []
    arena_dir = tmp_path / "here"
    arena_dir.mkdir()
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> Agent:
            full: dict[str, Any] = {"port": 0, "kv_arena": ARENA_BYTES, "arena_dir": arena_dir, "drain_seconds": 0.1}
            full |= settings
            parsed = KvTransferSettings(**full)
            agent = await start_agent(parsed, Process("kvtransfer", parsed, stack))
            agents.append(agent)
            return agent

        yield start
        for agent in agents:
            await until_unused(agent)
    assert not any(arena_dir.iterdir()), "an arena was left behind"


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes attached clients."""
    async with AsyncExitStack() as stack:

        async def connect(address: str, worker_id: str = "worker-0", block_bytes: int = BLOCK_BYTES) -> KvAgentClient:
            client = KvAgentClient(address, worker_id, "incarnation")
            stack.push_async_callback(client.close)
            await client.attach(FINGERPRINT, block_bytes)
            return client

        yield connect


@dataclass
class AgentProcess:
    """python -m services.kvtransfer, ready."""

    process: subprocess.Popen[bytes]
    address: str
    arena_dir: Path

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(10)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[SpawnAgent]:
    """Starts agents as processes."""
    started: list[AgentProcess] = []

    def spawn(*flags: str, name: str = "a", python: tuple[str, ...] = ("-m", "services.kvtransfer")) -> AgentProcess:
        arena_dir = tmp_path / name
        arena_dir.mkdir(exist_ok=True)
        ready, fd = os.pipe()
        command = [sys.executable, *python, "--ready-fd", str(fd), "--kv-arena", str(ARENA_BYTES)]
        if "--port" not in flags:
            command += ["--port", "0"]
        process = subprocess.Popen([*command, "--arena-dir", str(arena_dir), *flags], pass_fds=(fd,))
        os.close(fd)
        with os.fdopen(ready) as lines:
            line = lines.readline()
        agent = AgentProcess(process, json.loads(line)["address"] if line else "", arena_dir)
        started.append(agent)
        return agent

    yield spawn
    for agent in started:
        agent.end(signal.SIGKILL)
