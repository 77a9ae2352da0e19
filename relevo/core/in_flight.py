"""A step that is scheduled while the one before it is in flight.

advance() takes a launched step for computed, with a pending token in the place of each that it samples; settle() puts
the tokens there. A request that ends with one of them is as if the step after it, which is in flight by then, had not
had it: the row that it has there is dropped, and what that row writes lies in blocks that a later step writes over.
A step is settled when the next one has been advanced: of a request at most two tokens are pending, and one is when a
step is scheduled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relevo.core.request import PENDING_TOKEN, Request, RequestStatus
from relevo.core.schedule import SchedulerOutput
from relevo.core.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Advanced:
    """What a step in flight will have computed of a request: KV of [0, num_computed_tokens).

    num_preemptions: of the request when it was launched; others since then mean that its blocks are others
    """

    request: Request
    num_computed_tokens: int
    num_preemptions: int


def advance(output: SchedulerOutput) -> list[Advanced]:
    """Take a step that was launched for computed."""
    advanced = []
    for entry in output.scheduled:
        request = entry.request
        assert not entry.draft_token_ids, "how many drafts are accepted is not known before the tokens are there"
        request.num_computed_tokens += entry.num_scheduled_tokens
        if entry.samples:
            request.token_ids.append(PENDING_TOKEN)
            request.num_pending_tokens += 1
        advanced.append(Advanced(request, request.num_computed_tokens, request.num_preemptions))
    return advanced


def settle(scheduler: Scheduler, computed: Sequence[Advanced], sampled: Mapping[str, int]) -> list[Request]:
    """Account for what a step that was advanced has brought; of requests that have ended meanwhile, nothing.

    Returns the requests that ended.
    """
    ended = []
    for entry in computed:
        request = entry.request
        if request.status is RequestStatus.FINISHED:
            continue
        token_id = sampled.get(request.request_id)
        if token_id is not None:
            at = request.num_tokens - request.num_pending_tokens
            request.token_ids[at] = token_id
            request.num_pending_tokens -= 1
            request.finish_reason = request.end_reason(token_id, at + 1 - request.num_prompt_tokens)
            if request.finish_reason is not None:
                ended.append(request)
        if request.num_preemptions == entry.num_preemptions:
            scheduler.name_blocks(request, entry.num_computed_tokens)
    for request in ended:
        scheduler.end(request)
    return ended
