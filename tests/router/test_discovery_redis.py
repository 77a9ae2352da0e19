"""Leases in a real Redis: who is found, by whom, how soon, and what happens when Redis is not there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from relevo.core.errors import StartupError
from services.common.discovery import Members
from tests.support.agents import until
from tests.support.redis_server import RedisServer, running_redis

pytest.importorskip("redis", reason="the extra relevo[redis] is not installed")

from services.common.discovery.fleet_redis import FleetRedis, Member
from services.common.discovery.lease import Lease
from services.common.discovery.redis_discovery import RedisDiscovery
from services.router.fleet import Fleet
from tests.router.harness import collect, make_request
from tests.router.harness import until as until_so
from tests.support.fake_workers import FakeDecode, answer

pytestmark = pytest.mark.timeout(30)

TTL_SECONDS = 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


def decode(number: int, incarnation: str = "one") -> Member:
    return Member("decode", f"10.0.0.{number}:50053", incarnation, f"decode-{number}")


def named(*members: Member) -> Members:
    return {member.address: member.incarnation for member in members}


class Seen:
    """What a router knows."""

    def __init__(self, discovery: RedisDiscovery) -> None:
        self.discovery = discovery
        self.decode: Members | None = None
        self.num_changes = 0

    async def follow(self) -> None:
        async for members in self.discovery.watch("decode"):
            self.decode = members
            self.num_changes += 1

    async def until(self, *members: Member) -> None:
        await until(lambda: self.decode == named(*members))


class Stage:
    """Workers and routers without anything but their places in the list."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.alive: set[str] = set()  # addresses that all routers know to be alive
        self._server = server
        self._stack = stack

    def redis(self, fleet: str = "default") -> FleetRedis:
        redis = FleetRedis(self._server.url, fleet)
        self._stack.push_async_callback(redis.close)
        return redis

    def router(self, fleet: str = "default") -> Seen:
        seen = Seen(RedisDiscovery(self.redis(fleet), TTL_SECONDS))
        self._run(seen.discovery.run(lambda address: address in self.alive))
        self._run(seen.follow())
        return seen

    def worker(self, member: Member, fleet: str = "default") -> Worker:
        lease = Lease(self.redis(fleet), member, TTL_SECONDS)
        return Worker(lease, self._run(lease.run()))

    def _run(self, coroutine: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)  # type: ignore[arg-type]
        self._stack.push_async_callback(end, task)
        return task


class Worker:
    def __init__(self, lease: Lease, task: asyncio.Task[None]) -> None:
        self._lease = lease
        self._task = task

    async def leave(self) -> None:
        """As a process does on SIGTERM."""
        await end(self._task)
        await self._lease.leave()

    async def die(self) -> None:
        await end(self._task)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def stage(server: RedisServer) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield Stage(server, stack)


async def test_workers_are_found_and_leave_at_once(stage: Stage) -> None:
    router = stage.router()
    await router.until()
    worker = stage.worker(decode(1))
    await router.until(decode(1))
    stage.worker(decode(2))
    await router.until(decode(1), decode(2))
    async with asyncio.timeout(TTL_SECONDS / 2):  # not by the lease's end, nor by the reading every third of a TTL
        await worker.leave()
        await router.until(decode(2))


async def test_router_that_comes_later_finds_all(stage: Stage) -> None:
    for number in range(20):
        stage.worker(decode(number))
    first, second = stage.router(), stage.router()
    everybody = [decode(number) for number in range(20)]
    await first.until(*everybody)
    await second.until(*everybody)


async def test_routers_agree_within_a_second_that_a_dead_worker_is_gone(stage: Stage) -> None:
    first, second = stage.router(), stage.router()
    worker = stage.worker(decode(1))
    await first.until(decode(1))
    await second.until(decode(1))
    await worker.die()
    await until(lambda: first.decode == {} or second.decode == {})
    async with asyncio.timeout(TTL_SECONDS / 4):  # whoever sees it first tells the other
        await first.until()
        await second.until()


async def test_router_may_die(stage: Stage) -> None:
    first, second = stage.router(), stage.router()
    await first.until()
    await first.discovery._redis.close()
    stage.worker(decode(1))
    await second.until(decode(1))


async def test_same_address_with_another_incarnation_is_another_worker(stage: Stage) -> None:
    router = stage.router()
    first = stage.worker(decode(1, "first"))
    await router.until(decode(1, "first"))
    await first.die()  # its lease has not ended when the next one comes
    stage.worker(decode(1, "second"))
    await router.until(decode(1, "second"))
    num_changes = router.num_changes
    await until(lambda: len(keys_of(stage)) == 1)
    assert router.num_changes == num_changes and router.decode == named(decode(1, "second"))


def keys_of(stage: Stage) -> list[bytes]:
    found: list[bytes] = stage._server.client.zrange("relevo:fleet:default", 0, -1)
    return found


async def test_fleets_of_one_redis_do_not_see_each_other(stage: Stage) -> None:
    here, there = stage.router("here"), stage.router("there")
    stage.worker(decode(1), "here")
    stage.worker(decode(2), "there")
    await here.until(decode(1))
    await there.until(decode(2))


