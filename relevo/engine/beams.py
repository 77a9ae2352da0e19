"""Beam search on the engine: a request's hypotheses are requests that share blocks and choose their tokens together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from relevo.core.beam_search import BeamSearch, Candidate, Hypothesis, num_candidates
from relevo.core.errors import InvalidRequest, RelevoError
from relevo.core.forking import reorder
from relevo.core.request import FinishReason, Request
from relevo.core.scheduler import Scheduler
from relevo.engine.logits_processing import SamplingRow, process_row
from relevo.engine.logprobs import TokenLogprobs, named_logprobs, token_logprobs
from relevo.kernels import Kernels

Logprobs = TokenLogprobs | None
BeamCandidates = list[Candidate[Logprobs]]


@dataclass(frozen=True, slots=True)
class Beam:
    """A finished hypothesis. score: as transformers' sequences_scores. logprobs: empty, or one a token"""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    score: float


@dataclass(frozen=True, slots=True)
class EndedBeams:
    """What came of a request: the best first."""

    request: Request
    beams: list[Beam]

    @property
    def request_id(self) -> str:
        return self.request.request_id


def beam_candidates(kernels: Kernels, logits: Tensor, row: SamplingRow) -> BeamCandidates:
    """The likeliest tokens after one hypothesis; as in transformers, parameters change log-probabilities here.

    logits: [vocab] float32, the model's own. Raises InvalidRequest if a custom processor fails.
    """
    sampling = row.sampling
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else row.eos_token_ids)}
    count = min(num_candidates(sampling.num_beams, len(stops)), len(logits))
    scores = logits.log_softmax(dim=-1)
    process_row(scores, row, kernels)
    values, ids = kernels.top_k(scores.unsqueeze(0), count)
    likeliest = [(i, v) for i, v in zip(ids[0].tolist(), values[0].tolist(), strict=True) if v > -torch.inf]
    notes: list[Logprobs] = [None] * len(likeliest)
    if sampling.logprobs is not None and likeliest:
        first, *others = [i for i, _ in likeliest]
        own = named_logprobs(kernels, logits, first, others)
        top = token_logprobs(kernels, logits.unsqueeze(0), ids[0, :1], [sampling.logprobs])[0].top
        if sampling.logprob_token_ids:
            named = [i for i in sampling.logprob_token_ids if i < len(logits)]
            top = named_logprobs(kernels, logits, first, named).top
        notes = [TokenLogprobs(each, top) for each in (own.chosen, *own.top)]
    return [Candidate(i, value, note) for (i, value), note in zip(likeliest, notes, strict=True)]


@dataclass(slots=True)
class _Group:
    """beams: as many as hypotheses run; the first is the request itself. candidates: of those that were computed."""

    request: Request
    search: BeamSearch[Logprobs]
    beams: list[Request]
    candidates: dict[str, BeamCandidates] = field(default_factory=dict)


class BeamGroups:
    """All requests of an engine that are beam searches."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._groups: dict[str, _Group] = {}  # by request id
        self._group_of: dict[str, _Group] = {}  # by beam's id

    def add(self, request: Request) -> None:
        sampling = request.sampling
        search: BeamSearch[Logprobs] = BeamSearch(
            sampling.num_beams,
            request.max_tokens,
            request.stop_token_ids,
            sampling.length_penalty,
            sampling.early_stopping,
        )
        group = _Group(request, search, [request])
        self._groups[request.request_id] = self._group_of[request.request_id] = group

    def has(self, beam_id: str) -> bool:
        return beam_id in self._group_of

    def take(self, candidates: dict[str, BeamCandidates]) -> None:
        """What a step has brought; to be called when the scheduler has accounted for it."""
        for name, its in candidates.items():
            group = self._group_of[name]
            group.candidates[name] = its
            next(beam for beam in group.beams if beam.request_id == name).is_parked = True

    def advance(self) -> tuple[list[tuple[int, int]], list[EndedBeams], list[tuple[Request, RelevoError]]]:
        """Let all groups go on whose beams have been computed.

        Returns blocks to be copied before the next step (from, to); requests that are done; and those that can't go
        on. Neither has blocks any more.
        """
        copies: list[tuple[int, int]] = []
        ended: list[EndedBeams] = []
        failed: list[tuple[Request, RelevoError]] = []
        for request_id, group in list(self._groups.items()):
            if len(group.candidates) < len(group.beams):
                continue
            parents = group.search.advance([group.candidates[beam.request_id] for beam in group.beams])
            group.candidates.clear()
            if not group.search.is_done:
                copies += self._go_on(group, parents)
                continue
            best = group.search.best(group.request.sampling.n)
            if best:
                ended.append(EndedBeams(group.request, [_beam(group.request, hypothesis) for hypothesis in best]))
            else:
                failed.append((group.request, InvalidRequest("the parameters leave no token to go on with")))
            self.drop(request_id)
        return copies, ended, failed

    def drop(self, beam_id: str) -> Request | None:
        """End the search that this beam belongs to, and free its blocks; the request, or None if there is no such."""
        group = self._group_of.get(beam_id)
        if group is None:
            return None
        del self._groups[group.request.request_id]
        self._end(group.beams)
        return group.request

    def _go_on(self, group: _Group, parents: Sequence[int]) -> list[tuple[int, int]]:
        while len(group.beams) < len(parents):
            beam = _new_beam(group.request, len(group.beams))
            self._scheduler.add(beam)
            self._group_of[beam.request_id] = group
            group.beams.append(beam)
        token_ids = [hypothesis.token_ids[-1] for hypothesis in group.search.running]
        copies = reorder(self._scheduler, group.beams, parents, token_ids)
        self._end(group.beams[len(parents) :])
        del group.beams[len(parents) :]
        return copies

    def _end(self, beams: Iterable[Request]) -> None:
        for beam in beams:
            del self._group_of[beam.request_id]
            self._scheduler.abort(beam.request_id)


def _new_beam(request: Request, index: int) -> Request:
    """A place for a hypothesis, without tokens of its own or blocks yet."""
    return Request(
        request_id=f"{request.request_id}/beam-{index}",
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=replace(request.sampling, prompt_logprobs=None),
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        root_hash=request.root_hash,
        block_size=request.block_size,
        is_parked=True,
        num_preemptions=1,  # it is no new request: nobody is to hear that it was admitted
    )


def _beam(request: Request, hypothesis: Hypothesis[Logprobs]) -> Beam:
    stopped = hypothesis.token_ids[-1] in request.stop_token_ids
    return Beam(
        list(hypothesis.token_ids),
        [note for note in hypothesis.notes if note is not None],
        FinishReason.STOP if stopped else FinishReason.LENGTH,
        hypothesis.score,
    )
