"""Workers that are connected and get nothing all the same: they drain, are stuck, or fail again and again."""

from __future__ import annotations

import asyncio

import pytest

from relevo.core.errors import Unavailable
from services.router.request_stream import DECODE, PREFILL
from tests.router.harness import Harness, collect, make_request, running, until
from tests.support.fake_workers import answer

pytestmark = pytest.mark.timeout(20)


async def serve(harness: Harness, first: int = 1) -> None:
    tokens, _ = await collect(harness.generate(8, first=first))
    assert tokens == answer(make_request(8, first=first))


def say(harness: Harness, worker_id: str, **load: float) -> None:
    worker = harness[worker_id]
    for name, value in load.items():
        setattr(worker.load, name, value)
    worker.tell_load()


async def until_passed_over(harness: Harness, **conditions: str) -> None:
    """until_passed_over(harness, decode_0="stuck")"""
    expected = {harness[name.replace("_", "-")].address: condition for name, condition in conditions.items()}
    await until(lambda: harness.fleet.passed_over() == expected)


async def test_draining_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with running("decode-0", "decode-1") as harness:
        gate = harness["decode-0"].behaviour.gates["token-2"] = asyncio.Event()
        harness["decode-1"].behaviour.gates["token-2"] = gate
        begun = [asyncio.create_task(serve(harness, first)) for first in range(1, 9)]
        await harness.journal.wait("decode-0", "submit", 2)
        await until(lambda: len(harness.journal.names()) == 8)
        say(harness, "decode-0", draining=True)
        await until_passed_over(harness, decode_0="draining")
        num_before = len(harness.journal.all("decode-0", "submit"))
        later = [asyncio.create_task(serve(harness, first)) for first in range(11, 19)]
        await until(lambda: len(harness.journal.names()) == 16)
        gate.set()
        await asyncio.gather(*begun, *later)
        assert len(harness.journal.all("decode-0", "submit")) == num_before
        assert not harness.journal.all("decode-0", "stream_end")
        await harness["decode-0"].stop()
        await harness.until_connected("decode-0", False)
        assert harness.connection("decode-0").breaker.is_closed  # it did not fail
        assert not harness.connection("decode-0").breaker._failures


async def test_last_worker_that_drains_says_why_nobody_serves() -> None:
    async with running("decode-0") as harness:
        say(harness, "decode-0", draining=True)
        await until_passed_over(harness, decode_0="draining")
        assert not harness.dispatcher.is_ready()
        with pytest.raises(Unavailable, match="is draining"):
            await serve(harness)


async def test_requests_of_a_stuck_worker_go_on_elsewhere() -> None:
    """It answers, and its engine hangs."""
    async with running("decode-0", "decode-1") as harness:
        stuck = harness["decode-0"]
        stuck.behaviour.gates["token-3"] = asyncio.Event()
        requests = [asyncio.create_task(serve(harness, first)) for first in range(1, 9)]
        await harness.journal.wait("decode-0", "submit")
        say(harness, "decode-0", step_age_seconds=31.0)
        await asyncio.gather(*requests)
        await harness.journal.wait("decode-0", "stream_end")
        await harness.until_connected("decode-0")  # to hear when it goes on
        await until_passed_over(harness, decode_0="stuck")
        num_before = len(harness.journal.all("decode-0", "submit"))
        await asyncio.gather(*(serve(harness, first) for first in range(11, 15)))
        assert len(harness.journal.all("decode-0", "submit")) == num_before
        stuck.behaviour.gates.clear()
        say(harness, "decode-0", step_age_seconds=0.1)
        await until_passed_over(harness)


async def test_slow_worker_is_not_stuck() -> None:
    """A step of this model takes twelve seconds there: half a minute is nothing to worry about."""
    async with running("decode-0") as harness:
        say(harness, "decode-0", step_age_seconds=40.0, longest_step_seconds=12.0)
        await until(lambda: harness.connection("decode-0").load.report.step_age_seconds == 40.0)
        assert not harness.fleet.passed_over()
        say(harness, "decode-0", step_age_seconds=49.0)
        await until_passed_over(harness, decode_0="stuck")


async def test_worker_that_refuses_again_and_again_is_kept_from_requests_until_a_trial_works() -> None:
    async with running("decode-0", "decode-1") as harness:
        harness["decode-0"].behaviour.refuse = Unavailable("cannot")
        harness["decode-1"].behaviour.gates["token-1"] = gate = asyncio.Event()
        held = []
        for first in range(1, 13):  # one after another; each goes to the idle one first
            held.append(asyncio.create_task(serve(harness, first)))
            await harness.journal.wait("decode-1", "submit", first)
        await until_passed_over(harness, decode_0="tripped")
        assert len(harness.journal.all("decode-0", "submit")) == 5
        gate.set()
        await asyncio.gather(*held)
        assert len(harness.journal.all("decode-0", "submit")) == 5
        harness["decode-0"].behaviour.refuse = None
        harness.connection("decode-0").breaker._half_open_at = 0.0  # the time is over
        await until_passed_over(harness)
        harness["decode-1"].behaviour.gates["token-1"] = gate = asyncio.Event()
        first, held = 20, []
        while len(harness.journal.all("decode-0", "submit")) < 7:  # the trial, and one after it
            first += 1
            num_before = len(harness.journal.names())
            held.append(asyncio.create_task(serve(harness, first)))
            await until(lambda num_before=num_before: len(harness.journal.names()) > num_before)  # type: ignore[misc]
        gate.set()
        await asyncio.gather(*held)
        assert harness.connection("decode-0").breaker.is_closed


async def test_breaker_of_the_only_decode_worker_does_not_keep_requests_from_it() -> None:
    async with running("decode-0") as harness:
        harness["decode-0"].behaviour.refuse = Unavailable("cannot")
        for first in range(1, 7):
            with pytest.raises(Unavailable, match="cannot"):
                await serve(harness, first)
        assert not harness.connection("decode-0").breaker.is_closed
        assert [worker.address for worker in harness.fleet.candidates(DECODE)] == [harness["decode-0"].address]
        harness["decode-0"].behaviour.refuse = None
        await serve(harness, 7)
        assert harness.connection("decode-0").breaker.is_closed


async def test_prefill_workers_that_fail_are_done_without() -> None:
    async with running("prefill-0", "decode-0") as harness:
        harness["prefill-0"].behaviour.refuse = Unavailable("cannot")
        for first in range(1, 8):
            tokens, _ = await collect(harness.generate(40, first=first))
            assert tokens == answer(make_request(40, first=first))
        assert len(harness.journal.all("prefill-0", "submit")) == 5
        assert not harness.fleet.candidates(PREFILL)
        generation = harness.generate(40, first=8)
        await collect(generation)
        explained = generation.explain()
        assert explained is not None
        assert explained["routes"][0]["passed_over"] == {harness["prefill-0"].address: "tripped"}


async def test_connections_that_break_open_it() -> None:
    async with running("decode-0", "decode-1") as harness:
        for _ in range(3):
            await harness["decode-0"].stop()
            await harness.until_connected("decode-0", False)
            await harness["decode-0"].start()
            await harness.until_connected("decode-0")
        assert harness.fleet.passed_over() == {harness["decode-0"].address: "tripped"}
