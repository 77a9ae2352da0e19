"""Which tokens of which requests the next step computes.

One rule: a request has tokens known and tokens computed, and a step computes some of the difference under a token
budget. Chunked prefill, prefix hits and resumption after preemption are that rule. Drafts are tokens that may become
known: a step computes them behind the known ones, and what is not accepted is as if it had never been computed.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from relevo.core.block_hash import BlockHash
from relevo.core.block_pool import BlockPool
from relevo.core.prompt_budget import PromptBudget, PromptLimit
from relevo.core.request import FinishReason, Request, RequestStatus
from relevo.core.schedule import ScheduledRequest, SchedulerConfig, SchedulerOutput


class Scheduler:
    """Owns the requests and, through the pool, their blocks.

    waiting          no blocks; by priority, and first come, first served
    waiting_for_kv   blocks that somebody else fills: never preempted
    running          computed step by step; when blocks run out, or a more urgent one has no room, the least urgent, of
                     equals the youngest, is preempted and recomputes later
    held             ended, blocks kept until release()

    Blocks that are pinned are held beside what requests hold: somebody is copying them out.

    prompt_limit: what prompts may add to a step in which others decode, by whoever measures it; None: steps are filled
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.waiting_for_kv: dict[str, Request] = {}
        self.running: list[Request] = []
        self.held: dict[str, Request] = {}
        self._pinned: list[int] = []  # block ids; one that was pinned twice is in it twice
        self._requests: dict[str, Request] = {}
        self._num_added = 0
        self.prompt_limit: PromptLimit | None = None
        self._saved_prompt_seconds = 0.0
        self._num_prompt_logprobs_left = 0  # of this step

    def add(self, request: Request) -> None:
        """Queue a request. It must fit the pool alone: prompt and output need at most pool.num_blocks blocks."""
        assert request.request_id not in self._requests, f"request id {request.request_id} twice"
        assert self._num_blocks(request.num_prompt_tokens + request.max_tokens) <= self.pool.num_blocks
        assert not request.hold_blocks or request.max_tokens == request.num_output_tokens + 1, (
            "held blocks are for requests that end with one token"
        )
        self._requests[request.request_id] = request
        self._num_added += 1
        request.arrival = self._num_added
        insort(self.waiting, request, key=_urgency)

    def resume(self, request_id: str, num_computed_tokens: int, token_ids: list[int]) -> Request | None:
        """The KV of [0, num_computed_tokens) is in the request's blocks now: let it run, with tokens sampled elsewhere.

        None if there is no such request any more (it was aborted meanwhile).
        """
        request = self.waiting_for_kv.pop(request_id, None)
        if request is None:
            return None
        assert num_computed_tokens % self.config.block_size == 0
        request.await_kv = False
        request.token_ids += token_ids
        assert request.num_computed_tokens <= num_computed_tokens <= request.num_tokens
        request.num_computed_tokens = num_computed_tokens
        self.name_blocks(request, num_computed_tokens)
        if request.num_uncomputed_tokens:
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        else:
            # A row must be computed to have logits to sample from, and a named block is never written again. So it
            # starts over, finds all but its last block under their names, and computes that one in a block of its own.
            self._back_to_waiting(request)
        return request

    def abort(self, request_id: str) -> Request | None:
        """Cancel a request now and free its blocks; None if it had ended (held blocks are freed) or never was."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.FINISHED:
            self._forget(request)
            return None
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        elif request.status is RequestStatus.WAITING_FOR_KV:
            del self.waiting_for_kv[request_id]
        elif request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        request.drop_pending_tokens()
        request.finish_reason = FinishReason.CANCELLED
        request.status = RequestStatus.FINISHED
        self._forget(request)
        return request

    def fail(self, request_id: str) -> Request | None:
        """End a running request that can't go on. Held blocks stay until release(): somebody may be copying them."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = FinishReason.CANCELLED
            self.end(request)
        return request

    def release(self, request_id: str) -> None:
        """Free a held request's blocks. Releasing twice is harmless."""
        request = self.held.get(request_id)
        if request is not None:
            self._forget(request)

    def pin(self, names: Iterable[BlockHash]) -> dict[BlockHash, int]:
        """Hold the blocks that are found under these names, whosever they are, until unpin(): name → block id."""
        found = {name: block_id for name in names if (block_id := self.pool.find(name)) is not None}
        self.pool.share(found.values())
        self._pinned += found.values()
        return found

    def unpin(self, block_ids: Iterable[int]) -> None:
        """Of what pin() gave, each once for each time that it was pinned."""
        for block_id in block_ids:
            self._pinned.remove(block_id)
            self.pool.free([block_id])

    @property
    def has_place(self) -> bool:
        return len(self.running) + len(self.waiting_for_kv) < self.config.max_num_seqs

    def place(self, request: Request) -> None:
        """Where a request belongs that was running or waiting and was given blocks, or has lost them."""
        if request.block_ids and request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
            self.running.append(request)
            request.status = RequestStatus.RUNNING
        elif not request.block_ids and request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            insort(self.waiting, request, key=_urgency)
            request.num_preemptions += 1
            request.status = RequestStatus.WAITING

    def schedule(self, num_drafts: Mapping[str, int] | None = None) -> SchedulerOutput:
        """num_drafts: how many drafts, at most, are wanted of which requests: those get slots where there is room."""
        output = SchedulerOutput()
        self._num_prompt_logprobs_left = self.config.max_prompt_logprobs
        self._make_room(output)
        num_yielded = len(output.preempted)
        prompt_budget = self._prompt_budget()
        most = self.config.max_num_batched_tokens
        budget = self._schedule_running(output, most, prompt_budget, num_drafts or {})
        if len(output.preempted) == num_yielded:
            self._schedule_waiting(output, budget, prompt_budget)
        self._saved_prompt_seconds = prompt_budget.saved
        while not output.scheduled and self._preempt_parked(output):
            self._schedule_waiting(output, most, PromptBudget(None))
        return output

    def update(self, output: SchedulerOutput, sampled: Mapping[str, Sequence[int]]) -> list[Request]:
        """Account for a computed step: `sampled` has the next tokens of every scheduled request that samples: those of
        its drafts that were accepted and one more, none behind its end (Request.until_end).

        Returns the requests that ended.
        """
        ended = []
        for scheduled in output.scheduled:
            request = scheduled.request
            if request.request_id in sampled:
                token_ids = sampled[request.request_id]
                assert 1 <= len(token_ids) <= 1 + len(scheduled.draft_token_ids)
                # What was computed of rejected drafts is behind num_computed_tokens: it is written over, and no block
                # is named for it. The last token has not been computed.
                request.num_computed_tokens = request.num_tokens + len(token_ids) - 1
                request.token_ids += token_ids
                request.finish_reason = request.end_reason(request.token_ids[-1], request.num_output_tokens)
                if request.finish_reason is not None:
                    ended.append(request)
            else:
                request.num_computed_tokens += scheduled.num_scheduled_tokens - len(scheduled.draft_token_ids)
            self.name_blocks(request, request.num_computed_tokens)
        for request in ended:
            self.end(request)
        return ended

    def name_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Its full blocks among these tokens, which are known and computed, can be found from now on."""
        block_hashes = request.block_hashes(num_computed_tokens)
        for index in range(request.num_named_blocks, len(block_hashes)):
            self.pool.name(request.block_ids[index], block_hashes[index])
        request.num_named_blocks = max(request.num_named_blocks, len(block_hashes))

    def end(self, request: Request) -> None:
        """Free what a request that has ended holds, or hold it until release()."""
        if request.status is RequestStatus.WAITING:  # preempted while its last token was on its way
            self.waiting.remove(request)
        else:
            self.running.remove(request)
        request.drop_pending_tokens()
        request.status = RequestStatus.FINISHED
        if request.hold_blocks:
            self.held[request.request_id] = request
        else:
            self._forget(request)

    def check(self) -> None:
        """Prove that pool and requests agree; AssertionError says where they do not."""
        self.pool.check()
        ref_cnt: dict[int, int] = {}
        for request in self._requests.values():
            for block_id in request.block_ids:
                ref_cnt[block_id] = ref_cnt.get(block_id, 0) + 1
            has_blocks = request.status is not RequestStatus.WAITING
            assert has_blocks == bool(request.block_ids), (
                f"{request.request_id}: {request.status} with {request.block_ids}"
            )
            assert request.num_computed_tokens <= len(request.block_ids) * self.config.block_size
        for block_id in self._pinned:
            ref_cnt[block_id] = ref_cnt.get(block_id, 0) + 1
        held = {block_id: count for block_id, count in enumerate(self.pool._ref_cnt) if count}
        assert held == ref_cnt, f"held in the pool {held}, by requests and pins {ref_cnt}"

    def _prompt_budget(self) -> PromptBudget:
        """Of this step. Where more requests wait for their first token than decode, more, in that proportion."""
        num_decoding = sum(request.num_uncomputed_tokens == 1 for request in self.running)
        if self.prompt_limit is None or num_decoding == 0:
            return PromptBudget(None)
        num_prompts = len(self.running) - num_decoding + len(self.waiting)
        return PromptBudget(self.prompt_limit, max(1.0, num_prompts / num_decoding), self._saved_prompt_seconds)

    def _schedule_running(
        self, output: SchedulerOutput, budget: int, prompt_budget: PromptBudget, num_drafts: Mapping[str, int]
    ) -> int:
        """Returns what is left of the budget."""

        def later(request: Request) -> tuple[bool, bool]:
            # Those that need one token first: a long prompt must not make them wait for the next step. Then prompts
            # that this step completes: nor must it make those wait until it is through.
            num_tokens = request.num_uncomputed_tokens
            return num_tokens > 1, num_tokens > 1 and not prompt_budget.completes(
                request.num_computed_tokens, num_tokens
            )

        # Drafts never take a request's own token out of the step, and leave prompts half of it.
        spare = min(budget - len(self.running), budget // 2)
        share = 0.5 if self.waiting else 1.0
        for request in sorted(self.running, key=later):
            if request.status is not RequestStatus.RUNNING or request.is_ending:
                continue  # preempted for one before it, or nothing of it is left to compute
            num_tokens = self._num_to_schedule(request, budget)
            is_prompt = request.num_uncomputed_tokens > 1
            position = request.num_computed_tokens
            if is_prompt and not prompt_budget.completes(position, num_tokens):
                num_tokens = prompt_budget.fit(position, num_tokens, share)
            if num_tokens == 0:
                continue
            if self._grow(request, request.num_computed_tokens + num_tokens, output):
                wanted = num_drafts.get(request.request_id, 0) if num_tokens == request.num_uncomputed_tokens else 0
                num_slots = self._draft_slots(request, min(wanted, spare, budget - num_tokens)) if wanted else 0
                self._take(request, num_tokens, output, num_slots)
                budget -= num_tokens + num_slots
                spare -= num_slots
                if is_prompt:
                    prompt_budget.take(position, num_tokens)
        return budget

    def _make_room(self, output: SchedulerOutput) -> None:
        """Preempt for the first that waits, if that lets it in, running requests of a lower priority."""
        lowest = max((request.priority for request in self.running), default=0)
        if not self.waiting or self.waiting[0].priority >= lowest:
            return
        head = next((r for r in self.waiting if self._may_go(r)), None)
        if head is None:
            return
        victims = sorted(
            (r for r in self.running if r.priority > head.priority and not r.hold_blocks), key=_urgency, reverse=True
        )
        missing = self._num_missing_blocks(head)
        num_seqs = len(self.running) + len(self.waiting_for_kv)
        if missing > sum(len(victim.block_ids) for victim in victims):
            return
        for victim in victims:
            if missing <= 0 and num_seqs < self.config.max_num_seqs:
                break
            self._preempt(victim)
            output.preempted.append(victim)
            missing, num_seqs = self._num_missing_blocks(head), num_seqs - 1

    def _num_missing_blocks(self, request: Request) -> int:
        """How many must be freed before _admit() succeeds; 0 or less: none."""
        cached, num_new = self._find_blocks(request)
        return num_new + self.pool.num_free_among(cached) - self.pool.num_free_blocks

    def _draft_slots(self, request: Request, wanted: int) -> int:
        """Room for so many drafts in the request's blocks, or for fewer: nobody is preempted for them, and a token that
        max_tokens does not allow needs none."""
        wanted = min(wanted, request.max_tokens - request.num_output_tokens - 1)
        if wanted <= 0:
            return 0
        missing = self._num_blocks(request.num_tokens + wanted) - len(request.block_ids)
        # Every running request may need a block for its own token.
        missing = min(missing, self.pool.num_free_blocks - len(self.running))
        if missing > 0:
            fresh = self.pool.allocate(missing)
            assert fresh is not None
            request.block_ids += fresh
        return min(wanted, len(request.block_ids) * self.config.block_size - request.num_tokens)

    def _num_to_schedule(self, request: Request, budget: int) -> int:
        num_tokens = min(request.num_uncomputed_tokens, budget)
        if request.num_missing_prompt_logprobs:
            num_tokens = min(num_tokens, self._num_prompt_logprobs_left)
        return num_tokens

    def _take(self, request: Request, num_tokens: int, output: SchedulerOutput, num_draft_slots: int = 0) -> None:
        if request.num_missing_prompt_logprobs:
            self._num_prompt_logprobs_left -= num_tokens
        output.scheduled.append(ScheduledRequest(request, num_tokens, num_draft_slots=num_draft_slots))

    def _schedule_waiting(self, output: SchedulerOutput, budget: int, prompt_budget: PromptBudget) -> None:
        for request in list(self.waiting):
            if not self.has_place:
                break
            if not self._may_go(request):
                continue
            if not request.await_kv and prompt_budget.fit(0, self._num_to_schedule(request, budget)) == 0:
                break
            if not self._admit(request):
                break
            self.waiting.remove(request)
            if request.num_preemptions == 0:
                output.admitted.append(request)
            if request.await_kv:
                request.status = RequestStatus.WAITING_FOR_KV
                self.waiting_for_kv[request.request_id] = request
                output.reserved.append(request)
                continue
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            position = request.num_computed_tokens
            num_tokens = prompt_budget.fit(position, self._num_to_schedule(request, budget))
            if num_tokens:
                self._take(request, num_tokens, output)
                budget -= num_tokens
                prompt_budget.take(position, num_tokens)

    def _may_go(self, request: Request) -> bool:
        """Whether a step may compute something of it."""
        return not (request.is_parked or request.is_ending or self._is_being_computed(request))

    def _admit(self, request: Request) -> bool:
        """Blocks for all known tokens (awaiting KV: and some output), cached ones shared; False if too few are free."""
        cached, num_new = self._find_blocks(request)
        if num_new + self.pool.num_free_among(cached) > self.pool.num_free_blocks:
            return False
        self.pool.share(cached)
        fresh = self.pool.allocate(num_new)
        assert fresh is not None
        request.block_ids = cached + fresh
        request.num_computed_tokens = len(cached) * self.config.block_size
        request.num_named_blocks = len(cached)
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        return True

    def _find_blocks(self, request: Request) -> tuple[list[int], int]:
        """The cached blocks that it would share, and how many others it needs."""
        if request.await_kv:
            num_tokens = request.num_tokens + min(request.max_tokens, self.config.output_allowance_tokens)
        else:
            num_tokens = request.num_tokens
        cached = self.pool.find_prefix(request.block_hashes(self._num_cacheable(request)))
        return cached, self._num_blocks(num_tokens) - len(cached)

    def _num_cacheable(self, request: Request) -> int:
        """How many of its tokens may come from the cache."""
        if request.num_missing_prompt_logprobs:
            return request.num_prompt_logprobs
        return request.num_tokens if request.await_kv else request.num_tokens - 1  # one row must be computed

    def _is_being_computed(self, request: Request) -> bool:
        """Whether another request, by its steps or by who fills its blocks, will soon have all that could be shared.

        Then it waits for them, which takes no longer than computing the same at its side, and holds no block meanwhile:
        so n choices for a prompt hold its full blocks once. Requests with but a beginning in common wait for nobody.
        """
        names = request.block_hashes(self._num_cacheable(request))
        if not names or self.pool.find(names[-1]) is not None:
            return False
        at = len(names) - 1
        return any(
            other.num_named_blocks <= at < len(other.known_block_hashes) and other.known_block_hashes[at] == names[at]
            for other in (*self.running, *self.waiting_for_kv.values())
        )

    def _grow(self, request: Request, num_tokens: int, output: SchedulerOutput) -> bool:
        """Blocks for num_tokens, preempting the least urgent if need be; False if the request itself had to go."""
        missing = self._num_blocks(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return True
        while (fresh := self.pool.allocate(missing)) is None:
            scheduled = {id(entry.request) for entry in output.scheduled}
            victim = max(
                (r for r in self.running if not r.hold_blocks and (id(r) not in scheduled or r is request)),
                key=_urgency,
                default=request,
            )
            self._preempt(victim)
            output.preempted.append(victim)
            if victim is request:
                return False
        request.block_ids += fresh
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._back_to_waiting(request)

    def _preempt_parked(self, output: SchedulerOutput) -> bool:
        """Where nothing can be computed, for the parked hold what the others of their group wait for: one gives way."""
        if all(request.is_parked for request in self.waiting):
            return False
        victim = next((request for request in reversed(self.running) if request.is_parked), None)
        if victim is None:
            return False
        self._preempt(victim)
        output.preempted.append(victim)
        return True

    def _back_to_waiting(self, request: Request) -> None:
        self._free_blocks(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_urgency)

    def _forget(self, request: Request) -> None:
        self._free_blocks(request)
        self.held.pop(request.request_id, None)
        del self._requests[request.request_id]

    def _free_blocks(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_named_blocks = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)


def _urgency(request: Request) -> tuple[int, int]:
    """The least goes first."""
    return request.priority, request.arrival
