"""What an engine measures on itself while it serves: for placement, and for how much of a prompt a step may take."""

from __future__ import annotations

import math

from relevo.core.schedule import SchedulerOutput
from relevo.core.step_times import StepTimes

MIN_PROMPT_TOKENS = 4  # in a step that tells what they cost
STRETCH_MARGIN = 0.8  # of what a step may be stretched by: the slowest steps count, not the usual ones
RATE_WEIGHT = 0.1  # of the newest measurement in the means


class EngineRates:
    """step_stretch: how many times as long as a plain step one may take that prompts share; inf: as it comes"""

    def __init__(self, block_size: int, step_stretch: float) -> None:
        self.prefill_tokens_per_second = 0.0  # 0 = not measured yet
        self.step_times = StepTimes()
        self._block_size = block_size
        self.step_stretch = step_stretch
        self._prompt_token_seconds = 0.0  # what one more token of a prompt adds to a step in which others decode
        self.prompt_tokens_per_step: float | None = None  # see Scheduler

    def measure(self, output: SchedulerOutput, num_sampled_tokens: int, seconds: float) -> None:
        """Account for a step that took so long."""
        if not output.scheduled:
            return
        num_rows = sum(entry.num_known_tokens for entry in output.scheduled)
        # Chunks worth the name: the tail of a split request is a handful of rows and says nothing of a prompt's speed.
        if num_rows >= len(output.scheduled) + 2 * self._block_size:
            self.prefill_tokens_per_second = _mean(self.prefill_tokens_per_second, num_rows / seconds)
        elif num_rows == len(output.scheduled) <= num_sampled_tokens:
            # What a token takes: those that come of accepted drafts take no step of their own.
            self.step_times.add(num_rows, seconds * num_rows / num_sampled_tokens)
        if num_rows == output.num_scheduled_tokens:  # drafts take time as well
            self._measure_stretch(output, seconds)

    def _measure_stretch(self, output: SchedulerOutput, seconds: float) -> None:
        """How many tokens of prompts stretch a step by as much as it may be stretched."""
        plain_seconds = self.step_times.step_seconds
        num_decoding = sum(entry.num_scheduled_tokens == 1 for entry in output.scheduled)
        num_prompt_tokens = output.num_scheduled_tokens - num_decoding
        if not plain_seconds or not self.prefill_tokens_per_second or self.step_stretch == math.inf:
            return
        if num_decoding and num_prompt_tokens >= MIN_PROMPT_TOKENS:
            # A step that was quick by chance must not let in a prompt as a whole.
            token_seconds = max(seconds - plain_seconds, 0.1 * plain_seconds) / num_prompt_tokens
            self._prompt_token_seconds = _mean(self._prompt_token_seconds, token_seconds)
        token_seconds = max(self._prompt_token_seconds, 1.0 / self.prefill_tokens_per_second)
        stretch_seconds = STRETCH_MARGIN * (self.step_stretch - 1.0) * plain_seconds
        self.prompt_tokens_per_step = stretch_seconds / token_seconds


def _mean(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + RATE_WEIGHT * (value - mean)
