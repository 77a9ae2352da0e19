"""Why requests went where they went, and whether what was predicted came true."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from relevo.core.block_hash import hash_blocks, root_hash
from relevo.core.placement import CostModel, Placement, WorkerView, place
from services.pb.messages_pb2 import GenerationRequest
from services.pb.worker_pb2 import WorkerInfo
from services.router.prompt import LONG_PROMPT_TOKENS, Prompt
from services.router.route_log import MAX_RECORDS, MIN_OBSERVATIONS, Predictions, Route, RouteLog, RouteRecord
from tests.router.harness import collect, make_request, names_of, running, until
from tests.support.fake_workers import full

pytestmark = pytest.mark.timeout(20)


def placement() -> Placement:
    view = WorkerView(
        address="d:1",
        fingerprint=b"f",
        block_size=16,
        block_bytes=1,
        has_agent=False,
        max_num_seqs=4,
        num_free_blocks=9,
    )
    placed = place(100, [], [view], costs=CostModel())
    assert placed is not None
    return placed


async def test_every_candidate_is_explained_with_its_terms_and_what_came_of_it() -> None:
    async with running("prefill-0", "decode-0", "decode-1") as harness:
        request = make_request(40)
        harness["decode-0"].store(names_of(request)[:6])
        await harness.until_known("decode-0", 6)
        harness["decode-0"].behaviour.num_cached_blocks = 6
        harness["decode-0"].load.num_free_blocks = 4096
        await collect(harness.dispatcher.generate(request))
        (record,) = harness.dispatcher.explain("request-1")
        (route,) = record["routes"]
        places = {(candidate["decode"], candidate["prefill"]) for candidate in route["candidates"]}
        prefill = harness["prefill-0"].address
        assert places == {
            (harness[decode].address, with_prefill)
            for decode in ("decode-0", "decode-1")
            for with_prefill in (None, prefill)
        }
        best = route["candidates"][0]
        assert best["decode"] == harness["decode-0"].address
        terms = ("wait_ms", "uncached_ms", "transfer_ms", "handover_ms", "admit_ms")
        assert best["ttft_ms"] == pytest.approx(sum(best[term] for term in terms), abs=0.01)
        assert route["predicted_cached_tokens"] == route["actual_cached_tokens"] == 24
        assert route["actual_ttft_ms"] > 0
        assert route["omitted"] == 0


async def test_refusals_stay_in_the_record() -> None:
    async with running("decode-0", "decode-1") as harness:
        for worker_id in ("decode-0", "decode-1"):
            harness[worker_id].behaviour.refuse = full()
        generation = harness.generate(4)
        with pytest.raises(Exception, match="no worker has room"):
            await collect(generation)
        (record,) = harness.dispatcher.explain("request-1")
        assert [route["refused"] for route in record["routes"]] == ["no blocks left"] * 2
        assert {route["candidates"][0]["decode"] for route in record["routes"]} == {
            harness["decode-0"].address,
            harness["decode-1"].address,
        }


async def test_prompts_that_share_a_prefix_stick_before_any_block_is_known() -> None:
    """The first one's blocks are expected where it was sent, though no event has told of them, and it pays to wait."""
    async with running("decode-0", "decode-1", "decode-2", "decode-3") as harness:
        gate = asyncio.Event()
        for worker in harness.workers.values():
            worker.behaviour.gates["tokens"] = gate
        generations, tasks = [], []
        for number in range(6):
            request = make_request(2000, max_tokens=1)
            request.request_id = f"request-{number}"
            request.prompt_token_ids.append(number)
            generations.append(harness.dispatcher.generate(request))
            tasks.append(asyncio.create_task(collect(generations[-1])))
            await until(lambda: generations[-1].placement is not None)
        placements = [generation.record.routes[0] for generation in generations]
        assert len({route.placement.best.decode for route in placements}) == 1
        assert [route.predicted_cached_tokens for route in placements] == [0] + [2000] * 5
        gate.set()
        await asyncio.gather(*tasks)


