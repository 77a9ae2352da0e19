from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relevo.core.prompt_budget import PromptBudget, PromptLimit
from relevo.core.prompt_costs import MANY, PromptCosts

PLAIN_SECONDS = 0.045


def chunk_seconds(position: int, num_tokens: int) -> float:
    """Of a model of half a billion parameters on two cores, roughly."""
    return 1.2e-3 * num_tokens + 1e-6 * position + 0.5e-6 * position * num_tokens


def read_prompt(
    costs: PromptCosts, begin: int, end: int, seconds_of: Callable[[int, int], float], rng: random.Random
) -> list[float]:
    """How many times as long as a plain step each took; they may take twice as long, less a fifth of the rest."""
    stretches = []
    position, saved = begin, 0.0
    while position < end:
        budget = PromptBudget(PromptLimit(costs, 0.8 * PLAIN_SECONDS), saved=saved)
        num_tokens = budget.fit(position, end - position)
        saved = budget.saved
        seconds = seconds_of(position, num_tokens) if num_tokens else 0.0
        stretches.append(1.0 + seconds / PLAIN_SECONDS)
        if num_tokens:
            held_up = 10 * PLAIN_SECONDS if rng.random() < 0.01 else 0.0
            costs.add([(position, num_tokens)], seconds * rng.uniform(0.9, 1.15) + held_up)
            position += num_tokens
    return sorted(stretches)


def test_no_step_takes_twice_as_long_whatever_the_prompts_position() -> None:
    """16,384 tokens after a few short ones; then one of which most is cached: the costs of both were learnt."""
    rng = random.Random(0)
    costs = PromptCosts()
    for _ in range(16):
        costs.add([(0, 32)], chunk_seconds(0, 32) + 0.5 * PLAIN_SECONDS, alone=True)
    for begin, end in ((0, 32), (0, 16_384), (0, 100), (0, 2000)):
        stretches = read_prompt(costs, begin, end, chunk_seconds, rng)
        assert stretches[-1] < 2.0, (begin, end, stretches[-5:])
    stretches = read_prompt(costs, 15_000, 16_384, chunk_seconds, rng)
    assert stretches[int(0.9 * len(stretches))] < 2.0 and stretches[-1] < 2.3


def test_where_reading_the_keys_takes_longer_than_may_be_steps_take_twice_as_long_on_average() -> None:
    rng = random.Random(0)
    costs = PromptCosts(token=1e-3)

    def slow(position: int, num_tokens: int) -> float:
        return chunk_seconds(position, num_tokens) + 8e-6 * position

    stretches = read_prompt(costs, 0, 16_384, slow, rng)
    assert sum(stretches) / len(stretches) < 2.0
    assert stretches[-1] < 1.1 + slow(16_384, 4) / PLAIN_SECONDS


def test_chunks_grow_step_by_step_where_only_small_ones_were_measured() -> None:
    costs = PromptCosts()
    for position in range(10_000, 10_100, 2):
        costs.add([(position, 2)], 0.03)
    chunks = []
    for _ in range(4):
        chunks.append(costs.num_tokens(0, 1.0))
        costs.add([(0, chunks[-1])], 0.001 * chunks[-1])
    assert chunks == [8, 20, 44, 92]


def test_costs_are_found_where_steps_tell_them_apart() -> None:
    rng = random.Random(1)
    costs = PromptCosts()
    for _ in range(1000):
        position, num_tokens = rng.randrange(20_000), rng.randrange(1, 64)
        costs.add([(position, num_tokens)], chunk_seconds(position, num_tokens))
    for position, num_tokens in ((0, 10), (1000, 1), (10_000, 50)):
        assert costs.seconds(position, num_tokens) == pytest.approx(chunk_seconds(position, num_tokens), rel=0.05)


SECONDS = st.just(0.0) | st.floats(1e-9, 1e-2)


@given(SECONDS, SECONDS, SECONDS, st.integers(0, 100_000), st.floats(1e-6, 1))
def test_as_many_tokens_as_fit(token: float, pair: float, key: float, position: int, seconds: float) -> None:
    costs = PromptCosts(token, pair, key)
    num_tokens = costs.num_tokens(position, seconds)
    if num_tokens:
        assert costs.seconds(position, num_tokens) <= seconds * (1 + 1e-6) or not costs.is_known
    if num_tokens < MANY:
        assert costs.seconds(position, num_tokens + 1) >= seconds * (1 - 1e-6)


@given(st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 512), st.floats(-1, 10), st.booleans()), max_size=40))
def test_costs_stay_known_and_not_negative(steps: list[tuple[int, int, float, bool]]) -> None:
    costs = PromptCosts()
    for position, num_tokens, seconds, alone in steps:
        was_known = costs.is_known
        costs.add([(position, num_tokens)], seconds, alone=alone)
        assert costs.is_known >= was_known
        assert costs.seconds(position, 1) >= 0.0 and costs.smallest(position) in range(1, 5)
