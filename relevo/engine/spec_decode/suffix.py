"""Suffix decoding (Oliaro et al. 2024): how the text's end went on before, here or in recent answers to others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from relevo.core.block_hash import BlockHash
from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest
from relevo.engine.spec_decode.suffix_automaton import ROOT, SuffixAutomaton

MIN_MATCH = 2  # tokens
TOKENS_A_STEP = 1024  # that all requests together put into their automata: some milliseconds
MAX_OWN_TOKENS = 16_384  # of a request's text, when it begins; a token takes about 700 bytes
ANSWERS_TOKENS = 16_384  # of a salt's recent answers: then they become the older half, and the older half goes
MAX_SHARED_TOKENS = 131_072  # of all salts: those go first that were not used for the longest time


class Answers:
    """Recent answers to requests of one salt, in two halves, so that the older can be dropped."""

    def __init__(self) -> None:
        self.halves = [SuffixAutomaton(), SuffixAutomaton()]  # older, newer
        self.num_turns = 0
        self._new: deque[list[int]] = deque()  # not yet in: that takes milliseconds, and waits until somebody asks
        self._num_new = 0
        self._separators = count(-1, -1)  # each is unique: no match goes across two answers

    @property
    def num_tokens(self) -> int:
        return sum(half.num_tokens for half in self.halves) + self._num_new

    def add(self, token_ids: Sequence[int]) -> None:
        """To be taken in."""
        self._new.append(list(token_ids[-ANSWERS_TOKENS:]))
        self._num_new += len(self._new[-1])
        while self._num_new > ANSWERS_TOKENS:
            self._num_new -= len(self._new.popleft())

    def take_in(self, budget: int) -> int:
        """New answers, one at least where the budget is not spent; returns their tokens."""
        num_taken = 0
        while self._new and num_taken < budget:
            token_ids = self._new.popleft()
            self._num_new -= len(token_ids)
            num_taken += len(token_ids)
            self._append(token_ids)
        return num_taken

    def _append(self, token_ids: Sequence[int]) -> None:
        if self.halves[1].num_tokens >= ANSWERS_TOKENS:
            self.halves = [self.halves[1], SuffixAutomaton()]
            self.num_turns += 1
        self.halves[1].extend([*token_ids, next(self._separators)])


@dataclass(slots=True)
class _Matches:
    """A request's own text, and where its end is found in the answers: (state, length) in each half."""

    own: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    num_taken: int = 0  # tokens of the request that are in
    shared: list[tuple[int, int]] = field(default_factory=lambda: [(ROOT, 0), (ROOT, 0)])
    num_turns: int = 0  # of the answers, when they were matched


class SuffixProposer:
    """What others were answered is looked at within one cache_salt only: the root of the block names tells."""

    def __init__(self) -> None:
        self._matches: dict[str, _Matches] = {}
        self._answers: OrderedDict[BlockHash, Answers] = OrderedDict()

    def propose(self, entries: Sequence[ScheduledRequest]) -> list[list[int]]:
        budget = TOKENS_A_STEP
        proposed: list[list[int]] = []
        for entry in entries:
            if not entry.num_draft_slots:
                proposed.append([])
                continue
            request = entry.request
            matches = self._matches.get(request.request_id)
            if matches is None:
                matches = self._matches[request.request_id] = _Matches(
                    num_taken=max(0, request.num_tokens - MAX_OWN_TOKENS)
                )
            answers = self._answers_to(request)
            budget = max(0, budget - answers.take_in(budget))
            budget -= self._take_in(matches, answers, request.token_ids, budget)
            is_current = matches.num_taken == request.num_tokens
            proposed.append(_best_continuation(matches, answers, entry.num_draft_slots) if is_current else [])
        return proposed

    def lag(self, request: Request) -> int:
        return 0

    def verified(self, entry: ScheduledRequest, num_accepted: int) -> None:
        pass

    def ended(self, request: Request) -> None:
        self._answers_to(request).add(request.output_token_ids)
        while len(self._answers) > 1 and sum(a.num_tokens for a in self._answers.values()) > MAX_SHARED_TOKENS:
            self._answers.popitem(last=False)

    def forget(self, request_id: str) -> None:
        self._matches.pop(request_id, None)

    def _answers_to(self, request: Request) -> Answers:
        answers = self._answers.get(request.root_hash)
        if answers is None:
            answers = self._answers[request.root_hash] = Answers()
        self._answers.move_to_end(request.root_hash)
        return answers

    def _take_in(self, matches: _Matches, answers: Answers, token_ids: Sequence[int], budget: int) -> int:
        """The tokens that are new, at most so many; returns how many."""
        if matches.num_turns != answers.num_turns:  # the newer half is the older one now
            matches.shared = (
                [matches.shared[1], (ROOT, 0)] if answers.num_turns == matches.num_turns + 1 else [(ROOT, 0)] * 2
            )
            matches.num_turns = answers.num_turns
        new = token_ids[matches.num_taken : matches.num_taken + budget]
        matches.own.extend(new)
        matches.num_taken += len(new)
        for at, half in enumerate(answers.halves):
            state, length = matches.shared[at]
            for token_id in new:
                state, length = half.advance(state, length, token_id)
            matches.shared[at] = state, length
        return len(new)


def _best_continuation(matches: _Matches, answers: Answers, num_tokens: int) -> list[int]:
    """Behind the longest match; of equals the request's own."""
    state, length = matches.own.repeated_suffix()
    automaton = matches.own
    for half, (shared_state, shared_length) in zip(answers.halves, matches.shared, strict=True):
        if shared_length > length:
            automaton, state, length = half, shared_state, shared_length
    return automaton.continuation(state, num_tokens) if length >= MIN_MATCH else []
