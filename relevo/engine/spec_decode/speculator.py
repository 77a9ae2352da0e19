"""Speculation in an engine's steps: who gets drafts and how many, from whom, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest, SchedulerOutput
from relevo.engine.sampler import SampledToken
from relevo.engine.spec_decode.acceptance import Acceptance, SharedAcceptance
from relevo.engine.spec_decode.payoff import Payoff
from relevo.engine.spec_decode.planning import best_plan
from relevo.engine.spec_decode.proposer import Proposer
from relevo.engine.spec_decode.row_costs import RowCosts
from relevo.engine.spec_decode.stats import SpecDecodeStats, StatsCounter
from relevo.engine.spec_decode.trial import Trial

STEPS_A_PLAN = 8  # planning takes a good part of a millisecond; what it goes by changes slowly
STEPS_A_TRIAL = 16
STEPS_A_PLAIN_ONE, GREAT_GAIN = (12, 32), 1.2  # the second where the gain is great: then less hangs on it
STEPS_A_LOOK = 16  # in a pause two in so many are looked at, the first for its time: all of them say the same
FIRST_PAUSE, MAX_PAUSE = 16, 1024  # steps without drafts, and without a thought of them; doubled while none pay
NEW_PAUSE = 256  # at most, where a request is new or the batch's size another; half of it before the next trial
PROBE_SHARE = 0.01  # of the time, for drafts that are not expected to pay: they may by now
MAX_CREDIT_STEPS = 8  # and what drafts have saved may be risked for others, but not more than so many steps' time
PROBE_DRAFTS = 2
CLEAR_GAIN = 1.25  # by the model of costs: then what a proposer must compute first may cost more than the credit
ANSWER_TOKENS = 64.0  # an answer, where none was measured
ANSWER_WEIGHT = 0.05


@dataclass(slots=True)
class _Drafting:
    """A request's own figures."""

    acceptance: Acceptance
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class _Step:
    """num_tokens: that it brought; 0 unless it was of decodes only. has_plan: it may have drafts.

    stands_for: so many steps, of which one is looked at
    """

    started: float
    num_running: int
    stands_for: int
    has_plan: bool = False
    num_tokens: int = 0


