"""The speculator in virtual time: drafts where they pay, and next to nothing lost where they don't."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest, SchedulerOutput
from relevo.engine.sampler import SampledToken
from relevo.engine.spec_decode.planning import best_plan
from relevo.engine.spec_decode.row_costs import RowCosts
from relevo.engine.spec_decode.speculator import Speculator
from tests.support.builders import make_request

RIGHT, WRONG = 5, 6


class Guesser:
    """Always the token that will be RIGHT, as often as the acceptance rate says."""

    def __init__(self, lag: int = 0) -> None:
        self.num_proposed_steps = 0
        self._lag = lag

    def propose(self, entries: Sequence[ScheduledRequest]) -> list[list[int]]:
        return [[RIGHT] * entry.num_draft_slots for entry in entries]

    def lag(self, request: Request) -> int:
        return self._lag

    def verified(self, entry: ScheduledRequest, num_accepted: int) -> None: ...
    def ended(self, request: Request) -> None: ...
    def forget(self, request_id: str) -> None: ...


def run(
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_requests: int,
    rate: float,
    verify: dict[int, float],
    propose: dict[int, float] | None,
    true_verify: dict[int, float] | None = None,
    num_steps: int = 3000,
    lag: int = 0,
    unseen: float = 0.0,
    answer_tokens: int | None = None,
    num_barren_steps: int = 0,
) -> float:
    """Tokens a second by those of plain decoding. true_verify: what passes take, if not what was measured at start.

    unseen: seconds of a step with drafts that are neither in the proposer nor in the pass
    answer_tokens: requests end after so many steps, all together, and others come; None: they go on
    num_barren_steps: of these, in which no draft is accepted
    """
    numbers = random.Random(1)
    truth = RowCosts(true_verify or verify)
    speculator = Speculator(Guesser(lag), 5, RowCosts(verify), RowCosts(propose) if propose is not None else None)
    drafting = RowCosts(propose) if propose is not None else None
    requests = [make_request(f"r{index}", [1], max_tokens=10**9) for index in range(num_requests)]
    for request in requests:
        request.num_computed_tokens = 0
    clock = [0.0]
    monkeypatch.setattr("relevo.engine.spec_decode.speculator.time.perf_counter", lambda: clock[0])
    num_tokens = 0
    for at in range(num_steps):
        if answer_tokens is not None and at % answer_tokens == answer_tokens - 1:
            for request in requests:
                speculator.ended(request)
                speculator.forget(request.request_id)
            requests = [make_request(f"r{index} at {at}", [1], max_tokens=10**9) for index in range(num_requests)]
        wanted = speculator.plan(requests)
        entries = [ScheduledRequest(r, 1, num_draft_slots=wanted.get(r.request_id, 0)) for r in requests]
        output = speculator.propose(SchedulerOutput(scheduled=entries))
        if drafting is not None:
            for depth in range(5):
                if count := sum(entry.num_draft_slots > depth for entry in entries):
                    clock[0] += drafting.seconds(count)
        sampled = {}
        for entry in output.scheduled:
            accepted = 0
            its_rate = 0.0 if answer_tokens is not None and at % answer_tokens < num_barren_steps else rate
            while accepted < len(entry.draft_token_ids) and numbers.random() < its_rate:
                accepted += 1
            sampled[entry.request.request_id] = [SampledToken(RIGHT, None)] * (accepted + 1)
            num_tokens += accepted + 1
        seconds = truth.seconds(sum(entry.num_scheduled_tokens for entry in output.scheduled))
        clock[0] += seconds
        speculator.learn(output.scheduled, sampled, seconds)
        if any(entry.draft_token_ids for entry in output.scheduled):
            clock[0] += unseen
    return num_tokens / clock[0] * truth.seconds(num_requests) / num_requests


MEMORY_BOUND = {1: 0.025, 8: 0.030, 16: 0.035, 32: 0.048, 64: 0.085}
ARITHMETIC_BOUND = {1: 0.01, 2: 0.02, 64: 0.64}
CHEAP = {1: 0.002, 64: 0.006}
DEAR = {1: 0.02, 64: 0.08}


@pytest.mark.parametrize("num_requests", [1, 8, 32])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("verify", [MEMORY_BOUND, ARITHMETIC_BOUND], ids=["memory", "arithmetic"])
@pytest.mark.parametrize("propose", [None, CHEAP, DEAR], ids=["free", "cheap", "dear"])
def test_never_slower_than_plain(
    monkeypatch: pytest.MonkeyPatch,
    num_requests: int,
    rate: float,
    verify: dict[int, float],
    propose: dict[int, float] | None,
) -> None:
    assert run(monkeypatch, num_requests=num_requests, rate=rate, verify=verify, propose=propose) >= 0.97


@pytest.mark.parametrize(("num_requests", "least"), [(1, 2.2), (8, 1.45)])
def test_pays_where_it_can(monkeypatch: pytest.MonkeyPatch, num_requests: int, least: float) -> None:
    assert run(monkeypatch, num_requests=num_requests, rate=0.8, verify=MEMORY_BOUND, propose=CHEAP) >= least


def test_what_no_model_of_costs_sees_stops_drafts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"num_requests": 8, "rate": 0.6, "verify": MEMORY_BOUND, "propose": None}
    assert run(monkeypatch, **arguments) >= 1.2  # type: ignore[arg-type]
    assert run(monkeypatch, unseen=0.05, **arguments) >= 0.97  # type: ignore[arg-type]


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("propose", [None, {1: 0.0004, 8: 0.0006}], ids=["free", "model"])
@pytest.mark.parametrize("unseen", [0.0, 0.0002])
def test_short_answers_of_a_quick_model_lose_next_to_nothing_by_drafts_that_never_agree(
    monkeypatch: pytest.MonkeyPatch, num_requests: int, propose: dict[int, float] | None, unseen: float
) -> None:
    """Passes of the demo pair, in seconds; the first hundred steps with drafts, which it learns from, included."""
    verify = {1: 0.00062, 5: 0.00066, 8: 0.00105, 24: 0.0016, 48: 0.0025}
    speed = run(
        monkeypatch,
        num_requests=num_requests,
        rate=0.0,
        verify=verify,
        propose=propose,
        unseen=unseen,
        answer_tokens=192,
        num_steps=3000,
    )
    assert speed >= 0.98


def test_text_that_begins_to_repeat_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer's first 60 steps hold nothing that could be guessed; all 132 others would bring 2.4 times as much."""
    verify = {1: 0.00062, 5: 0.00066, 8: 0.00105, 24: 0.0016, 48: 0.0025}
    arguments = {"rate": 0.7, "verify": verify, "propose": None, "answer_tokens": 192, "num_barren_steps": 60}
    assert run(monkeypatch, num_requests=1, **arguments) >= 1.6  # type: ignore[arg-type]


