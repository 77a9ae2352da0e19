"""Speculation in an engine's steps: who gets drafts and how many, from whom, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest, SchedulerOutput
from relevo.engine.sampler import SampledToken
from relevo.engine.spec_decode.acceptance import Acceptance, SharedAcceptance
from relevo.engine.spec_decode.planning import best_plan
from relevo.engine.spec_decode.proposer import Proposer
from relevo.engine.spec_decode.row_costs import RowCosts
from relevo.engine.spec_decode.stats import SpecDecodeStats, StatsCounter

STEPS_A_PLAN = 8  # planning takes a good part of a millisecond; what it goes by changes slowly
STEPS_A_PLAIN_ONE = 24
FIRST_STEPS = 96  # with drafts, in which plain ones come more often
PROBE_SHARE = 0.01  # of the time, for drafts that are not expected to pay: they may by now
PROBE_DRAFTS = 2
ANSWER_TOKENS = 64.0  # an answer, where none was measured
ANSWER_WEIGHT = 0.05


@dataclass(slots=True)
class _Drafting:
    """A request's own figures."""

    acceptance: Acceptance
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


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
        self.propose_costs = propose_costs
        self.adaptive = adaptive
        self._counter = StatsCounter(max_drafts)
        self._shared = SharedAcceptance()
        self._drafting: dict[str, _Drafting] = {}
        self._planned: dict[str, int] = {}
        self._planned_for: tuple[int, int] = (0, 0)
        self._steps_left = 0
        self._steps_with_drafts = 0
        self._credit_seconds = 0.0  # for probes
        self._answer_tokens = ANSWER_TOKENS
        self._propose_seconds = 0.0  # of the step in progress

    def plan(self, running: Sequence[Request]) -> Mapping[str, int]:
        """How many drafts are wanted of which requests."""
        requests = [r for r in running if r.num_uncomputed_tokens == 1 and self._limit(r) > 0]
        if not requests:
            return {}
        if not self.adaptive:
            return {request.request_id: self._limit(request) for request in requests}
        # The first and the number tell well enough whether they are others.
        composition = len(running), len(requests)
        if self._steps_left <= 0 or composition != self._planned_for:
            self._planned = self._make_plan(requests, len(running) - len(requests))
            self._planned_for = composition
            self._steps_left = STEPS_A_PLAN
        self._steps_left -= 1
        if not self._planned:
            return {}
        # What steps without drafts take must be known as well, or drafts seem to pay for ever.
        self._steps_with_drafts += 1
        every = STEPS_A_PLAIN_ONE if self._steps_with_drafts > FIRST_STEPS else STEPS_A_PLAIN_ONE // 6
        if self._steps_with_drafts % every == 0:
            return {}
        return self._planned

    def propose(self, output: SchedulerOutput) -> SchedulerOutput:
        """With drafts in the slots."""
        self._propose_seconds = 0.0
        if not any(entry.num_draft_slots for entry in output.scheduled):
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
        if self._propose_seconds or has_drafts:
            self._counter.add_seconds(self._propose_seconds, seconds if has_drafts else 0.0)
        self._credit_seconds += PROBE_SHARE * seconds

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

    def _make_plan(self, requests: Sequence[Request], num_others: int) -> dict[str, int]:
        rates = [self._drafting_of(request).acceptance.rate for request in requests]
        limits = [self._limit(request) for request in requests]
        plan = best_plan(rates, limits, num_others, self.verify_costs.seconds, self._propose_seconds_of)
        num_drafts = {}
        for request, count in zip(requests, plan.num_drafts, strict=True):
            if count and self._is_worth_its_lag(request, plan.gain, len(requests) + num_others):
                num_drafts[request.request_id] = count
            elif not count:
                self._drafting_of(request).acceptance.idle(STEPS_A_PLAN)
        return num_drafts or self._probe(requests, num_others)

    def _propose_seconds_of(self, num_requests: float) -> float:
        return self.propose_costs.seconds(num_requests) if self.propose_costs is not None else 0.0

    def _lag_seconds(self, request: Request) -> float:
        if self.propose_costs is None:
            return 0.0
        lag = self.proposer.lag(request)
        return self.propose_costs.seconds(lag) if lag else 0.0

    def _is_worth_its_lag(self, request: Request, gain: float, num_rows: int) -> bool:
        """What the proposer must compute first costs less than half of what its drafts will save."""
        lag_seconds = self._lag_seconds(request)
        if lag_seconds == 0.0:
            return True
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
            more = STEPS_A_PLAN * (drafting + verifying) + self._lag_seconds(request)
            if cost + more > self._credit_seconds:
                break
            cost += more
            probes[request.request_id] = count
        self._credit_seconds -= cost
        return probes
