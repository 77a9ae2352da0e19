"""Where the fleet is full: who waits, who goes first, who is refused and with which Retry-After. Over real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from relevo.core.errors import Exhausted, RelevoError, Unavailable
from relevo.core.request import FinishReason
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.pb import messages_pb2
from services.router import admission
from services.router.admission import AdmissionLimits
from services.router.generation import EndEvent, TokensEvent
from services.router.http.keys import ApiKey, KeyRing
from tests.router.http.conftest import Edge, make_served, running
from tests.router.http.fakes import ACCEPT, HANG, FakeGeneration, Step
from tests.router.http.test_hang_up import posted, until


class Slots:
    """A fleet with room for some requests; each runs until it is let go."""

    def __init__(self, num_free: int) -> None:
        self.num_free = num_free
        self.failure: RelevoError | None = None
        self.started: list[int] = []  # prompts' first token, in the order in which workers accepted them
        self.num_tries = 0

    def __call__(self, request: messages_pb2.GenerationRequest) -> Iterator[Step]:
        self.num_tries += 1
        if self.failure is not None:
            yield self.failure
        if self.num_free <= 0:
            yield Exhausted("no room", 2.0)
        self.num_free -= 1
        self.started.append(request.prompt_token_ids[0])
        yield ACCEPT
        yield TokensEvent([300])
        yield EndEvent(FinishReason.LENGTH)


def keys_of(*keys: ApiKey) -> KeyRing:
    return KeyRing(keys)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


HOG, RARE = ApiKey("hog", digest("hog")), ApiKey("rare", digest("rare"), priority=-5)


class Line:
    """Requests that were sent one after the other, each known to be waiting before the next was sent."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.replies: dict[int, asyncio.Task[httpx.Response]] = {}

    async def send(self, number: int, key: str = "hog", priority: int = 0, timeout_ms: int | None = None) -> None:
        before = self.num_waiting
        body = {"prompt": [number], "max_tokens": 4, "priority": priority}
        headers = {"authorization": f"Bearer {key}"}
        if timeout_ms is not None:
            headers["x-request-timeout-ms"] = str(timeout_ms)
        task = asyncio.create_task(self.edge.http.post("/v1/completions", json=body, headers=headers))
        self.replies[number] = task
        await until(lambda: task.done() or self.num_waiting > before)

    @property
    def num_waiting(self) -> int:
        return int(self.edge.registry.get_sample_value("relevo_num_requests_waiting") or 0)

    async def statuses(self) -> dict[int, int]:
        return {number: (await task).status_code for number, task in self.replies.items()}


@pytest.fixture
def slots() -> Slots:
    return Slots(0)


@pytest.fixture
async def edge(tokenizer: Tokenizer, defaults: GenerationDefaults, slots: Slots) -> AsyncIterator[Edge]:
    limits = AdmissionLimits(max_queued=4, queue_seconds=20)
    async with running(make_served(tokenizer, defaults, keys=keys_of(HOG, RARE), admission=limits)) as edge:
        edge.dispatcher.script = slots
        yield edge


