"""Workers that ask who is there: the router's token and certificates, and what a client hears when they are wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from relevo.core.errors import Unavailable
from services.common.discovery import StaticDiscovery
from services.common.grpc import make_channel
from services.common.security import NO_SECURITY, Security
from services.pb import worker_pb2, worker_pb2_grpc
from services.router import agents, connection
from services.router.block_watch import BlocksCall, BlockWatch, follow_blocks
from services.router.fleet import Fleet
from services.router.request_stream import DECODE, PREFILL
from tests.router.harness import BLOCK_SIZE, Harness, collect, make_request, names_of, until
from tests.support.agents import running_agent
from tests.support.certificates import identity
from tests.support.fake_sessions import Journal
from tests.support.fake_workers import FakeDecode, FakePrefill, FakeWorker, answer

pytestmark = pytest.mark.timeout(30)

TOKEN = Security("correct horse battery staple")
WRONG = Security("another horse, another battery")


@asynccontextmanager
async def fleet_of(workers: Security, router: Security, agent_address: str = "") -> AsyncIterator[Harness]:
    """A prefill and a decode worker that ask for `workers`, and a router that comes with `router`. May be apart."""
    journal = Journal()
    fakes: Sequence[FakeWorker] = (
        FakePrefill("prefill-0", journal, block_size=BLOCK_SIZE, security=workers),
        FakeDecode("decode-0", journal, block_size=BLOCK_SIZE, security=workers),
    )
    for fake in fakes:
        fake.info.agent_address = agent_address or fake.info.agent_address
        await fake.start()
    prefill, decode = fakes
    fleet = Fleet(StaticDiscovery({"prefill": [prefill.address], "decode": [decode.address]}), security=router)
    run = asyncio.create_task(fleet.run())
    try:
        yield Harness(fleet, fakes, journal)
    finally:
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
        for fake in fakes:
            await fake.stop()


async def check_served(harness: Harness) -> None:
    """By prefill and decode, with their blocks watched."""
    async with asyncio.timeout(10):
        await harness.fleet.wait_connected()
        await harness.journal.wait("decode-0", "watch")
        tokens, _ = await collect(harness.generate(40))
    assert tokens == answer(make_request(40))
    assert "prefill-0 submit" in harness.journal.names()


async def until_refused(harness: Harness) -> None:
    await until(lambda: len(harness.fleet.workers) == 2 and all(each.complaint for each in harness.fleet.workers))


def complaints_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "waiting for" in record.message]


async def test_router_with_the_workers_token_is_served() -> None:
    async with fleet_of(TOKEN, TOKEN) as harness:
        await check_served(harness)


@pytest.mark.parametrize("router", [NO_SECURITY, WRONG])
async def test_router_without_it_says_so_once_and_its_clients_hear_it(
    router: Security, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REFUSED_SECONDS", 0.02)
    asked = count_get_info(monkeypatch)
    with caplog.at_level(logging.INFO):
        async with fleet_of(TOKEN, router) as harness:
            await until(lambda: len(asked) >= 6)
            with pytest.raises(Unavailable, match="set RELEVO_KV_TOKEN") as caught:
                await collect(harness.generate(8))
            assert harness["decode-0"].address in caught.value.message
            assert not harness.dispatcher.is_ready()
            assert harness.dispatcher.complaint() in caught.value.message
    assert len(complaints_in(caplog)) == 2, "one for each worker"
    assert {record.levelname for record in caplog.records if "waiting for" in record.message} == {"ERROR"}


async def test_worker_that_refuses_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MIN_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(connection, "MAX_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(connection, "REFUSED_SECONDS", 0.3)
    asked = count_get_info(monkeypatch)
    async with fleet_of(TOKEN, NO_SECURITY) as harness:
        await until(lambda: len(asked) >= 6)
        times = [at for address, at in asked if address == harness["decode-0"].address]
    assert all(later - earlier >= 0.29 for earlier, later in pairwise(times))


async def test_worker_started_again_with_our_token_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REFUSED_SECONDS", 0.05)
    async with fleet_of(WRONG, TOKEN) as harness:
        await until_refused(harness)
        for worker in harness.workers.values():
            await worker.stop()
            worker.security = TOKEN
            await worker.start()
        await check_served(harness)
        assert not any(worker.complaint for worker in harness.fleet.workers)


async def test_every_method_of_a_worker_asks_for_the_token_but_health() -> None:
    async with fleet_of(TOKEN, TOKEN) as harness:
        for worker, kind in (("prefill-0", PREFILL), ("decode-0", DECODE)):
            async with make_channel(harness[worker].address, WRONG) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                for reading in (
                    stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=5),
                    stub.WatchBlocks(worker_pb2.WatchBlocksRequest(), timeout=5).read(),
                    kind.open(channel).read(),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await reading
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            async with make_channel(harness[worker].address) as channel:
                reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_agent_that_asks_for_the_token_is_followed_by_who_has_it(tmp_path: Path) -> None:
    async with (
        running_agent(tmp_path, transports=["tcp"], kv_token=TOKEN.token) as agent,
        fleet_of(TOKEN, TOKEN, agent.address) as harness,
    ):
        for name in names_of(make_request(40)):
            agent.store.held.add(name)
        await until(lambda: harness.fleet.index.num_blocks(f"agent {agent.address}") == 10)


async def test_agent_that_refuses_us_is_an_error_in_the_log_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "REFUSED_SECONDS", 0.02)
    asked = count_watches(monkeypatch)
    async with (
        running_agent(tmp_path, transports=["tcp"], kv_token=TOKEN.token) as agent,
        fleet_of(NO_SECURITY, NO_SECURITY, agent.address),
    ):
        await until(lambda: len(asked) >= 4)
    (said,) = [record for record in caplog.records if "of kvtransfer agent" in record.message]
    assert said.levelname == "ERROR" and "set RELEVO_KV_TOKEN" in said.message


async def test_certificates_let_the_router_in(certificates: Path) -> None:
    peer = identity(certificates, "peer")
    async with fleet_of(peer, peer) as harness:
        await check_served(harness)


@pytest.mark.parametrize("router", ["stranger", "nothing", "impostor"])
async def test_wrong_certificate_is_said_to_be_one(
    certificates: Path, router: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """impostor: it is the workers whose certificate nobody signed."""
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.5)
    peer, stranger = identity(certificates, "peer"), identity(certificates, "stranger")
    workers = stranger if router == "impostor" else peer
    async with fleet_of(workers, {"stranger": stranger, "nothing": NO_SECURITY, "impostor": peer}[router]) as harness:
        await until_refused(harness)
        with pytest.raises(Unavailable, match="--tls-cert, --tls-key and --tls-ca of the router"):
            await collect(harness.generate(8))
    assert {record.levelname for record in caplog.records if "waiting for" in record.message} == {"ERROR"}


def count_watches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attempts from now on to follow an agent: which one."""
    asked: list[str] = []
    follow = follow_blocks

    async def counted(watching: BlocksCall, watch: BlockWatch, peer: str, silence_seconds: float) -> None:
        asked.append(peer)
        await follow(watching, watch, peer, silence_seconds)

    monkeypatch.setattr(agents, "follow_blocks", counted)
    return asked


def count_get_info(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Each attempt from now on: which worker, and when on the loop's clock."""
    asked: list[tuple[str, float]] = []
    ask = connection.WorkerConnection._ask

    async def counted(
        self: connection.WorkerConnection, channel: grpc.aio.Channel, *, wait_for_ready: bool
    ) -> worker_pb2.WorkerInfo:
        asked.append((self.address, asyncio.get_running_loop().time()))
        return await ask(self, channel, wait_for_ready=wait_for_ready)

    monkeypatch.setattr(connection.WorkerConnection, "_ask", counted)
    return asked
