"""What the live page shows of requests: each of them, and the second that has passed."""

from __future__ import annotations

import asyncio

import pytest

from services.router.fleet_state import describe_fleet
from services.router.history import SECONDS, History, describe_request, percentile
from tests.router.harness import collect, running, until

pytestmark = pytest.mark.timeout(20)


async def test_a_request_is_shown_as_it_goes_and_each_token_counts_in_one_sample() -> None:
    async with running("prefill-0", "decode-0") as harness:
        prefill, decode = harness["prefill-0"], harness["decode-0"]
        decode.behaviour.gates["token-3"] = gate = asyncio.Event()
        history = History()
        generation = harness.generate(40, max_tokens=6)
        task = asyncio.create_task(collect(generation))
        record = generation.record
        await until(lambda: record.num_output_tokens == 3)
        shown = describe_request(record)
        assert shown["state"] == "streaming"
        assert (shown["prefill"], shown["decode"]) == (prefill.address, decode.address)
        assert shown["ttft_ms"] > 0 and shown["total_ms"] is None

        history.sample(harness.dispatcher.records(), running=1, queued=0)
        first = history.samples[-1]
        assert round(first.output_tokens_per_second * first.seconds) == 3
        assert round(first.prompt_tokens_per_second * first.seconds) == 40
        assert first.ttft_p50 == pytest.approx(shown["ttft_ms"], abs=0.02)
        assert first.tpot_p50 == pytest.approx(shown["tpot_ms"], abs=0.02)
        assert history.flow(prefill.address)["prompt_tokens_per_second"] > 0
        assert history.flow(prefill.address)["output_tokens_per_second"] == 0
        assert history.flow(decode.address)["output_tokens_per_second"] > 0

        gate.set()
        await task
        history.sample(harness.dispatcher.records(), running=0, queued=0)
        second = history.samples[-1]
        assert round(second.output_tokens_per_second * second.seconds) == 3
        assert second.prompt_tokens_per_second == 0
        assert second.ttft_p50 == first.ttft_p50, "it is within the window still"
        history.sample(harness.dispatcher.records(), running=0, queued=0)
        assert history.samples[-1].output_tokens_per_second == 0
        assert history.samples[-1].tpot_p50 is None
        shown = describe_request(record)
        assert (shown["state"], shown["outcome"], shown["num_output_tokens"]) == ("ended", "length", 6)
        assert shown["total_ms"] > shown["ttft_ms"]


async def test_what_became_of_a_request_that_did_not_end_by_itself() -> None:
    async with running("decode-0") as harness:
        harness["decode-0"].behaviour.gates["token-2"] = asyncio.Event()
        left = harness.generate(4)
        await anext(left)
        await left.aclose()
        assert left.record.outcome == "closed"
        late = harness.generate(4, timeout_ms=50)
        with pytest.raises(Exception, match="50 ms"):
            await collect(late)
        await late.aclose()
        assert late.record.outcome == "not done within 50 ms"


async def test_history_is_bounded_and_workers_tell_their_state() -> None:
    history = History()
    for _ in range(SECONDS + 5):
        history.sample([], running=0, queued=0)
    assert len(history.samples) == SECONDS
    async with running("prefill-0", "decode-0") as harness:
        harness["decode-0"].load.draining = True
        harness["decode-0"].tell_load()
        await until(lambda: harness.connection("decode-0").load.report.draining)
        found = await describe_fleet(harness.fleet)
        states = {worker["id"]: (worker["role"], worker["state"]) for worker in found["workers"]}
        assert states == {"prefill-0": ("prefill", "ready"), "decode-0": ("decode", "draining")}
        (agent,) = found["agents"]
        assert (agent["state"], agent["slots"]) == ("lost", None), "nobody listens there"


def test_percentiles_by_nearest_rank() -> None:
    assert percentile([], 0.5) is None
    assert percentile([7.0], 0.95) == 7
    assert [percentile(list(range(100)), q) for q in (0.5, 0.95)] == [50, 95]
