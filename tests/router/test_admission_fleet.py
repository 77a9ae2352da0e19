"""The gate before the real dispatcher: workers that refuse over gRPC, and accept later."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from relevo.core.errors import DeadlineExceeded
from services.router.admission import Admission, AdmissionLimits, AdmittedGeneration, Standing
from services.router.generation import EndEvent
from tests.router.harness import Harness, make_request, running, until
from tests.support.fake_workers import full


async def collect(generation: AdmittedGeneration) -> list[int]:
    tokens: list[int] = []
    while not isinstance(event := await anext(generation), EndEvent):
        tokens += event.token_ids
    await generation.aclose()
    return tokens


def make_admission(harness: Harness) -> Admission:
    return Admission(harness.dispatcher, AdmissionLimits(queue_seconds=30), CollectorRegistry())


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
