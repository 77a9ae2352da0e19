"""Blocks travel while the next ones are computed: little is left to come when the last one is."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from relevo.engine.step_result import StepResult
from services.worker.transfers import Transfers
from tests.e2e.test_parity import GREEDY
from tests.support.agents import running_agent
from tests.support.parity import BLOCK_SIZE
from tests.support.real_router import router_over
from tests.support.real_workers import RealWorker, real_worker
from tests.support.tiny_models import TinyModels

CHUNK_TOKENS = 16
NUM_CHUNKS = 16
STEP_SECONDS = 0.03  # as a small model's chunk takes on a fast machine; a tiny model's takes none
NUM_TRIES = 3  # other tests run beside this one


def slow_down(worker: RealWorker) -> None:
    real_step = worker.engine.step

    def step() -> StepResult:
        started = time.monotonic()
        result = real_step()
        if result.num_scheduled_tokens:
            time.sleep(max(0.0, started + STEP_SECONDS - time.monotonic()))
        return result

    worker.engine.step = step  # type: ignore[method-assign]


def figure(transfers: Transfers, name: str) -> float:
    samples = (sample for metric in transfers.metrics for family in metric.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name)


@pytest.mark.parametrize("num_agents", [1, 2], ids=["one-host", "tcp"])
async def test_tail_of_sixteen_chunks_is_at_most_an_eighth_of_the_hand_over(
    tiny_models: TinyModels, tmp_path: Path, num_agents: int
) -> None:
    path = tiny_models.path("llama")
    async with AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(running_agent(tmp_path, num_blocks=2000)) for _ in range(num_agents)]
        settings = {"max_num_batched_tokens": CHUNK_TOKENS, "offer_share": 0.0}
        prefill = await stack.enter_async_context(real_worker(path, "prefill", agents[0], **settings))
        decode = await stack.enter_async_context(real_worker(path, "decode", agents[-1], **settings))
        slow_down(prefill)
        router = await stack.enter_async_context(router_over([decode], [prefill], split=True))
        for number in range(NUM_TRIES + 1):
            prompt = [3 + number] * (NUM_CHUNKS * CHUNK_TOKENS + 1)
            before = [figure(decode.worker.transfers, name) for name in FIGURES]
            answer = await router.generate(prompt, GREEDY)
            assert answer.was_split
            now = [figure(decode.worker.transfers, name) for name in FIGURES]
            num_blocks, ratio, count, tail_seconds = (after - had for after, had in zip(now, before, strict=True))
            assert (num_blocks, count) == (NUM_CHUNKS * CHUNK_TOKENS / BLOCK_SIZE, 1)
            if number == 0:
                continue  # the link to the other agent is made with the first
            if ratio >= 7 / 8 and tail_seconds <= NUM_CHUNKS * STEP_SECONDS / 8:
                return
        pytest.fail(f"{1 - ratio:.0%} of the blocks came after the first token, the last of them {tail_seconds:.3f} s")


FIGURES = (
    "relevo_handover_blocks_total",
    "relevo_handover_overlap_ratio_sum",
    "relevo_handover_overlap_ratio_count",
    "relevo_handover_tail_seconds_sum",
)
