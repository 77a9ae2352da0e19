"""Beam search: which hypotheses go on, and which are done. Step by step what transformers' beam search does.

The standard library only; whoever runs the model brings each running hypothesis' likeliest next tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

EarlyStopping = bool | Literal["never"]
Note = TypeVar("Note")  # what the caller wants to know of each token: its logprobs


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Note]):
    token_id: int
    logprob: float
    note: Note


@dataclass(frozen=True, slots=True)
class Hypothesis(Generic[Note]):
    """score: sum of its tokens' log-probabilities; once it is done, divided by its length ** length_penalty"""

    token_ids: tuple[int, ...] = ()
    score: float = 0.0
    notes: tuple[Note, ...] = ()


@dataclass(slots=True)
class BeamSearch(Generic[Note]):
    """running: the hypotheses that go on, the best first; one without tokens before the first step.

    finished: those that are done, the best first
    """

    num_beams: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    running: list[Hypothesis[Note]] = field(default_factory=lambda: [Hypothesis()])
    finished: list[Hypothesis[Note]] = field(default_factory=list)
    is_done: bool = False

    @property
    def num_candidates(self) -> int:
        """Of each running hypothesis: so many that num_beams go on though all stop tokens are among them."""
        return num_candidates(self.num_beams, len(self.stop_token_ids))

    def advance(self, candidates: Sequence[Sequence[Candidate[Note]]]) -> list[int]:
        """One step: candidates[i] are what may follow running[i], the likeliest first.

        Afterwards running has the new hypotheses; of each the place that its beginning had there before is returned.
        """
        assert not self.is_done and len(candidates) == len(self.running)
        merged = [
            (hypothesis.score + each.logprob, parent, each)
            for parent, (hypothesis, its) in enumerate(zip(self.running, candidates, strict=True))
            for each in its
        ]
        merged.sort(key=lambda item: -item[0])
        parents: list[int] = []
        following: list[Hypothesis[Note]] = []
        ended: list[Hypothesis[Note]] = []
        length = len(self.running[0].token_ids) + 1
        for rank, (score, parent, each) in enumerate(merged[: self.num_candidates]):
            before = self.running[parent]
            after = Hypothesis((*before.token_ids, each.token_id), score, (*before.notes, each.note))
            if length >= self.max_tokens or each.token_id in self.stop_token_ids:
                if rank < self.num_beams:
                    ended.append(after)
            elif len(following) < self.num_beams:
                following.append(after)
                parents.append(parent)
        self._finish(ended, length)
        best_running = following[0].score if following else -math.inf
        self.running = following
        self.is_done = not following or self._is_decided(best_running, length)
        return parents

    def best(self, count: int) -> list[Hypothesis[Note]]:
        """The best that are done; where they are too few, running ones after them."""
        rest = [self._scored(hypothesis) for hypothesis in self.running if hypothesis.token_ids]
        return [*self.finished, *rest][:count]

    @property
    def _is_full(self) -> bool:
        return len(self.finished) == self.num_beams

    def _finish(self, ended: Sequence[Hypothesis[Note]], length: int) -> None:
        if self._is_full and self.early_stopping is True:
            return
        merged = [*self.finished, *map(self._scored, ended)]
        merged.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equals those that were done first
        self.finished = merged[: self.num_beams]

    def _scored(self, hypothesis: Hypothesis[Note]) -> Hypothesis[Note]:
        length = len(hypothesis.token_ids)
        return Hypothesis(hypothesis.token_ids, hypothesis.score / length**self.length_penalty, hypothesis.notes)

    def _is_decided(self, best_running: float, length: int) -> bool:
        if not self._is_full:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0.0:
            length = self.max_tokens
        best_possible: float = best_running / length**self.length_penalty
        return best_possible <= self.finished[-1].score


def num_candidates(num_beams: int, num_stop_token_ids: int) -> int:
    return max(2, 1 + num_stop_token_ids) * num_beams
