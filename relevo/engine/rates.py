"""What an engine measures on itself while it serves: for placement, and for how much of a prompt a step may take."""

from __future__ import annotations

import math

from relevo.core.prompt_budget import PromptLimit
from relevo.core.prompt_costs import PromptCosts
from relevo.core.schedule import SchedulerOutput
from relevo.core.step_times import StepTimes

STRETCH_MARGIN = 0.8  # of what a step may be stretched by: the slowest steps count, not the usual ones
RATE_WEIGHT = 0.1  # of the newest measurement in the means


class EngineRates:
    """step_stretch: how many times as long as a plain step one may take that prompts share; inf: as it comes"""

    def __init__(self, block_size: int, step_stretch: float) -> None:
        self.prefill_tokens_per_second = 0.0  # 0 = not measured yet
        self.step_times = StepTimes()
        self.prompt_costs = PromptCosts()
        self.step_stretch = step_stretch
        self._block_size = block_size

    @property
    def prompt_limit(self) -> PromptLimit | None:
        """See Scheduler."""
        plain_seconds = self.step_times.step_seconds
        if not plain_seconds or not self.prompt_costs.is_known or self.step_stretch == math.inf:
            return None
        return PromptLimit(self.prompt_costs, STRETCH_MARGIN * (self.step_stretch - 1.0) * plain_seconds)

    def measure(self, output: SchedulerOutput, num_sampled_tokens: int, seconds: float) -> None:
        """Account for a step that took so long."""
        if not output.scheduled:
            return
        num_rows = sum(entry.num_known_tokens for entry in output.scheduled)
        # Chunks worth the name: the tail of a split request is a handful of rows and says nothing of a prompt's speed.
        has_chunk = num_rows >= len(output.scheduled) + 2 * self._block_size
        if has_chunk:
            self.prefill_tokens_per_second = _mean(self.prefill_tokens_per_second, num_rows / seconds)
        elif num_rows == len(output.scheduled) <= num_sampled_tokens:
            # What a token takes: those that come of accepted drafts take no step of their own.
            self.step_times.add(num_rows, seconds * num_rows / num_sampled_tokens)
        if num_rows == output.num_scheduled_tokens:  # drafts take time as well
            self._measure_prompts(output, has_chunk, seconds)

    def _measure_prompts(self, output: SchedulerOutput, has_chunk: bool, seconds: float) -> None:
        chunks = [
            (entry.start, entry.num_scheduled_tokens)
            for entry in output.scheduled
            if entry.num_scheduled_tokens > 1 or not entry.samples
        ]
        num_decoding = len(output.scheduled) - len(chunks)
        if not chunks:
            return
        if num_decoding == 0 and has_chunk:
            self.prompt_costs.add(chunks, seconds, alone=True)
        elif num_decoding and self.step_times.step_seconds:
            self.prompt_costs.add(chunks, seconds - self.step_times.seconds(num_decoding))


def _mean(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + RATE_WEIGHT * (value - mean)