async def test_what_is_no_worker_is_ignored(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage._server.client.zadd("relevo:fleet:default", {"nonsense": 1e15, b"\xff": 1e15, '{"role": "decode"}': 1e15})
    router = stage.router()
    stage.worker(decode(1))
    await router.until(decode(1))
    assert caplog.text.count("describes no worker") == 3


async def test_known_workers_stay_while_redis_is_gone(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """For longer than a TTL; and when it is back, empty, they are there all the while."""
    caplog.set_level(logging.INFO)
    router = stage.router()
    stage.worker(decode(1))
    stage.worker(decode(2))
    await router.until(decode(1), decode(2))
    num_changes = router.num_changes
    stage._server.stop()
    await until(lambda: bool(router.discovery.trouble))
    await asyncio.sleep(1.5 * TTL_SECONDS)  # it is time itself that is waited for
    await asyncio.to_thread(stage._server.start)
    await until(lambda: not router.discovery.trouble)
    await until(lambda: len(keys_of(stage)) == 2)
    await asyncio.sleep(1.5 * TTL_SECONDS)  # the same
    assert router.num_changes == num_changes and router.decode == named(decode(1), decode(2))
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if "is gone: serving goes on with the 2 workers" in text]) == 1
    assert len([text for text in messages if "is back" in text]) == 1
    assert len([text for text in messages if "routers cannot find this worker" in text]) == 2  # a line a worker
    assert len([text for text in messages if "routers find this worker there again" in text]) == 2


async def test_worker_that_died_while_redis_was_gone_goes_a_ttl_after_it_is_back(stage: Stage) -> None:
    router = stage.router()
    worker = stage.worker(decode(1))
    stage.worker(decode(2))
    await router.until(decode(1), decode(2))
    stage._server.stop()
    await until(lambda: bool(router.discovery.trouble))
    await worker.die()
    await asyncio.to_thread(stage._server.start)
    await router.until(decode(2))


async def test_flushed_redis_costs_nobody_its_place(stage: Stage) -> None:
    router = stage.router()
    stage.worker(decode(1))
    await router.until(decode(1))
    num_changes = router.num_changes
    stage._server.client.flushall()
    await until(lambda: len(keys_of(stage)) == 1)
    assert router.num_changes == num_changes


async def test_who_is_known_to_be_alive_stays_without_a_lease(stage: Stage) -> None:
    """Its way to Redis is broken, and not the router's way to it."""
    router = stage.router()
    cut_off, dead = stage.worker(decode(1)), stage.worker(decode(2))
    await router.until(decode(1), decode(2))
    stage.alive.add(decode(1).address)
    await cut_off.die()
    await dead.die()
    await router.until(decode(1))
    assert not keys_of(stage)
    stage.alive.clear()
    await router.until()


async def test_full_redis_takes_renewals(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    router = stage.router()
    stage.worker(decode(1))
    await router.until(decode(1))
    stage._server.client.config_set("maxmemory", 1)
    before = num_calls(stage)
    await until(lambda: num_calls(stage) > before + 2 * 3)  # for longer than a TTL
    assert router.decode == named(decode(1)) and len(keys_of(stage)) == 1
    assert not caplog.records


async def test_redis_that_hangs_is_gone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.discovery.fleet_redis.CALL_SECONDS", 0.3)
    router = stage.router()
    worker = stage.worker(decode(1))
    await router.until(decode(1))
    stage._server.freeze()
    await until(lambda: bool(router.discovery.trouble))
    async with asyncio.timeout(5):
        await worker.leave()  # does not wait for it
    assert router.decode == named(decode(1))
    stage._server.thaw()
    await until(lambda: not router.discovery.trouble)


async def test_traffic_is_one_call_in_a_third_of_a_ttl(stage: Stage) -> None:
    router = stage.router()
    stage.worker(decode(1))
    await router.until(decode(1))
    before = num_calls(stage)
    await asyncio.sleep(2 * TTL_SECONDS)  # the same
    assert num_calls(stage) - before <= 2 * 2 * 3 + 2


def num_calls(stage: Stage) -> int:
    """Of scripts: renewals and readings."""
    stats = stage._server.client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))


async def test_password_is_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running_redis(tmp_path, "open sesame".replace(" ", "-")) as server:
        async with AsyncExitStack() as stack:
            stage = Stage(server, stack)
            router = stage.router()
            stage.worker(decode(1))
            await router.until(decode(1))
            server.client.config_set("requirepass", "changed")
            server.client.client_kill_filter(skipme=True)
            await until(lambda: bool(router.discovery.trouble))
            assert "sesame" not in caplog.text + router.discovery.trouble


async def test_bad_url_is_refused() -> None:
    with pytest.raises(StartupError, match="--redis-url"):
        FleetRedis("localhost:6379", "default")


@asynccontextmanager
async def fleet_over(stage: Stage) -> AsyncIterator[Fleet]:
    fleet = Fleet(RedisDiscovery(stage.redis(), TTL_SECONDS))
    run = asyncio.create_task(fleet.run())
    try:
        yield fleet
    finally:
        await end(run)


async def test_fleets_of_two_routers_serve_and_let_go_of_the_same_workers(stage: Stage) -> None:
    from services.router.dispatch import FleetDispatcher
    from services.router.request_stream import DECODE

    workers = [FakeDecode(f"decode-{number}") for number in range(2)]
    async with fleet_over(stage) as first, fleet_over(stage) as second:
        leases = []
        for worker in workers:
            await worker.start()
            member = Member("decode", worker.address, worker.info.incarnation, worker.worker_id)
            leases.append(stage.worker(member))
        for fleet in (first, second):
            await until_so(lambda fleet=fleet: len(fleet.candidates(DECODE)) == 2)  # type: ignore[misc]
            tokens, _ = await collect(FleetDispatcher(fleet).generate(make_request(8)))
            assert tokens == answer(make_request(8))
        await leases[0].leave()
        for fleet in (first, second):
            await until_so(lambda fleet=fleet: [w.address for w in fleet.workers] == [workers[1].address])  # type: ignore[misc]
    for worker in workers:
        await worker.stop()
