"""What steps with drafts bring against steps without, by the clock: all that a step takes counts, modelled or not."""

from __future__ import annotations

import math

MEMORY = 0.99  # of older steps, after each
TRIAL_STEPS = 4  # that all older trials stand for, when another begins
MIN_PLAIN_STEPS, MIN_DRAFT_STEPS = 8, 16  # before the two are compared
MIN_GAIN = 1.02  # for the machine itself becomes faster and slower
MAX_RATIO = 3.0  # a step that took longer than so many times the mean was held up by something else


class _Mean:
    """Work a second, and how sure that is."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._stands_for = 0  # steps
        self._work = self._seconds = 0.0  # of a step
        self._variance = 0.0  # of the mean seconds

    @property
    def rate(self) -> float:
        return self._work / self._seconds

    @property
    def error(self) -> float:
        """One standard error, as a share of the rate."""
        return math.sqrt(self._variance) / self._seconds

    def add(self, work: float, seconds: float, num_passed: int = 1) -> None:
        """num_passed: steps since the last that was added, itself included"""
        self.num_steps += 1
        self._stands_for += 1
        weight = max(1 - MEMORY**num_passed, 1 / self._stands_for)
        self._work += weight * (work - self._work)
        self._seconds += weight * (seconds - self._seconds)
        self._variance = (1 - weight) ** 2 * self._variance + (weight * (seconds - work / self.rate)) ** 2

    def discount(self, num_steps: int) -> None:
        """Let it stand for so many steps at most."""
        self._stands_for = min(self._stands_for, num_steps)


class Payoff:
    """Of batches of about one size.

    Work is in seconds: what plain passes that bring as many tokens should take. So batches that differ a little in
    their size can be compared. Plain steps also fade as others go by: what the machine did long ago is no measure.
    """

    def __init__(self) -> None:
        self._plain, self._drafts = _Mean(), _Mean()
        self._num_since_plain = 0

    @property
    def knows_plain(self) -> bool:
        return self._plain.num_steps >= MIN_PLAIN_STEPS

    @property
    def gain(self) -> float | None:
        """Tokens a second with drafts by those without. None: too few steps say."""
        if not self.knows_plain or self._drafts.num_steps < MIN_DRAFT_STEPS:
            return None
        return self._drafts.rate / self._plain.rate

    @property
    def is_sure(self) -> bool:
        """Whether drafts bring more than none, chance aside."""
        gain = self.gain
        return gain is not None and gain * (1 - math.hypot(self._plain.error, self._drafts.error)) >= MIN_GAIN

    def begin_trial(self) -> None:
        self._drafts.discount(TRIAL_STEPS)

    def add_plain(self, work: float, seconds: float) -> None:
        if self._plain.num_steps:
            seconds = min(seconds, MAX_RATIO * work / self._plain.rate)
        self._plain.add(work, seconds, self._num_since_plain + 1)
        self._num_since_plain = 0

    def add_drafts(self, work: float, plain_work: float, seconds: float, propose_seconds: float) -> float:
        """plain_work: of the same step without drafts. Returns the seconds that the drafts have saved, or cost."""
        seconds = min(seconds, MAX_RATIO * plain_work / self._plain.rate + propose_seconds)
        self._num_since_plain += 1
        self._drafts.add(work, seconds)
        return work / self._plain.rate - seconds
