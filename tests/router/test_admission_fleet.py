"""The gate before the real dispatcher: workers that refuse over gRPC, and accept later."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from relevo.core.errors import DeadlineExceeded, Exhausted, Unavailable
from services.router.admission import Admission, AdmissionLimits
from services.router.admitted import AdmittedGeneration, Standing
from services.router.generation import EndEvent
from tests.router.harness import Harness, make_request, running, until
from tests.support.fake_workers import full


async def collect(generation: AdmittedGeneration) -> list[int]:
    tokens: list[int] = []
    while not isinstance(event := await anext(generation), EndEvent):
        tokens += event.token_ids
    await generation.aclose()
    return tokens


def make_admission(harness: Harness, *, max_queued: int = 256, absent_seconds: float = 0.0) -> Admission:
    limits = AdmissionLimits(queue_seconds=30, max_queued=max_queued, absent_seconds=absent_seconds)
    return Admission(harness.dispatcher, limits, CollectorRegistry())


@pytest.mark.parametrize("num_tokens", [4, 40])
async def test_who_was_refused_is_served_when_workers_have_room(num_tokens: int) -> None:
    """Alone at decode, and split."""
    async with running("prefill-0", "decode-0", "decode-1") as harness:
        admission = make_admission(harness)
        requests = [make_request(num_tokens, first=first) for first in (1, 100, 200)]
        expected = [await collect(admission.generate(request, Standing())) for request in requests]
        assert (admission.num_running, admission.num_queued) == (0, 0)
        for worker_id in ("decode-0", "decode-1"):
            harness[worker_id].behaviour.refuse = full()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for request in requests:
                tasks.append(group.create_task(collect(admission.generate(request, Standing()))))
                await until(lambda: admission.num_queued == len(tasks))
            harness["decode-1"].behaviour.refuse = None
        assert [task.result() for task in tasks] == expected
        assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_the_next_asks_as_soon_as_a_worker_has_accepted_the_first() -> None:
    """Long before its first token."""
    async with running("decode-0") as harness:
        admission = make_admission(harness)
        behaviour = harness["decode-0"].behaviour
        behaviour.refuse = full()
        behaviour.gates["tokens"] = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for first in (1, 100, 200):
                group.create_task(collect(admission.generate(make_request(4, first=first), Standing())))
            await until(lambda: admission.num_queued == 3)
            behaviour.refuse = None
            await until(lambda: admission.num_running == 3)
            assert not admission.is_full
            behaviour.gates["tokens"].set()
        assert admission.num_running == 0


async def test_a_deadline_passes_in_the_queue() -> None:
    async with running("decode-0") as harness:
        admission = make_admission(harness)
        harness["decode-0"].behaviour.refuse = full()
        with pytest.raises(DeadlineExceeded):
            await collect(admission.generate(make_request(4, timeout_ms=150), Standing()))
        assert (admission.num_running, admission.num_queued) == (0, 0)


@pytest.mark.parametrize("is_accepted", [False, True])
async def test_who_lost_the_only_decode_worker_waits_for_it_to_come_back(is_accepted: bool) -> None:
    """One that a worker had taken on, and those that came when it was gone; the text is the same."""
    async with running("decode-0") as harness:
        admission = make_admission(harness, absent_seconds=20)
        worker = harness["decode-0"]
        requests = [make_request(4, first=first) for first in (1, 100)]
        expected = [await collect(admission.generate(request, Standing())) for request in requests]
        async with asyncio.TaskGroup() as group:
            tasks = []
            if is_accepted:
                worker.behaviour.gates["tokens"] = asyncio.Event()
                tasks.append(group.create_task(collect(admission.generate(requests[0], Standing()))))
                await harness.journal.wait("decode-0", "submit", 3)
                await until(lambda: admission.num_running == 1)
            await worker.stop()
            await harness.until_connected("decode-0", connected=False)
            while len(tasks) < 2:
                tasks.append(group.create_task(collect(admission.generate(requests[len(tasks)], Standing()))))
            await until(lambda: admission.num_queued == 2)
            worker.behaviour.gates.clear()
            await worker.start()
        assert [task.result() for task in tasks] == expected
        assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_without_a_decode_worker_the_wait_is_bounded_and_so_is_the_queue() -> None:
    async with running("decode-0") as harness:
        admission = make_admission(harness, max_queued=2, absent_seconds=0.4)
        await harness["decode-0"].stop()
        await harness.until_connected("decode-0", connected=False)
        began_at = asyncio.get_running_loop().time()
        generations = [admission.generate(make_request(4, first=first), Standing()) for first in (1, 100, 200)]
        results = await asyncio.gather(*map(collect, generations), return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable, Exhausted]
        assert 0.4 <= asyncio.get_running_loop().time() - began_at < 2
        assert (admission.num_running, admission.num_queued) == (0, 0)
        with pytest.raises(DeadlineExceeded):
            await collect(admission.generate(make_request(4, timeout_ms=100), Standing()))
