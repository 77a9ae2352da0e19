from __future__ import annotations

import math

import pytest

from relevo.core.schedule import SchedulerOutput
from relevo.core.scheduler import Scheduler
from relevo.engine.rates import STRETCH_MARGIN, EngineRates
from tests.support.builders import make_request, make_scheduler


def decoding(num_chats: int) -> Scheduler:
    scheduler = make_scheduler(num_blocks=400, block_size=16, max_num_seqs=8, max_num_batched_tokens=512)
    for i in range(num_chats):
        scheduler.add(make_request(f"chat{i}", [i], max_tokens=500, block_size=16))
    update(scheduler, scheduler.schedule())
    return scheduler


def update(scheduler: Scheduler, output: SchedulerOutput) -> int:
    sampled = {entry.request.request_id: [7] for entry in output.scheduled if entry.samples}
    scheduler.update(output, sampled)
    return len(sampled)


def step(scheduler: Scheduler, rates: EngineRates, seconds: float) -> SchedulerOutput:
    output = scheduler.schedule()
    rates.measure(output, sum(entry.samples for entry in output.scheduled), seconds)
    update(scheduler, output)
    return output


def test_there_is_no_limit_before_plain_steps_and_prompts_were_measured_or_without_a_stretch() -> None:
    for stretch in (2.0, math.inf):
        scheduler, rates = decoding(4), EngineRates(16, stretch)
        scheduler.add(make_request("long", range(600), max_tokens=1, block_size=16))
        step(scheduler, rates, 0.5)
        assert rates.prompt_limit is None  # what a plain step takes was not known
        step(scheduler, rates, 0.1)
        for _ in range(3):
            step(scheduler, rates, 0.01)
        assert rates.prompt_limit is None
        scheduler.add(make_request("other", range(1000, 1100), max_tokens=1, block_size=16))
        step(scheduler, rates, 0.11)
        if stretch == math.inf:
            assert rates.prompt_limit is None
        else:
            assert rates.prompt_limit is not None
            assert rates.prompt_limit.seconds == pytest.approx(STRETCH_MARGIN * 0.01)
            assert rates.prompt_limit.costs.seconds(0, 100) == pytest.approx(0.1, rel=0.02)


def test_a_step_of_fewer_decodes_is_compared_with_a_plain_one_of_so_many() -> None:
    """Plain steps take 1 ms and 1 ms a request: of 13 ms, with 2 chats and 50 tokens of a prompt, that took 10."""
    rates = EngineRates(16, 2.0)
    for _ in range(20):
        for num_chats in (2, 4, 6):
            step(decoding(num_chats), rates, 0.001 + 0.001 * num_chats)
    scheduler = decoding(2)
    scheduler.add(make_request("long", range(50), max_tokens=1, block_size=16))
    assert step(scheduler, rates, 0.013).num_scheduled_tokens == 52
    assert rates.prompt_costs.seconds(0, 50) == pytest.approx(0.010, rel=0.02)
