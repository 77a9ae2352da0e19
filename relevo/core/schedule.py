"""What a scheduler is told and what it says: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from relevo.core.request import Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int  # requests that have blocks at the same time
    max_num_batched_tokens: (
        int  # computed in one step; at least max_num_seqs, so that every running request gets its token
    )
    block_size: int
    max_prompt_logprobs: int = 1024  # rows of prompts whose logits are wanted, in one step: a matrix in memory
    output_allowance_tokens: int = 64  # reserved beyond the prompt when a request awaits its KV from elsewhere

    def __post_init__(self) -> None:
        assert 0 < self.max_num_seqs <= self.max_num_batched_tokens and self.block_size > 0


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """The step computes num_scheduled_tokens of the request, from `start` on: what was computed when it was scheduled.

    [start, num_tokens)                                           known tokens, or as many of them as fit the step
    [num_tokens, num_tokens + len(draft_token_ids))               drafts; only behind all that is known

    num_draft_slots: how many drafts there is room for, in the step and in the request's blocks
    samples: all known tokens are computed after this step: the last rows' logits choose the next ones
    """

    request: Request
    num_scheduled_tokens: int  # drafts included
    draft_token_ids: Sequence[int] = ()
    num_draft_slots: int = 0
    start: int = field(init=False)
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.request.num_computed_tokens)
        object.__setattr__(self, "samples", self.num_known_tokens == self.request.num_uncomputed_tokens)

    @property
    def num_known_tokens(self) -> int:
        """Of those that are scheduled: all but the drafts."""
        return self.num_scheduled_tokens - len(self.draft_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Of the step's rows."""
        known = self.request.token_ids[self.start : self.start + self.num_known_tokens]
        return [*known, *self.draft_token_ids]

    def with_drafts(self, draft_token_ids: Sequence[int]) -> ScheduledRequest:
        """The same, with drafts in its slots: at most so many."""
        assert len(draft_token_ids) <= self.num_draft_slots and self.samples
        num_scheduled_tokens = self.num_scheduled_tokens + len(draft_token_ids)
        return ScheduledRequest(self.request, num_scheduled_tokens, draft_token_ids, self.num_draft_slots)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # got their first blocks; once in a request's life
    reserved: list[Request] = field(default_factory=list)  # the same, and now wait for their KV
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(scheduled.num_scheduled_tokens for scheduled in self.scheduled)
