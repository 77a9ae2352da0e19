"""Workers that sign in with Redis, join and leave under load: real processes, and no request fails."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from relevo.core.sampling_params import SamplingParams
from services.kvtransfer.agent import Agent
from services.router.fleet import Fleet
from services.router.request_stream import DECODE, PREFILL
from tests.faults.stack import NUM_PAGES, Clients, flags
from tests.faults.test_storm import make_prompts, transformers_greedy
from tests.faults.zygote import Forked, Role, Zygote
from tests.support.agents import is_unused, running_agent, until
from tests.support.redis_server import RedisServer, running_redis

pytestmark = pytest.mark.timeout(90)

NUM_CLIENTS = 8
NUM_TOKENS = 24
TTL_SECONDS = 2.0
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


class Stage:
    def __init__(self, zygote: Zygote, model: Path, agent: Agent, redis: RedisServer, clients: Clients) -> None:
        self.clients = clients
        self._zygote = zygote
        self._flags = [*flags(model, agent.address), "--discovery=redis", f"--redis-url={redis.url}"]
        self._flags.append(f"--discovery-ttl-seconds={TTL_SECONDS}")
        self.running: list[Forked] = []

    async def join(self, role: Role, drain_seconds: float) -> Forked:
        more = (*self._flags, f"--drain-seconds={drain_seconds}")
        forked = await asyncio.to_thread(self._zygote.start, role, *more)
        self.running.append(forked)
        return forked

    async def leave(self, forked: Forked) -> None:
        """SIGTERM, and until it has ended, as it should."""
        forked.send(signal.SIGTERM)
        assert await asyncio.to_thread(forked.wait) == 0


@asynccontextmanager
async def staged(zygote: Zygote, model: Path, folder: Path, redis: RedisServer) -> AsyncIterator[Stage]:
    """At the end nothing may be held anywhere."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(running_agent(folder, num_blocks=NUM_PAGES))
        clients, run = make_router(redis, stack)
        stage = Stage(zygote, model, agent, redis, clients)
        try:
            yield stage
            await stage.clients.until_whole()
            await until(lambda: is_unused(agent))
        finally:
            run.cancel()
            with suppress(asyncio.CancelledError):
                await run
            for forked in stage.running:
                await asyncio.to_thread(forked.end)


async def test_no_request_fails_while_workers_join_and_leave(
    zygote: Zygote, model: Path, tmp_path: Path, redis: RedisServer
) -> None:
    prompts = make_prompts()[::7]
    expected = transformers_greedy(model, prompts, NUM_TOKENS)
    is_over = False
    num_requests = num_moved = 0

    async def ask(client: int, clients: Clients) -> None:
        nonlocal num_requests, num_moved
        numbers = random.Random(client)
        while not is_over:
            number = numbers.randrange(len(prompts))
            num_requests += 1
            answer = await clients.generate(prompts[number], GREEDY, salt=str(num_requests // 20))
            assert answer.token_ids == expected[number]
            num_moved += answer.num_tries > 1

    async with staged(zygote, model, tmp_path, redis) as stage:
        clients = stage.clients
        prefill = await stage.join("prefill", 5.0)
        # They have no time to finish: what runs there is handed over.
        decodes = [await stage.join("decode", 0.0)]
        await clients.until_connected(PREFILL, 1)
        await clients.until_connected(DECODE, 1)
        async with asyncio.TaskGroup() as tasks:
            for client in range(NUM_CLIENTS):
                tasks.create_task(ask(client, clients))
            for drain_seconds in (0.0, 5.0, 0.0):
                decodes.append(await stage.join("decode", drain_seconds))
                await clients.until_connected(DECODE, 2)
                before = num_requests
                await until(lambda before=before: num_requests > before + 2 * NUM_CLIENTS)  # type: ignore[misc]
                await stage.leave(decodes.pop(0))
                await until(lambda: len(clients.fleet.workers) == 2)
            await stage.leave(prefill)
            await until(lambda: len(clients.fleet.workers) == 1)
            await stage.join("prefill", 5.0)
            await clients.until_connected(PREFILL, 1)
            is_over = True
        print(f"{num_requests} requests, {num_moved} moved")
        assert num_moved > 0


async def test_router_that_dies_leaves_nothing_at_the_workers(
    zygote: Zygote, model: Path, tmp_path: Path, redis: RedisServer
) -> None:
    """Another one goes on meanwhile."""
    prompts = make_prompts()[:4]
    expected = transformers_greedy(model, prompts, NUM_TOKENS)
    endless = SamplingParams(max_tokens=300, temperature=0.0, seed=0, ignore_eos=True)
    async with staged(zygote, model, tmp_path, redis) as stage, AsyncExitStack() as stack:
        victim, run = make_router(redis, stack)
        await stage.join("prefill", 5.0)
        await stage.join("decode", 5.0)
        for clients in (stage.clients, victim):
            await clients.until_connected(PREFILL, 1)
            await clients.until_connected(DECODE, 1)
        lost = [asyncio.create_task(victim.generate(prompt, endless)) for prompt in prompts]
        going_on = [asyncio.create_task(stage.clients.generate(prompt, GREEDY)) for prompt in prompts]
        await until(lambda: victim.num_tokens > 8)
        run.cancel()
        answers = await asyncio.gather(*going_on)
        assert [answer.token_ids for answer in answers] == expected
        for task in lost:
            task.cancel()
        await asyncio.wait([*lost, run])


def make_router(redis: RedisServer, stack: AsyncExitStack) -> tuple[Clients, asyncio.Task[None]]:
    from services.common.discovery.fleet_redis import FleetRedis
    from services.common.discovery.redis_discovery import RedisDiscovery

    connection = FleetRedis(redis.url, "default")
    stack.push_async_callback(connection.close)
    fleet = Fleet(RedisDiscovery(connection, TTL_SECONDS))
    return Clients(fleet), asyncio.create_task(fleet.run())


async def test_killed_worker_is_out_of_the_list_by_the_end_of_its_lease(
    zygote: Zygote, model: Path, tmp_path: Path, redis: RedisServer
) -> None:
    async with staged(zygote, model, tmp_path, redis) as stage:
        decode = await stage.join("decode", 0.0)
        await stage.clients.until_connected(DECODE, 1)
        decode.send(signal.SIGKILL)
        await asyncio.to_thread(decode.wait)
        await until(lambda: not stage.clients.fleet.workers)
        assert not redis.client.exists("relevo:fleet:default")
