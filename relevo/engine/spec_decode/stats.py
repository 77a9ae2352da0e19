"""What speculation has done since the start: plain numbers, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpecDecodeStats:
    """num_drafts: of requests, in how many steps they had drafts to be verified
    num_accepted_tokens_per_pos: how often the draft at this position was accepted; as many as there can be
    propose_seconds, verify_seconds: in the proposer, and in passes that verified drafts, with all other rows of theirs
    acceptance_length: mean over recent drafts of the tokens that a step brought with them, the one behind them
        included; 0: there were none
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    propose_seconds: float = 0.0
    verify_seconds: float = 0.0
    acceptance_length: float = 0.0


class StatsCounter:
    """Counts, and gives frozen copies."""

    MEMORY = 0.98  # of the mean acceptance length

    def __init__(self, max_drafts: int) -> None:
        self._per_pos = [0] * max_drafts
        self._num_drafts = self._num_tokens = self._num_accepted = 0
        self._propose_seconds = self._verify_seconds = 0.0
        self._length = 0.0
        self._stats: SpecDecodeStats | None = None

    def add_draft(self, num_drafts: int, num_accepted: int) -> None:
        self._stats = None
        self._num_drafts += 1
        self._num_tokens += num_drafts
        self._num_accepted += num_accepted
        for position in range(num_accepted):
            self._per_pos[position] += 1
        length = 1 + num_accepted
        self._length = length if self._length == 0.0 else self._length + (1 - self.MEMORY) * (length - self._length)

    def add_seconds(self, propose: float, verify: float) -> None:
        self._stats = None
        self._propose_seconds += propose
        self._verify_seconds += verify

    def stats(self) -> SpecDecodeStats:
        """Asked for with every step: the same one until something was counted."""
        if self._stats is None:
            self._stats = SpecDecodeStats(
                self._num_drafts,
                self._num_tokens,
                self._num_accepted,
                tuple(self._per_pos),
                self._propose_seconds,
                self._verify_seconds,
                self._length,
            )
        return self._stats
