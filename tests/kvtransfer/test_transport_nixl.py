"""Agents that have NIXL (pip install relevo[nixl]): it is probed beside tcp, and brings the same blocks."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from services.kvtransfer.client import KvAgentClient
from services.kvtransfer.transports import Figures
from services.kvtransfer.transports.nixl import NixlPuller, NotInstalled, load_nixl
from services.kvtransfer.transports.tcp_puller import TcpPuller

from .blocks import names, publish_all, scrape, take, until, until_unused, write_and_seal
from .conftest import Connect, SpawnAgent, StartAgent

DATA_LOSS = grpc.StatusCode.DATA_LOSS.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.fixture(autouse=True)
def nixl_is_installed() -> None:
    try:
        load_nixl()
    except NotInstalled as error:
        pytest.skip(f"NIXL is not installed (pip install 'relevo[nixl]'): {error}")


async def pull(client: KvAgentClient, source: str, *labels: object, timeout_seconds: float = 5.0) -> dict[int, int]:
    async with client.fetch(names(*labels), source, timeout_seconds=timeout_seconds) as fetch:
        return await take(fetch, labels)


async def test_blocks_come_by_nixl_and_damaged_ones_are_dropped(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["nixl"]), await start(transports=["nixl"])
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c")
    source.store.arena.block(1)[77] ^= 4
    assert await pull(decode, source.address, "a", "b", "c") == {1: DATA_LOSS}
    (link,) = target.links.open_links
    assert link.puller.name == "nixl"
    assert target.links.counters.blocks == {"nixl": 2}


async def test_both_are_probed_and_the_quicker_is_taken_logged_and_exported(
    start: StartAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source, target = [await start(metrics_port=0) for _ in range(2)]
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    assert await pull(decode, source.address, "a") == {}
    await until(lambda: any("link from" in record.getMessage() for record in caplog.records))
    found = await scrape(target.metrics_port)
    seconds = {}  # for a block of 2 MiB, by transport
    for transport in ("nixl", "tcp"):
        labels = f'{{peer="{source.address}",transport="{transport}"}}'
        rate, latency = (found[f"relevo_kv_probe_{what}{labels}"] for what in ("bytes_per_second", "latency_seconds"))
        seconds[transport] = latency + (2 << 20) / rate
    quicker = min(seconds, key=lambda transport: seconds[transport])
    (link,) = target.links.open_links
    assert link.puller.name == quicker
    assert link.reason.startswith("quickest for a block of 2MiB (tcp ") and "; nixl " in link.reason
    said = [record.getMessage() for record in caplog.records]
    for start_of_line in (f"link to {source.address}: {quicker}, ", f"link from {target.address}: {quicker}, "):
        assert any(line.startswith(start_of_line) and link.reason in line for line in said)
    for agent, direction, peer in ((target, "in", source.address), (source, "out", target.address)):
        labels = f'direction="{direction}",peer="{peer}",reason="{link.reason}",transport="{quicker}"'
        assert (await scrape(agent.metrics_port))[f"relevo_kv_link_info{{{labels}}}"] == 1
    assert found[f'relevo_kv_transfer_blocks_total{{direction="in",transport="{quicker}"}}'] == 1


@pytest.mark.parametrize("slow", ["nixl", "tcp"])
async def test_the_slower_one_is_not_taken(
    slow: str, start: StartAgent, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two it is."""
    puller: Any = {"nixl": NixlPuller, "tcp": TcpPuller}[slow]
    probe = puller.probe

    async def probe_slowly(self: Any) -> Figures:
        measured: Figures = await probe(self)
        return replace(measured, latency_seconds=1.0)

    monkeypatch.setattr(puller, "probe", probe_slowly)
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b")
    assert await pull(decode, source.address, "a", "b") == {}
    (link,) = target.links.open_links
    assert {link.puller.name, slow} == {"nixl", "tcp"}
    assert target.links.counters.blocks == {link.puller.name: 2}


async def test_agent_without_nixl_takes_tcp(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["tcp"]), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    assert await pull(decode, source.address, "a") == {}
    assert target.links.open_links[0].puller.name == "tcp"


async def test_source_that_dies_is_unavailable(spawn: SpawnAgent, start: StartAgent, connect: Connect) -> None:
    source, target = spawn("--transports", "nixl"), await start(transports=["nixl"])
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a", "b")) as publication:
        await write_and_seal(publication, ("a", "b"), [0])
        async with decode.fetch(names("a", "b"), source.address, timeout_seconds=30) as fetch:
            assert [block.index for block in (await anext(fetch)).arrived] == [0]
            source.end(signal.SIGKILL)
            began = time.monotonic()
            assert [block.code for block in (await anext(fetch)).missing] == [UNAVAILABLE]
            assert time.monotonic() - began < 5
    await until_unused(target)
    await until(lambda: not target.links.open_links)
    await until(lambda: not [each for each in threading.enumerate() if each.name == "data-nixl"])


async def test_reader_that_leaves_ends_the_pull(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["nixl"]), await start(transports=["nixl"])
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c")
    for _ in range(5):
        pulling = asyncio.create_task(pull(decode, source.address, "a", "b", "c"))
        await asyncio.sleep(0.01)
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)
        await until_unused(target)
    assert await pull(decode, source.address, "a", "b", "c") == {}