def test_wrong_costs_are_unlearned(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start rows seemed to cost a third of what they do."""
    hopeful = {1: 0.01, 8: 0.03, 64: 0.21}
    arguments = {"num_requests": 8, "rate": 0.6, "propose": None, "true_verify": ARITHMETIC_BOUND}
    assert run(monkeypatch, verify=hopeful, **arguments) >= 0.95  # type: ignore[arg-type]


def test_a_plan_gives_more_drafts_to_whom_they_are_accepted_from() -> None:
    verify, nothing = RowCosts(MEMORY_BOUND), lambda requests: 0.0
    plan = best_plan([0.9, 0.2, 0.9, 0.0], [5, 5, 2, 5], 0, verify.seconds, nothing)
    assert plan.num_drafts[0] == 5 and plan.num_drafts[2] == 2 and plan.num_drafts[3] == 0
    assert plan.num_drafts[1] <= 1 and plan.gain > 1.5


def test_a_request_is_asked_how_many_it_may_have() -> None:
    speculator = Speculator(Guesser(), 5, RowCosts(MEMORY_BOUND), adaptive=False)
    requests = [make_request(name, [1], max_tokens=100) for name in ("free", "off", "two")]
    for request, limit in zip(requests, (None, 0, 2), strict=True):
        request.sampling = replace(request.sampling, num_speculative_tokens=limit)
    assert speculator.plan(requests) == {"free": 5, "two": 2}