class Speculator:
    """A step goes: plan() → Scheduler.schedule → propose() → the target's pass → learn().

    verify_costs: of the target's pass, by rows
    propose_costs: of drafting one token for each of so many requests; of a proposer that computes nothing, None
    adaptive: False gives every request all drafts that it may have, whether that pays or not
    """

    def __init__(
        self,
        proposer: Proposer,
        max_drafts: int,
        verify_costs: RowCosts,
        propose_costs: RowCosts | None = None,
        *,
        adaptive: bool = True,
    ) -> None:
        self.proposer = proposer
        self.max_drafts = max_drafts
        self.verify_costs = verify_costs
        self._yardstick = deepcopy(verify_costs)  # for payoffs: what these learn must not move it
        self.propose_costs = propose_costs
        self.adaptive = adaptive
        self._counter = StatsCounter(max_drafts)
        self._shared = SharedAcceptance()
        self._drafting: dict[str, _Drafting] = {}
        self._planned: dict[str, int] = {}
        self._composition: tuple[int, str] = (0, "")
        self._steps_left = 0  # of the plan
        self._steps_with_drafts = 0
        self._pause, self._pause_left = FIRST_PAUSE, 0
        self._payoffs: dict[int, Payoff] = {}
        self._step: _Step | None = None  # the one in progress
        self._rests, self._rest_left = False, 0  # the step in progress is not looked at, nor so many that follow
        self._trial = Trial()
        # For drafts that may not pay. Enough at first for one trial: what was measured at start may be wrong.
        self._credit_seconds = MAX_CREDIT_STEPS * verify_costs.seconds(1)
        self._answer_tokens = ANSWER_TOKENS
        self._propose_seconds = 0.0  # of the step in progress

    def plan(self, running: Sequence[Request]) -> Mapping[str, int]:
        """How many drafts are wanted of which requests."""
        if not running:
            self._step = None
            return {}
        if not self.adaptive:
            return {request.request_id: limit for request in running if (limit := self._wanted(request)) > 0}
        self._rests = self._rest_left > 0
        if self._rests:
            self._rest_left -= 1
            self._step = None
            return {}
        # The newest and the number tell well enough whether they are others.
        composition = len(running), running[-1].request_id
        is_same = composition == self._composition
        payoff = self._payoff_of(len(running))
        now = time.perf_counter()
        if self._step is not None and is_same:
            self._take_in(self._step, payoff, now - self._step.started)
        if not is_same:
            if composition[1] != self._composition[1] or payoff is not self._payoff_of(self._composition[0]):
                self._pause = min(self._pause, NEW_PAUSE)
                self._pause_left = min(self._pause_left, self._pause // 2)
            self._composition = composition
            self._steps_left = 0
        self._step = _Step(now, len(running), STEPS_A_LOOK if self._pause_left > 0 else 1)
        if self._pause_left > 0 or not payoff.knows_plain:
            self._pause_left = max(0, self._pause_left - 1)
            self._rest_left = max(0, self._pause_left % STEPS_A_LOOK - 1)
            self._pause_left -= self._rest_left
            self._planned = {}
            return {}
        return self._drafts_of(running, payoff)

    def _drafts_of(self, running: Sequence[Request], payoff: Payoff) -> Mapping[str, int]:
        if self._steps_left <= 0 or self._trial.has_failed(self._yardstick.seconds(len(running))):
            self._planned = self._make_plan(running, payoff)
            if not self._planned:
                self._steps_left = 0
                self._pause_left, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
                return {}
        self._steps_left -= 1
        # What steps without drafts take must be known as well, or drafts seem to pay for ever.
        self._steps_with_drafts += 1
        if self._steps_with_drafts % STEPS_A_PLAIN_ONE[(payoff.gain or 0.0) >= GREAT_GAIN] == 0:
            return {}
        assert self._step is not None
        self._step.has_plan = True
        return self._planned

    def _take_in(self, step: _Step, payoff: Payoff, seconds: float) -> None:
        """A step from its plan to the next one's."""
        if not step.num_tokens:
            return
        plain_work = self._yardstick.seconds(step.num_running)
        self._credit_seconds += PROBE_SHARE * seconds * step.stands_for
        if step.has_plan:
            work = plain_work * step.num_tokens / step.num_running
            saved = payoff.add_drafts(work, plain_work, seconds, self._propose_seconds)
            self._credit_seconds = min(self._credit_seconds + saved, MAX_CREDIT_STEPS * plain_work)
            self._trial.add(saved)
        else:
            payoff.add_plain(plain_work, seconds)

    def propose(self, output: SchedulerOutput) -> SchedulerOutput:
        """With drafts in the slots."""
        self._propose_seconds = 0.0
        if self._rests or not any(entry.num_draft_slots for entry in output.scheduled):
            return output
        started = time.perf_counter()
        proposed = self.proposer.propose(output.scheduled)
        scheduled = [
            entry.with_drafts(drafts) if drafts else entry
            for entry, drafts in zip(output.scheduled, proposed, strict=True)
        ]
        self._propose_seconds = time.perf_counter() - started
        return replace(output, scheduled=scheduled)

    def learn(
        self, scheduled: Sequence[ScheduledRequest], sampled: Mapping[str, Sequence[SampledToken]], seconds: float
    ) -> None:
        """After the target's pass, which took so long, and before requests change. sampled: before any end is cut."""
        step = self._step
        if self._rests:
            return
        if step is not None and not step.has_plan:
            if len(scheduled) == step.num_running and all(entry.num_scheduled_tokens == 1 for entry in scheduled):
                step.num_tokens = len(scheduled)
                self.verify_costs.add(len(scheduled), seconds)
            return
        has_drafts = False
        decodes_only = True
        for entry in scheduled:
            num_drafts = len(entry.draft_token_ids)
            if entry.num_scheduled_tokens - num_drafts != 1:
                decodes_only = False
            if not num_drafts:
                continue
            has_drafts = True
            num_accepted = len(sampled.get(entry.request.request_id, ())) - 1
            if num_accepted < 0:
                continue  # the request has failed
            drafting = self._drafting_of(entry.request)
            drafting.acceptance.add(num_drafts, num_accepted)
            drafting.num_draft_tokens += num_drafts
            drafting.num_accepted_tokens += num_accepted
            self._shared.add(num_drafts, num_accepted)
            self._counter.add_draft(num_drafts, num_accepted)
            self.proposer.verified(entry, num_accepted)
        if decodes_only and scheduled:
            self.verify_costs.add(sum(entry.num_scheduled_tokens for entry in scheduled), seconds)
            if step is not None and len(scheduled) == step.num_running:
                step.num_tokens = sum(map(len, sampled.values()))
        if self._propose_seconds or has_drafts:
            self._counter.add_seconds(self._propose_seconds, seconds if has_drafts else 0.0)

    def ended(self, request: Request) -> None:
        """It has its whole answer."""
        self._answer_tokens += ANSWER_WEIGHT * (request.num_output_tokens - self._answer_tokens)
        self.proposer.ended(request)

    def forget(self, request_id: str) -> tuple[int, int]:
        """Of a request that has ended, however it did: its drafted and accepted tokens. Again, it does nothing."""
        self.proposer.forget(request_id)
        drafting = self._drafting.pop(request_id, None)
        return (drafting.num_draft_tokens, drafting.num_accepted_tokens) if drafting else (0, 0)

    def stats(self) -> SpecDecodeStats:
        return self._counter.stats()

    def _limit(self, request: Request) -> int:
        if request.sampling.use_beam_search:
            return 0
        own = request.sampling.num_speculative_tokens
        limit = self.max_drafts if own is None else min(own, self.max_drafts)
        return min(limit, request.max_tokens - request.num_output_tokens - 1)

    def _drafting_of(self, request: Request) -> _Drafting:
        drafting = self._drafting.get(request.request_id)
        if drafting is None:
            drafting = self._drafting[request.request_id] = _Drafting(Acceptance(self._shared))
        return drafting

    def _payoff_of(self, num_running: int) -> Payoff:
        return self._payoffs.setdefault(num_running.bit_length(), Payoff())

    def _wanted(self, request: Request) -> int:
        return self._limit(request) if request.num_uncomputed_tokens == 1 else 0

    def _make_plan(self, running: Sequence[Request], payoff: Payoff) -> dict[str, int]:
        """Drafts where the clock says that they pay; where it says nothing, or did not before, a trial."""
        requests = [request for request in running if self._wanted(request) > 0]
        num_others = len(running) - len(requests)
        measured = payoff.gain
        is_sure = payoff.is_sure
        if not requests:
            return {}
        if self._planned:
            if not is_sure and (measured is not None or self._trial.has_failed(self._yardstick.seconds(len(running)))):
                return {}  # the trial, or what paid until now
        elif not is_sure and self._credit_seconds <= 0.0:
            return {}
        rates = [self._drafting_of(request).acceptance.rate for request in requests]
        limits = [self._limit(request) for request in requests]
        plan = best_plan(rates, limits, num_others, self.verify_costs.seconds, self._propose_seconds_of)
        gain = plan.gain if measured is None else min(plan.gain, measured)
        credit = math.inf if is_sure or gain >= CLEAR_GAIN else self._credit_seconds
        num_drafts = {}
        for request, count in zip(requests, plan.num_drafts, strict=True):
            if count and self._is_worth_its_lag(request, gain, len(running), credit):
                num_drafts[request.request_id] = count
                credit -= self._lag_seconds(request)
            elif not count:
                self._drafting_of(request).acceptance.idle(STEPS_A_PLAN)
        if num_drafts and is_sure:
            self._trial.end()
            self._steps_left = STEPS_A_PLAN
            self._pause = FIRST_PAUSE
            return num_drafts
        self._steps_left = STEPS_A_TRIAL
        if self._planned:
            return num_drafts
        num_drafts = num_drafts or self._probe(requests, num_others)
        if num_drafts:
            self._trial.begin()
            payoff.begin_trial()
        return num_drafts

    def _propose_seconds_of(self, num_requests: float) -> float:
        return self.propose_costs.seconds(num_requests) if self.propose_costs is not None else 0.0

    def _lag_seconds(self, request: Request) -> float:
        if self.propose_costs is None:
            return 0.0
        lag = self.proposer.lag(request)
        return self.propose_costs.seconds(lag) if lag else 0.0

    def _is_worth_its_lag(self, request: Request, gain: float, num_rows: int, credit: float) -> bool:
        """What the proposer must compute first costs less than half of what its drafts will save, and no more than
        the credit."""
        lag_seconds = self._lag_seconds(request)
        if lag_seconds == 0.0:
            return True
        if gain <= 1.0 or lag_seconds > credit:
            return False
        num_left = max(0.0, self._answer_tokens - request.num_output_tokens)
        num_left = min(request.max_tokens - request.num_output_tokens, max(num_left, ANSWER_TOKENS / 4))
        saved = num_left * self.verify_costs.seconds(num_rows) * (1 - 1 / gain)
        # A step is shared by all: so is what a request saves of it.
        return lag_seconds < saved / (2 * num_rows)

    def _probe(self, requests: Sequence[Request], num_others: int) -> dict[str, int]:
        """Nothing pays: now and then a few drafts all the same, as far as the credit goes, to see whether it would."""
        num_rows = len(requests) + num_others
        before = self.verify_costs.seconds(num_rows)
        cost = 0.0
        probes: dict[str, int] = {}
        for request in requests:
            count = min(PROBE_DRAFTS, self._limit(request))
            drafting = count * self._propose_seconds_of(len(probes) + 1)
            verifying = self.verify_costs.seconds(num_rows + sum(probes.values()) + count) - before
            more = STEPS_A_TRIAL * (drafting + verifying) + self._lag_seconds(request)
            if cost + more > self._credit_seconds:
                break
            cost += more
            probes[request.request_id] = count
        return probes
