"""A step from its schedule to what it brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from relevo.core.errors import RelevoError
from relevo.core.in_flight import Advanced
from relevo.core.request import Request, RequestStatus
from relevo.core.schedule import ScheduledRequest, SchedulerOutput
from relevo.engine.model_runner import LaunchedStep, RunResult
from relevo.engine.sampler import SampledToken
from relevo.engine.step_result import Chunk, Computed, NewTokens


@dataclass(slots=True)
class Step:
    """launched: None where nothing was scheduled
    chunks, prompt_chunks: see the functions; of the requests as they were before the step
    began_at: on the clock of time.monotonic; verified_from: when drafts, if any, were there
    advanced: if the next one may be scheduled before its tokens are known; else None
    """

    output: SchedulerOutput
    launched: LaunchedStep | None
    chunks: list[Chunk]
    prompt_chunks: list[tuple[int, int]]
    began_at: float
    verified_from: float = 0.0
    advanced: list[Advanced] | None = None

    def wait(self) -> Outcome:
        """For the device. Of requests that have ended since it was launched, nothing."""
        run = self.launched.wait() if self.launched is not None else RunResult({}, {}, {})
        outcome = Outcome(run, [e for e in self.output.scheduled if e.request.status is not RequestStatus.FINISHED])
        for entry in outcome.entries:
            name = entry.request.request_id
            result = run.sampled.get(name)
            if isinstance(result, RelevoError):
                outcome.failed[name] = result
            elif result is not None:
                outcome.sampled[name] = result
        return outcome

    def computed(self, entries: Sequence[ScheduledRequest]) -> list[Computed]:
        """Of those that hold their blocks. After the step is accounted for"""
        counts = {id(each.request): each.num_computed_tokens for each in self.advanced or ()}
        return [
            Computed(r.request_id, counts.get(id(r), r.num_computed_tokens), list(r.block_ids))
            for r in (entry.request for entry in entries)
            if r.hold_blocks
        ]


@dataclass(slots=True)
class Outcome:
    """sampled, failed: by request id; drafts that were accepted included, also behind a request's end"""

    run: RunResult
    entries: list[ScheduledRequest]
    sampled: dict[str, list[SampledToken]] = field(default_factory=dict)
    failed: dict[str, RelevoError] = field(default_factory=dict)

    def new_tokens(self, token_ids: Mapping[str, Sequence[int]]) -> list[NewTokens]:
        """token_ids: those of `sampled`, none behind its request's end"""
        return [
            NewTokens(name, list(ids), [token.logprobs for token in self.sampled[name][: len(ids)] if token.logprobs])
            for name, ids in token_ids.items()
        ]


def chunks_of(output: SchedulerOutput) -> list[Chunk]:
    """What a step is to compute of prompts; plain steps of running requests are none. Before the step is accounted."""
    return [
        Chunk(entry.request.request_id, entry.num_known_tokens)
        for entry in output.scheduled
        if entry.num_known_tokens > 1 or not entry.request.num_output_tokens
    ]


def runs_ahead(requests: Sequence[Request]) -> bool:
    """Whether a step of any of these can be launched before the tokens of the one before it are known."""
    return not any(request.sampling.needs_text for request in requests)
