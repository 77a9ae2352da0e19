"""What prompts may take of a step in which others decode."""

from __future__ import annotations

from dataclasses import dataclass

from relevo.core.prompt_costs import PromptCosts


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """seconds: that prompts may add to a step"""

    costs: PromptCosts
    seconds: float


class PromptBudget:
    """Of one step.

    Where not one token of a prompt fits, its keys being too many to be read in that time, it saves up over steps for
    the smallest chunk that is worth reading them: so steps take no longer than they may at least on average.

    limit: None: as much as comes
    factor: of the limit's seconds
    saved: by the step before
    """

    def __init__(self, limit: PromptLimit | None, factor: float = 1.0, saved: float = 0.0) -> None:
        self._limit = limit
        self._seconds = limit.seconds * factor if limit is not None else 0.0
        self._saved = saved
        self._missing = 0.0  # what the chunk takes that is saved up for

    @property
    def saved(self) -> float:
        """For the next step."""
        return min(self._saved, self._missing)

    def completes(self, position: int, num_tokens: int) -> bool:
        """Whether all of a prompt's tokens from this position on fit."""
        return self._limit is None or self._limit.costs.num_tokens(position, self._seconds) >= num_tokens

    def fit(self, position: int, num_tokens: int, share: float = 1.0) -> int:
        """How many of the tokens fit into a share of what is left; where none does, that share is saved."""
        if self._limit is None:
            return num_tokens
        costs, part = self._limit.costs, share * self._seconds
        fitting = min(costs.num_tokens(position, part), num_tokens)
        if fitting > 0 or num_tokens == 0:
            return fitting
        smallest = min(costs.smallest(position), num_tokens)
        seconds = costs.seconds(position, smallest)
        if seconds <= self._saved + part:
            return smallest
        if not self._missing:
            self._missing = seconds
            self._saved += part
            self._seconds -= part
        return 0

    def take(self, position: int, num_tokens: int) -> None:
        """Account for tokens that are computed in the step."""
        if self._limit is not None:
            left = self._seconds - self._limit.costs.seconds(position, num_tokens)
            self._seconds = max(0.0, left)
            self._saved = max(0.0, self._saved + min(0.0, left))