async def test_who_waits_is_served_in_order_when_there_is_room(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    for number in (5, 6, 7):
        await line.send(number)
    assert slots.started == []
    slots.num_free = 3
    assert await line.statuses() == {5: 200, 6: 200, 7: 200}
    assert slots.started == [5, 6, 7]
    assert line.num_waiting == 0


async def test_only_the_first_asks_the_workers_again(edge: Edge, slots: Slots) -> None:
    """Each asked once when it came and found room unknown; those behind it do not."""
    line = Line(edge)
    for number in (5, 6, 7, 8):
        await line.send(number)
    assert slots.num_tries < 8
    assert {generation.request.prompt_token_ids[0] for generation in edge.dispatcher.generations} == {5}
    slots.num_free = 4
    await line.statuses()


async def test_priorities_go_first_and_more_urgent_than_allowed_is_refused(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    await line.send(5)
    await line.send(6, priority=3)
    await line.send(7, "rare", priority=-5)
    slots.num_free = 3
    assert await line.statuses() == {5: 200, 6: 200, 7: 200}
    assert slots.started in ([7, 5, 6], [5, 7, 6])  # 5 may have been trying
    for key, priority in (("hog", -1), ("rare", -6)):
        body = {"prompt": [5], "priority": priority}
        reply = await edge.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "priority"
    reply = await edge.http.post("/v1/completions", json={"prompt": [5], "priority": 2**31})
    assert reply.status_code == 401


async def test_a_key_that_sends_much_does_not_hold_up_another(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    for number in (5, 6, 7):
        await line.send(number)
    await line.send(8, "rare")
    slots.num_free = 4
    await line.statuses()
    assert slots.started.index(8) <= 1


async def test_beyond_the_queue_is_a_429_with_a_time(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    for number in range(5, 9):
        await line.send(number)
    await line.send(9)
    reply = await line.replies.pop(9)
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "2", "what the worker said: the queue has not moved yet"
    assert "4 requests are waiting already" in reply.json()["error"]["message"]
    sending = asyncio.create_task(line.send(10, "rare"))
    reply = await line.replies.pop(8)
    assert reply.status_code == 429
    assert "others went first" in reply.json()["error"]["message"]
    slots.num_free = 4
    assert set((await line.statuses()).values()) == {200}
    await sending
    for reason in ("full", "displaced"):
        assert edge.registry.get_sample_value("relevo_requests_refused_total", {"reason": reason}) == 1


async def test_a_deadline_ends_the_wait(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    await line.send(5, timeout_ms=60_000)
    await line.send(6, timeout_ms=100)
    assert (await line.replies.pop(6)).status_code == 504
    slots.num_free = 1
    assert await line.statuses() == {5: 200}
    assert 0 < edge.dispatcher.requests[-1].timeout_ms < 60_000, "what is left of it"


async def test_patience_ends_the_wait(tokenizer: Tokenizer, defaults: GenerationDefaults, slots: Slots) -> None:
    limits = AdmissionLimits(queue_seconds=0.1)
    async with running(make_served(tokenizer, defaults, admission=limits)) as edge:
        edge.dispatcher.script = slots
        reply = await edge.http.post("/v1/completions", json={"prompt": [5]})
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "2"
    assert "no worker had room for 0.1 s" in reply.json()["error"]["message"]


async def test_who_leaves_loses_its_place(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    await line.send(5)
    async with posted(edge, {"prompt": [6]}, "Authorization: Bearer hog\r\n"):
        await until(lambda: line.num_waiting == 2)
    await until(lambda: line.num_waiting == 1)
    slots.num_free = 1
    assert await line.statuses() == {5: 200}
    assert slots.started == [5]


async def test_the_first_one_leaving_lets_the_next_try(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    async with posted(edge, {"prompt": [5]}, "Authorization: Bearer hog\r\n"):
        await until(lambda: line.num_waiting == 1)
        await line.send(6)
    slots.num_free = 1
    assert await line.statuses() == {6: 200}


async def test_a_fleet_that_goes_away_is_a_503_for_all_who_wait(edge: Edge, slots: Slots) -> None:
    line = Line(edge)
    for number in (5, 6, 7):
        await line.send(number)
    slots.failure = Unavailable("gone")
    assert await line.statuses() == {5: 503, 6: 503, 7: 503}
    assert line.num_waiting == 0


async def test_max_running_queues_without_asking_and_goes_on_when_one_ends(
    tokenizer: Tokenizer, defaults: GenerationDefaults
) -> None:
    limits = AdmissionLimits(max_running=2)
    gate = asyncio.Event()

    class Gated(FakeGeneration):
        async def __anext__(self) -> TokensEvent | EndEvent:
            self.has_begun.set()
            await gate.wait()
            return await super().__anext__()

    async with running(make_served(tokenizer, defaults, admission=limits)) as edge:
        edge.dispatcher.generation_class = Gated
        line = Line(edge)
        tasks = [asyncio.create_task(line.send(number)) for number in range(5, 10)]
        await until(lambda: line.num_waiting == 3)
        assert sum(each.has_begun.is_set() for each in edge.dispatcher.generations) == 2
        gate.set()
        await asyncio.wait(tasks)
        assert set((await line.statuses()).values()) == {200}
        observed = edge.registry.get_sample_value("relevo_request_queue_time_seconds_count")
        assert observed == 5


async def test_the_next_tries_as_soon_as_a_worker_has_the_first(edge: Edge, slots: Slots) -> None:
    """Not when it has its first token, which may be long in coming."""
    line = Line(edge)
    for number in (5, 6):
        await line.send(number)
    accepted: list[int] = []

    def slow(request: messages_pb2.GenerationRequest) -> Iterator[Step]:
        accepted.append(request.prompt_token_ids[0])
        yield ACCEPT
        yield HANG

    edge.dispatcher.script = slow
    await until(lambda: accepted == [5, 6])
    for task in line.replies.values():
        task.cancel()
    await asyncio.wait(line.replies.values())


async def test_a_worker_that_does_not_answer_the_first_holds_nobody_else_up(
    edge: Edge, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when it refuses in the end, the first queues again."""
    monkeypatch.setattr(admission, "_TRY_SECONDS", 0.05)
    line = Line(edge)
    for number in (5, 6):
        await line.send(number)
    num_asked = 0

    def silent_once(request: messages_pb2.GenerationRequest) -> Iterator[Step]:
        nonlocal num_asked
        if request.prompt_token_ids[0] == 5:
            num_asked += 1
            if num_asked == 1:
                yield 0.3
                yield Exhausted("no room after all")
        yield ACCEPT
        yield TokensEvent([300])
        yield EndEvent(FinishReason.LENGTH)

    edge.dispatcher.script = silent_once
    first_done, _ = await asyncio.wait(line.replies.values(), return_when=asyncio.FIRST_COMPLETED)
    assert first_done == {line.replies[6]}
    assert await line.statuses() == {5: 200, 6: 200}
    assert num_asked == 2
    assert line.num_waiting == 0
