"""Whether drafts pay, by the clock: sure of it, or not."""

from __future__ import annotations

import random

from relevo.engine.spec_decode.payoff import Payoff
from relevo.engine.spec_decode.trial import CATCH_UP_STEPS, MAX_LOSS, Trial

PLAIN = 0.001


def measured(gain: float, noise: float, *, num_steps: int = 100) -> Payoff:
    numbers = random.Random(4)
    payoff = Payoff()
    for at in range(num_steps):
        if at % 4 == 0:
            payoff.add_plain(PLAIN, PLAIN * numbers.uniform(1 - noise, 1 + noise))
        payoff.add_drafts(PLAIN, PLAIN, PLAIN / gain * numbers.uniform(1 - noise, 1 + noise), 0.0)
    return payoff


def test_a_gain_that_may_be_chance_is_none() -> None:
    assert measured(1.1, noise=0.02).is_sure and measured(1.5, noise=0.4).is_sure
    assert not measured(1.0, noise=0.02).is_sure and not measured(0.95, noise=0.4).is_sure
    noisy = measured(1.06, noise=0.9, num_steps=40)
    assert not noisy.is_sure or (noisy.gain or 0.0) > 1.15  # then its own error is small beside it
    assert not measured(3.0, noise=0.0, num_steps=10).is_sure  # too few steps


def test_what_plain_steps_took_long_ago_does_not_make_drafts_look_good() -> None:
    """The machine was held up, and no longer is: drafts bring nothing, which some 30 plain steps among them show."""
    payoff = Payoff()
    for _ in range(500):
        payoff.add_plain(PLAIN, 1.3 * PLAIN)
    sure = []
    for at in range(600):
        if at % 12 == 0:
            payoff.add_plain(PLAIN, PLAIN)
        payoff.add_drafts(PLAIN, PLAIN, PLAIN, 0.0)
        sure.append(payoff.is_sure)
    assert not any(sure[400:])


def test_another_trial_soon_weighs_more_than_all_before() -> None:
    payoff = measured(0.8, noise=0.1, num_steps=1000)
    payoff.begin_trial()
    for _ in range(16):
        payoff.add_drafts(PLAIN, PLAIN, PLAIN / 1.5, 0.0)
    assert payoff.is_sure


def test_a_trial_ends_when_it_has_lost_too_much_and_catching_up_is_no_loss() -> None:
    trial = Trial()
    trial.begin()
    for _ in range(CATCH_UP_STEPS):
        trial.add(-100.0)
    assert not trial.has_failed(1.0)
    trial.add(-MAX_LOSS - 0.1)
    assert trial.has_failed(1.0) and not trial.has_failed(2.0)
    trial.end()
    assert not trial.has_failed(1.0)
