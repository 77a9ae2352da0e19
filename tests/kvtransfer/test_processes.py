"""Agents and workers as processes: how they start, end, die and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from relevo.core.errors import RelevoError, Unavailable
from services.kvtransfer.client import KvAgentClient, read_block

from .blocks import (
    BLOCK_BYTES,
    NUM_SLOTS,
    fetch_all,
    names,
    publish_all,
    until,
    until_readers,
    until_unused,
    write_and_seal,
)
from .conftest import Connect, SpawnAgent, StartAgent

ABORTED = grpc.StatusCode.ABORTED.value[0]
NO_TORCH = (
    "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('services.kvtransfer', run_name='__main__')"
)


@contextmanager
def worker(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """tests.kvtransfer.worker; killed at the end if it still runs."""
    command = [sys.executable, "-m", "tests.kvtransfer.worker", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


async def line_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).decode().strip()


async def test_two_processes_hand_blocks_over(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    with worker("publish", agent.address, "a", "b", "last") as writer:
        assert await line_of(writer) == "published"
        with worker("fetch", agent.address, "a", "b") as reader:
            assert await line_of(reader) == "good 2"


async def test_killed_writer_is_aborted_and_its_slots_are_free(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    with worker("publish", agent.address, "a", "last") as writer:
        assert await line_of(writer) == "published"
        waiting = asyncio.create_task(fetch_all(client, "a", "last"))
        await until_readers(agent, 1)
        writer.kill()
        assert await waiting == {1: ABORTED}
        await until_unused(agent)
        assert agent.store.table.audit().num_free == NUM_SLOTS - 1


async def test_killed_readers_pins_are_gone(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    await publish_all(client, "a")
    with worker("fetch", agent.address, "a") as reader:
        assert await line_of(reader) == "good 1"
        assert (await client.audit()).num_pinned == 1
        reader.kill()
        await until_unused(agent)


async def test_hung_readers_pins_are_gone_within_seconds(start: StartAgent, connect: Connect) -> None:
    """It neither answers pings nor closes its connection; pin_seconds alone would take a minute."""
    agent = await start()
    client = await connect(agent.address)
    await publish_all(client, "a")
    with worker("fetch", agent.address, "a") as reader:
        assert await line_of(reader) == "good 1"
        os.kill(reader.pid, signal.SIGSTOP)
        await until(lambda: not agent.store.table.audit().num_pinned, seconds=20)


async def test_dead_agent_is_unavailable_at_once(spawn: SpawnAgent, connect: Connect) -> None:
    agent = spawn()
    client = await connect(agent.address)
    async with client.fetch([], timeout_seconds=30) as idle, client.publish(names("a")) as publication:
        async with client.fetch(names("a"), timeout_seconds=30) as waiting:
            agent.end(signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await anext(waiting)
            with pytest.raises(Unavailable):
                await publication.seal([(0, 1)])
            with pytest.raises(Unavailable):
                await publish_all(client, "b")
            assert time.monotonic() - began < 2
        assert [batch async for batch in idle] == []


async def test_agent_that_hangs_is_unavailable(
    spawn: SpawnAgent, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.kvtransfer.publication.REPLY_SECONDS", 0.5)
    agent = spawn()
    client = await connect(agent.address)
    os.kill(agent.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="does not answer"):
        await publish_all(client, "a")
    assert time.monotonic() - began < 3


async def test_restarted_agent_is_attached_to_anew(spawn: SpawnAgent, connect: Connect) -> None:
    agent = spawn()
    client = await connect(agent.address)
    async with client.publish(names("a")) as publication:
        await write_and_seal(publication, ("a",), [0])
    async with client.fetch(names("a"), timeout_seconds=5) as old:
        [block] = (await anext(old)).arrived
        agent.end(signal.SIGKILL)
        again = spawn("--port", agent.address.rpartition(":")[2])
        assert again.address == agent.address
        assert read_block(old.slot(block), bytearray(BLOCK_BYTES), block.checksum), "a dead agent's memory stays mapped"
        await _until_connected(client)
        async with client.publish(names("b")) as publication:
            assert publication.mapping.incarnation != old.mapping.incarnation
            await write_and_seal(publication, ("b",), [0])
            assert not read_block(old.slot(block), bytearray(BLOCK_BYTES), checksum=1)
    assert await fetch_all(client, "b") == {}
    assert sorted(await fetch_all(client, "a")) == [0]


async def _until_connected(client: KvAgentClient) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                await client.audit()
                return
            except RelevoError:
                await asyncio.sleep(0.02)


def test_sigterm_ends_it_fast_and_removes_the_arena(spawn: SpawnAgent) -> None:
    agent = spawn()
    [folder] = agent.arena_dir.iterdir()
    [arena] = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert arena.stat().st_mode & 0o777 == 0o600
    began = time.monotonic()
    assert agent.end(signal.SIGTERM) == 0
    assert time.monotonic() - began < 2
    assert not list(agent.arena_dir.iterdir())


def test_killed_agents_arena_is_removed_by_the_next_one(spawn: SpawnAgent) -> None:
    killed, alive = spawn(), spawn()
    assert len(list(killed.arena_dir.rglob("*.arena"))) == 2
    killed.end(signal.SIGKILL)
    assert len(list(killed.arena_dir.rglob("*.arena"))) == 2
    assert spawn().address
    assert len(list(killed.arena_dir.rglob("*.arena"))) == 2, "the killed one's is gone, the living one's is not"
    assert alive.process.poll() is None


def test_it_starts_without_torch(spawn: SpawnAgent) -> None:
    agent = spawn(python=("-c", NO_TORCH))
    assert agent.address
    assert agent.end() == 0


def refusal(*flags: str) -> str:
    """What an agent that cannot start prints."""
    command = [sys.executable, "-m", "services.kvtransfer", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    return line


def test_what_keeps_it_from_starting_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("--port", str(port), "--kv-arena", "64k", "--arena-dir", str(tmp_path))
    assert line == (
        f"relevo-kvtransfer: error: cannot listen on 127.0.0.1:{port}: Address already in use;"
        " choose another --host or --port"
    )
    assert not list(tmp_path.iterdir())
    assert "--kv-arena 900TiB does not fit into" in refusal("--kv-arena", "900TiB", "--arena-dir", str(tmp_path))
    assert "is not a directory" in refusal("--arena-dir", str(tmp_path / "nowhere"))