async def test_prompts_on_their_way_to_prefill_count_there_before_decode_has_accepted() -> None:
    async with running("prefill-0", "prefill-1", "decode-0") as harness:
        gate = harness["decode-0"].behaviour.gates["accept"] = asyncio.Event()
        generations = [harness.generate(400, first=100 * number + 1) for number in range(6)]
        tasks = [asyncio.create_task(collect(generation)) for generation in generations]
        await until(lambda: all(generation.placement is not None for generation in generations))
        chosen = [generation.record.routes[0].placement.best.prefill for generation in generations]
        for worker_id in ("prefill-0", "prefill-1"):
            assert 1 <= chosen.count(harness[worker_id].address) <= 4  # the others go direct
        gate.set()
        await asyncio.gather(*tasks)
        for worker_id in ("prefill-0", "prefill-1", "decode-0"):
            load = harness.connection(worker_id).load
            assert (load.num_waiting_tokens(0.0), load._prompts) == (0, {})


async def test_long_prompts_are_hashed_in_a_thread_to_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noting(*args: Any) -> list[bytes]:
        threads.append(threading.get_ident())
        return hash_blocks(*args)

    monkeypatch.setattr("services.router.prompt.hash_blocks", noting)
    info = WorkerInfo(layout_fingerprint=bytes(32), block_size=16)
    for num_tokens, off_the_loop in ((100, False), (16 * 1500 + 7, True)):
        assert (num_tokens >= LONG_PROMPT_TOKENS) == off_the_loop
        tokens = list(range(num_tokens))
        prompt = Prompt(GenerationRequest(prompt_token_ids=tokens, cache_salt="salt"))
        threads.clear()
        await prompt.hash_for([info])
        assert prompt.hashes(info) == hash_blocks(root_hash(bytes(32), cache_salt="salt"), tokens, 16)
        assert all((thread != threading.get_ident()) == off_the_loop for thread in threads)
        assert threads


def test_log_keeps_the_last_requests_and_finds_choices_by_their_answers_name() -> None:
    log = RouteLog()
    for number in range(MAX_RECORDS + 5):
        log.add(RouteRecord(f"answer{number}-0", 10))
    log.add(RouteRecord("answer7-1", 10))
    assert [record.request_id for record in log.find("answer7")] == ["answer7-0", "answer7-1"]
    assert [record.request_id for record in log.find("answer7-1")] == ["answer7-1"]
    assert log.find("answer4") == log.find("answer") == []


def routes(predicted_ms: float, actual_ms: float, num: int, predicted: int = 0, actual: int = 0) -> list[Route]:
    """predicted, actual: cached tokens."""
    return [Route(placement(), predicted_ms, predicted, actual_ms, actual) for _ in range(num)]


@pytest.mark.parametrize(
    ("predicted_ms", "actual_ms", "warns"),
    [(100, 150, False), (1000, 3000, True), (1000, 400, True), (1, 30, False)],
)
def test_ttft_drift_is_said_once(
    predicted_ms: float, actual_ms: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not below a factor of two, not for a few milliseconds, not after a few requests."""
    predictions = Predictions(CollectorRegistry())
    with caplog.at_level(logging.WARNING):
        for route in routes(predicted_ms, actual_ms, MIN_OBSERVATIONS - 1):
            predictions.observe_ttft(route)
        assert not caplog.records
        for route in routes(predicted_ms, actual_ms, 50):
            predictions.observe_ttft(route)
    assert [record.levelname for record in caplog.records] == (["WARNING"] if warns else [])


@pytest.mark.parametrize(("actual", "warns"), [(960, False), (500, True)])
def test_drift_of_cached_tokens_is_said_once(actual: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    predictions = Predictions(registry)
    for route in routes(1, 1, 60, predicted=1000, actual=actual):
        predictions.observe_cached(route, num_prompt_tokens=1200)
    assert len(caplog.records) == warns
    assert registry.get_sample_value("relevo_router_cached_tokens_error_sum") == 60 * (1000 - actual)
    assert registry.get_sample_value("relevo_router_actual_cached_tokens_count") == 60
