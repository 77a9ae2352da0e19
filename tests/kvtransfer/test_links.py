"""Links between agents: what is measured and said about them, and what happens when one end goes wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.kvtransfer.agent import Agent
from services.kvtransfer.client import KvAgentClient
from services.kvtransfer.transports import wire
from services.pb import kvlink_pb2, kvlink_pb2_grpc, kvtransfer_pb2, kvtransfer_pb2_grpc

from .blocks import BLOCK_BYTES, names, publish_all, scrape, take, until, until_unused, write_and_seal
from .conftest import Connect, SpawnAgent, StartAgent

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
DATA_LOSS = grpc.StatusCode.DATA_LOSS.value[0]
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


@pytest.fixture(autouse=True)
def no_data_thread_is_left() -> Any:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data-")]


async def pull(client: KvAgentClient, source: str, *labels: object, timeout_seconds: float = 5.0) -> dict[int, int]:
    async with client.fetch(names(*labels), source, timeout_seconds=timeout_seconds) as fetch:
        return await take(fetch, labels)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_both_ends_say_which_transport_was_taken_and_why(
    start: StartAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source, target = await start(metrics_port=0), await start(metrics_port=0, transports=["tcp"])
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b")
    assert await pull(decode, source.address, "a", "b") == {}
    (link,) = target.links.open_links
    assert link.figures.bytes_per_second > 1e6
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert any(text.startswith(f"link to {source.address}: tcp, ") and " MB/s, " in text for text in said)
    await until(lambda: any(f"link from {target.address}: tcp, " in record.getMessage() for record in caplog.records))
    for agent, direction, peer in ((target, "in", source.address), (source, "out", target.address)):
        found = await scrape(agent.metrics_port)
        labels = f'direction="{direction}",peer="{peer}"'
        assert found[f'relevo_kv_link_bytes_per_second{{{labels},transport="tcp"}}'] == link.figures.bytes_per_second
        assert found[f'relevo_kv_link_latency_seconds{{{labels},transport="tcp"}}'] == link.figures.latency_seconds
        assert found[f'relevo_kv_link_info{{{labels},reason="{link.reason}",transport="tcp"}}'] == 1


async def test_transfers_are_measured_at_both_ends(start: StartAgent, connect: Connect) -> None:
    source, target = [await start(metrics_port=0, transports=["tcp"]) for _ in range(2)]
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c")
    source.store.arena.block(1)[77] ^= 4
    assert await pull(decode, source.address, "a", "b", "c") == {1: DATA_LOSS}
    await until(lambda: source.data_server.num_blocks == 3)
    for agent, direction, num_blocks in ((target, "in", 2), (source, "out", 3)):
        found = await scrape(agent.metrics_port)
        of = f'{{direction="{direction}",transport="tcp"}}'
        assert found[f"relevo_kv_transfer_bytes_total{of}"] == num_blocks * BLOCK_BYTES
        assert found[f"relevo_kv_transfer_blocks_total{of}"] == num_blocks
        assert 0 < found[f"relevo_kv_transfer_seconds_total{of}"] < 5
        assert found[f"relevo_kv_transfer_block_seconds_count{of}"] == num_blocks
        assert 0 < found[f"relevo_kv_transfer_block_seconds_sum{of}"] < 5
    found = await scrape(target.metrics_port)
    assert found['relevo_kv_transfer_batch_seconds_count{direction="in",transport="tcp"}'] >= 1
    assert found['relevo_kv_transfer_failed_blocks_total{reason="corrupt"}'] == 1
    assert found['relevo_kv_tier_checksum_failures_total{tier="arena"}'] == 1
    assert found['relevo_kv_probes_total{result="measured",transport="tcp"}'] == 1
    assert found[f'relevo_kv_probe_bytes_per_second{{peer="{source.address}",transport="tcp"}}'] > 1e6


async def test_link_below_the_floor_is_a_warning_with_the_number(
    start: StartAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = await start(), await start(link_floor=10**15, transports=["tcp"])
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    assert await pull(decode, source.address, "a") == {}
    (warning,) = [record.getMessage() for record in caplog.records if "is slow" in record.getMessage()]
    measured = target.links.open_links[0].figures.bytes_per_second / 1e6
    assert f"tcp brings {measured:.1f} MB/s, less than --link-floor 1000000000.0 MB/s" in warning


async def test_one_link_serves_many_pulls(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c", "d")
    assert await asyncio.gather(*(pull(decode, source.address, label) for label in "abcd")) == [{}] * 4
    assert target.links.counters.num_opened == 1


async def test_idle_link_is_closed_and_made_anew(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["tcp"]), await start(transports=["tcp"])
    target.links._idle_seconds = 0.05
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b")
    assert await pull(decode, source.address, "a") == {}
    await until(lambda: not target.links.open_links)
    await until(lambda: not [each for each in threading.enumerate() if each.name.startswith("data-")])
    assert await pull(decode, source.address, "b") == {}
    assert target.links.counters.num_opened == 2


async def test_source_that_is_started_again_is_linked_anew(
    spawn: SpawnAgent, start: StartAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    port = str(free_port())
    target = await start()
    decode = await connect(target.address)
    for label, name in (("a", "first"), ("b", "second")):
        source = spawn("--port", port, name=name)
        prefill = await connect(source.address)
        await publish_all(prefill, label)
        assert await pull(decode, source.address, label) == {}
        source.end(signal.SIGKILL)
        await until(lambda: not target.links.open_links)
    assert target.links.counters.num_opened == 2
    assert any("was started again" in record.getMessage() for record in caplog.records)


async def test_damaged_block_is_dropped_at_both_ends_and_counted(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b")
    source.store.arena.block(1)[77] ^= 4
    assert await pull(decode, source.address, "a", "b") == {1: DATA_LOSS}
    assert target.links.counters.failed_blocks == {"corrupt": 1}
    assert target.store.counters.corrupt_blocks == 1
    await until(lambda: not source.store.table.is_sealed(names("b")[0]))
    assert source.store.counters.corrupt_blocks == 1
    assert [target.store.table.is_sealed(name) for name in names("a", "b")] == [True, False]


async def test_source_that_stops_is_noticed_within_the_deadline(
    spawn: SpawnAgent, start: StartAgent, connect: Connect
) -> None:
    source, target = spawn(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a", "b")) as publication:
        await write_and_seal(publication, ("a", "b"), [0])
        async with decode.fetch(names("a", "b"), source.address, timeout_seconds=1.0) as fetch:
            assert [block.index for block in (await anext(fetch)).arrived] == [0]
            began = time.monotonic()
            os.kill(source.process.pid, signal.SIGSTOP)
            assert [block.code for block in (await anext(fetch)).missing] == [DEADLINE_EXCEEDED]
            assert time.monotonic() - began < 3
        await until_unused(target)
        os.kill(source.process.pid, signal.SIGCONT)
        await write_and_seal(publication, ("a", "b"), [1])
    assert await pull(decode, source.address, "b") == {}


async def test_source_without_a_data_port_is_unavailable_and_says_so(
    start: StartAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = await start(transports=["tcp"]), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    source.data_server.address = f"127.0.0.1:{free_port()}"
    assert await pull(decode, source.address, "a") == {0: UNAVAILABLE}
    assert any("no data transport to" in record.getMessage() for record in caplog.records)


async def test_data_port_shows_pinned_slots_to_their_reader_only(start: StartAgent, connect: Connect) -> None:
    """A link is not enough: blocks are shown to the Fetch stream that pins them, as long as it does."""
    agent = await start()
    client = await connect(agent.address)
    await publish_all(client, "a", "b")
    link = kvlink_pb2_grpc.KvLinkStub(client._channel).Open()
    await link.write(kvlink_pb2.LinkRequest(hello=kvlink_pb2.LinkHello(agent_address="me")))
    reply = await link.read()
    assert isinstance(reply, kvlink_pb2.LinkReply)
    fetch = kvtransfer_pb2_grpc.KvTransferStub(client._channel).Fetch(timeout=10)
    opened = kvtransfer_pb2.OpenFetch(block_hashes=names("a"), timeout_ms=1000)
    await fetch.write(kvtransfer_pb2.FetchRequest(open=opened))
    shown = await fetch.read()
    assert isinstance(shown, kvtransfer_pb2.FetchReply)
    token, slot = shown.pull_token, shown.blocks[0].slot

    def ask(*requests: tuple[bytes, int]) -> list[int]:
        """Statuses of the answers."""
        host, _, port = reply.welcome.offers[0].address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            data = wire.Wire(connection)
            greeting = data.receive(wire.GREETING_BYTES)
            data.send(wire.hello(greeting, reply.welcome.link_id, reply.welcome.secret))
            statuses = [wire.HEADER.unpack(data.receive(wire.HEADER.size))[0]]
            for token, slot in requests:
                data.send(wire.REQUEST.pack(wire.READ, slot, token))
                status, num_bytes = wire.HEADER.unpack(data.receive(wire.HEADER.size))
                data.receive(num_bytes)
                statuses.append(status)
            return statuses

    asked = ((token, slot), (token, slot ^ 1), (bytes(16), slot))
    assert await asyncio.to_thread(ask, *asked) == [wire.OK, wire.OK, wire.NOT_PINNED, wire.NOT_PINNED]
    fetch.cancel()
    await until_unused(agent)
    assert await asyncio.to_thread(ask, (token, slot)) == [wire.OK, wire.NOT_PINNED]
    link.cancel()


async def test_agent_that_ends_leaves_no_thread(tmp_path: Path, start: StartAgent, connect: Connect) -> None:
    """And its links end with it, at the other end as well: the fixture looks at threads."""
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    assert await pull(decode, source.address, "a") == {}
    agents: list[Agent] = [source, target]
    assert [len(agent.links.open_links) for agent in agents] == [0, 1]
