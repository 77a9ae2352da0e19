"""Steps that are scheduled before the one before them is known: nothing is lost, and nothing runs twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from relevo.core.in_flight import Advanced, advance, settle
from relevo.core.request import PENDING_TOKEN, FinishReason, Request, RequestStatus
from relevo.core.schedule import SchedulerOutput
from relevo.core.scheduler import Scheduler
from tests.core.test_scheduler import SchedulerMachine, next_token, scheduled
from tests.support.builders import make_request, make_scheduler


class Steps:
    """A device that is one step behind: each request's next token is what its position determines."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.in_flight: tuple[list[Advanced], dict[str, int]] | None = None

    def step(self) -> tuple[SchedulerOutput, list[Request]]:
        output = self.scheduler.schedule()
        sampled = {e.request.request_id: next_token(e.request) for e in output.scheduled if e.samples}
        before, self.in_flight = self.in_flight, (advance(output), sampled)
        self.scheduler.check()
        return output, self.settle(before)

    def settle(self, step: tuple[list[Advanced], dict[str, int]] | None) -> list[Request]:
        ended = settle(self.scheduler, *step) if step else []
        self.scheduler.check()
        return ended


def test_a_token_is_computed_before_it_is_known() -> None:
    steps = Steps(make_scheduler())
    request = make_request("r", range(5), max_tokens=3)
    steps.scheduler.add(request)
    steps.step()
    assert request.token_ids[5:] == [PENDING_TOKEN]
    output, _ = steps.step()
    assert scheduled(output) == {"r": 1}
    assert request.token_ids[5:] == [1005, PENDING_TOKEN]
    steps.step()
    assert request.token_ids[5:] == [1005, 1006, PENDING_TOKEN]
    # Its last token is on its way: there is nothing left to compute.
    output, ended = steps.step()
    assert not output.scheduled and ended == [request]
    assert request.output_token_ids == [1005, 1006, 1007] and request.finish_reason is FinishReason.LENGTH
    assert steps.scheduler.pool.num_free_blocks == steps.scheduler.pool.num_blocks


def test_what_follows_a_stop_token_is_dropped() -> None:
    steps = Steps(make_scheduler())
    request = make_request("r", range(5), max_tokens=9, stop_token_ids=[1006])
    steps.scheduler.add(request)
    ended = [steps.step()[1] for _ in range(3)][-1]
    assert ended == [request] and request.finish_reason is FinishReason.STOP
    assert request.output_token_ids == [1005, 1006]
    assert steps.in_flight and [each.request for each in steps.in_flight[0]] == [request]
    assert steps.step()[1] == [] and request.output_token_ids == [1005, 1006]


def test_a_request_that_is_aborted_in_flight_brings_nothing() -> None:
    steps = Steps(make_scheduler())
    steps.scheduler.add(make_request("r", range(5), max_tokens=9))
    steps.step()
    steps.scheduler.abort("r")
    again = make_request("r", range(50, 55), max_tokens=1)  # the name is free again
    steps.scheduler.add(again)
    assert steps.step()[1] == []
    assert steps.step()[1] == [again] and again.output_token_ids == [1005]


def test_who_is_preempted_in_flight_keeps_the_token_and_computes_it_again() -> None:
    steps = Steps(make_scheduler(num_blocks=4))
    old = make_request("old", range(7), max_tokens=9)
    young = make_request("young", range(50, 57), max_tokens=9)
    for request in (old, young):
        steps.scheduler.add(request)
    ended: list[Request] = []
    for _ in range(40):
        ended += steps.step()[1]
    assert young.num_preemptions and ended == [old, young]
    for request in ended:
        assert request.output_token_ids == [1007 + i for i in range(9)]


def test_blocks_are_named_when_their_tokens_are_known() -> None:
    steps = Steps(make_scheduler())
    steps.scheduler.add(make_request("r", range(7), max_tokens=9))
    named = []
    for _ in range(4):
        steps.step()
        named.append(len(steps.scheduler.pool._block_of))
    assert named == [0, 1, 2, 2]  # the second block's last token is the first of the output


class AheadMachine(SchedulerMachine):
    """As SchedulerMachine, one step behind."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = Steps(self.scheduler)

    @rule(num_drafts=st.just(0), num_right=st.just(0))
    def step(self, num_drafts: int = 0, num_right: int = 0) -> None:
        output, ended = self.steps.step()
        assert output.num_scheduled_tokens <= self.scheduler.config.max_num_batched_tokens
        assert all(entry.request.status is not RequestStatus.FINISHED for entry in output.scheduled if not ended)
        for request in ended:
            assert self.open.pop(request.request_id) is request
            assert request.output_token_ids == [
                1000 + request.num_prompt_tokens + i for i in range(request.num_output_tokens)
            ]
            assert request.num_output_tokens == request.max_tokens
            if request.hold_blocks:
                self.held.add(request.request_id)


TestAheadMachine = AheadMachine.TestCase
TestAheadMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
