"""Names with an address for each worker: a resolver that the test speaks for, and the system's own."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest

from services.common.discovery import Members
from services.common.discovery import dns as dns_module
from services.common.discovery.dns import DnsDiscovery
from services.router.fleet import Fleet
from services.router.request_stream import DECODE
from tests.support.agents import until
from tests.support.fake_workers import FakeDecode

pytestmark = pytest.mark.timeout(20)

INTERVAL_SECONDS = 0.02
NAMES = {"prefill": ["prefill.test:50052"], "decode": ["decode.test:50053", "more.test:50054"]}


class Resolver:
    def __init__(self) -> None:
        self.answers: dict[str, list[str]] = {"prefill.test": [], "decode.test": [], "more.test": []}
        self.failure: OSError | None = None
        self.is_slow = False
        self.num_calls = 0

    async def __call__(self, host: str, port: int) -> Iterable[str]:
        self.num_calls += 1
        if self.is_slow:
            await asyncio.get_running_loop().create_future()
        if self.failure is not None:
            raise self.failure
        return self.answers[host]


class Seen:
    def __init__(self, discovery: DnsDiscovery) -> None:
        self.discovery = discovery
        self.known: dict[str, Members] = {}

    async def follow(self, role: str) -> None:
        async for members in self.discovery.watch(role):
            self.known[role] = members

    async def until(self, role: str, *addresses: str) -> None:
        await until(lambda: self.known.get(role) == dict.fromkeys(addresses, ""))


@asynccontextmanager
async def watching(resolver: Resolver) -> AsyncIterator[Seen]:
    seen = Seen(DnsDiscovery(NAMES, INTERVAL_SECONDS, resolver))
    tasks = [asyncio.create_task(seen.discovery.run(lambda _address: False))]
    tasks += [asyncio.create_task(seen.follow(role)) for role in NAMES]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_addresses_come_and_go() -> None:
    resolver = Resolver()
    async with watching(resolver) as seen:
        await seen.until("decode")
        resolver.answers["decode.test"] = ["10.0.0.2", "10.0.0.1"]
        resolver.answers["more.test"] = ["fd00::1"]
        await seen.until("decode", "10.0.0.1:50053", "10.0.0.2:50053", "[fd00::1]:50054")
        resolver.answers["prefill.test"] = ["10.0.0.9"]
        await seen.until("prefill", "10.0.0.9:50052")
        resolver.answers["decode.test"] = ["10.0.0.2"]
        await seen.until("decode", "10.0.0.2:50053", "[fd00::1]:50054")


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_resolver_that_fails_keeps_what_is_known(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dns_module, "RESOLVE_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    resolver = Resolver()
    resolver.answers["decode.test"] = ["10.0.0.1"]
    async with watching(resolver) as seen:
        await seen.until("decode", "10.0.0.1:50053")
        if how == "fails":
            resolver.failure = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        else:
            resolver.is_slow = True
        await until(lambda: "decode.test:50053 cannot be resolved" in seen.discovery.trouble)
        before = resolver.num_calls
        await until(lambda: resolver.num_calls >= before + 9)  # three times round
        assert seen.known["decode"] == {"10.0.0.1:50053": ""}
        resolver.failure, resolver.is_slow = None, False
        await until(lambda: not seen.discovery.trouble)
        messages = [record.getMessage() for record in caplog.records]
        assert len([text for text in messages if text.startswith("decode.test:50053 cannot be resolved")]) == 1
        assert "decode.test:50053 is resolved again" in messages


async def test_fleet_is_reached_by_the_systems_own_resolver() -> None:
    worker = FakeDecode("decode-0")
    await worker.start()
    port = worker.address.rpartition(":")[2]
    fleet = Fleet(DnsDiscovery({"prefill": [], "decode": [f"127.0.0.1:{port}", f"no-such-host.invalid:{port}"]}, 60.0))
    run = asyncio.create_task(fleet.run())
    await until(lambda: len(fleet.candidates(DECODE)) == 1)
    assert "no-such-host.invalid" in fleet.trouble
    run.cancel()
    await asyncio.wait((run,))
    await worker.stop()
