"""The draw itself: where its one random number comes from, what filters leave, and what it picks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from relevo.engine.sampling_math import uniform
from relevo.kernels.sampling import PROBABILITY_UNITS, draw, filtered_weights
from tests.support.statistics import chi_squared_pvalue, uniform_pvalue

LARGEST_UNIFORM = 1.0 - 2.0**-53


def kept(logits: torch.Tensor, **filters: float) -> set[int]:
    values = {name: [value] for name, value in filters.items()}
    weights = filtered_weights(logits.unsqueeze(0), [1.0], **values)  # type: ignore[arg-type]
    return set(weights[0].nonzero().flatten().tolist())


def kept_by_transformers(warper: object, logits: torch.Tensor) -> set[int]:
    filtered = warper(torch.tensor([[0]]), logits.unsqueeze(0).clone())  # type: ignore[operator]
    return set(filtered[0].isfinite().nonzero().flatten().tolist())


def nucleus(logits: torch.Tensor, top_p: float) -> set[int]:
    """Written down from the definition, in float64."""
    probs = logits.double().softmax(-1).tolist()
    chosen: set[int] = set()
    mass = 0.0
    for token_id in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if mass >= top_p:
            break
        chosen.add(token_id)
        mass += probs[token_id]
    return chosen


def test_uniform_is_splitmix64() -> None:
    """The first outputs of SplitMix64 seeded with 1234567, from its reference implementation."""
    from relevo.engine.sampling_math import _GOLDEN_GAMMA, _mix64

    outputs = [_mix64(1234567 + (i + 1) * _GOLDEN_GAMMA) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_uniform_over_positions(seed: int) -> None:
    """Kolmogorov-Smirnov at 1e-4: a good generator fails one of these cases once in 3000 choices of seeds."""
    values = [uniform(seed, position) for position in range(20_000)]
    assert uniform_pvalue(values) > 1e-4
    assert min(values) >= 0.0 and max(values) < 1.0


@pytest.mark.parametrize("position", [0, 1, 4095])
def test_uniform_over_seeds(position: int) -> None:
    """As above, over neighbouring seeds."""
    assert uniform_pvalue([uniform(seed, position) for seed in range(20_000)]) > 1e-4


@pytest.mark.parametrize(("seed_step", "position_step"), [(1, 0), (0, 1), (1, 1), (1, -1)])
def test_neighbours_are_independent(seed_step: int, position_step: int) -> None:
    """Chi-squared on a 16 x 16 grid of neighbouring pairs, at 1e-4 (255 degrees of freedom)."""
    grid = torch.zeros(16, 16)
    for seed in range(150):
        for position in range(1, 151):
            here, there = uniform(seed, position), uniform(seed + seed_step, position + position_step)
            grid[int(here * 16), int(there * 16)] += 1
    assert chi_squared_pvalue(grid.flatten(), torch.full((grid.numel(),), float(grid.double().mean()))) > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 600), st.floats(0.1, 8.0), st.data())
def test_filters_keep_what_transformers_keeps(seed: int, vocab: int, spread: float, data: st.DataObject) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    top_k = data.draw(st.integers(1, vocab + 5))
    assert kept(logits, top_k=top_k) <= kept_by_transformers(TopKLogitsWarper(top_k), logits)
    assert len(kept(logits, top_k=top_k)) == min(
        top_k, int((logits.softmax(-1) * PROBABILITY_UNITS).floor().count_nonzero())
    )
    min_p = data.draw(st.floats(0.001, 1.0))
    assert kept(logits, min_p=min_p) == kept_by_transformers(MinPLogitsWarper(min_p), logits)
    # transformers adds up float32 from the small end: at the border of the nucleus it may be off by one token.
    top_p = data.draw(st.floats(0.01, 0.999))
    assert kept(logits, top_p=top_p) == nucleus(logits, top_p)
    assert len(kept(logits, top_p=top_p) ^ kept_by_transformers(TopPLogitsWarper(top_p), logits)) <= 1


def test_temperature_scales_before_the_filters() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1]])
    weights = filtered_weights(probs.log(), [0.5])[0]
    expected = torch.tensor([0.36, 0.09, 0.01], dtype=torch.float64) / 0.46
    torch.testing.assert_close(weights / weights.sum(), expected, rtol=1e-6, atol=0.0)


def test_filters_apply_in_order_each_to_the_rest_of_the_one_before() -> None:
    """top_k 2 leaves 0.5 and 0.3, of which the first alone holds 0.625: enough for top_p 0.6, not without top_k."""
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    assert kept(logits, top_k=2, top_p=0.6) == {0}
    assert kept(logits, top_p=0.6) == {0, 1}
    assert kept(logits, min_p=0.5, top_p=0.6) == {0}


def test_ties_at_the_border() -> None:
    """top_k keeps equals (as transformers and vLLM do); top_p keeps the fewest, the lowest ids."""
    logits = torch.zeros(4)
    assert kept(logits, top_k=2) == {0, 1, 2, 3}
    assert kept(logits, top_p=0.5) == {0, 1}
    assert kept(logits, top_p=0.51) == {0, 1, 2}
    assert kept(torch.tensor([0.0, 5.0, 0.0, 5.0]), top_p=1e-6) == {1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(1, 99))
def test_nucleus_of_tied_probabilities(levels: list[int], percent: int) -> None:
    """Powers of two: every probability is exact, and most are tied. The nucleus counts in whole numbers here."""
    mass = [2**level for level in levels]
    chosen: set[int] = set()
    for token_id in sorted(range(len(mass)), key=lambda i: (-mass[i], i)):
        if sum(mass[i] for i in chosen) * 100 >= percent * sum(mass):
            break
        chosen.add(token_id)
    # A hair below the percentage, so that a rounded quotient does not ask for one token more.
    assert kept(torch.tensor(mass).log2() * math.log(2.0), top_p=percent / 100 - 1e-6) == chosen


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 0, 1, 2, 2**30, 2**50]), min_size=1, max_size=50), st.data())
def test_draw_never_picks_an_excluded_token(weights: list[int], data: st.DataObject) -> None:
    if sum(weights) == 0:
        weights[data.draw(st.integers(0, len(weights) - 1))] = 1
    u = data.draw(st.sampled_from([0.0, 2.0**-53, 0.5, LARGEST_UNIFORM]) | st.floats(0.0, LARGEST_UNIFORM))
    token_id = int(draw(torch.tensor([weights], dtype=torch.float64), [u]))
    assert weights[token_id] > 0


def test_draw_is_two_races_with_numbers_of_the_rows_hash() -> None:
    """In plain integers and floats: the first of exponential waiting times, of blocks and then of tokens."""
    generator = torch.Generator().manual_seed(3)
    weights = (torch.rand(20, 150, generator=generator, dtype=torch.float64) * 1e6).floor() + 1

    def waiting_time(u: float, runner: int) -> float:
        z = ((int(u * 2**53) << 11) + (runner + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return -math.log((((z ^ (z >> 31)) >> 11) + 0.5) / 2**53)

    uniforms = [uniform(7, position) for position in range(20)]
    for row, u, token_id in zip(weights.tolist(), uniforms, draw(weights, uniforms).tolist(), strict=True):
        block = min(range(3), key=lambda b: waiting_time(u, b) / sum(row[64 * b : 64 * b + 64]))
        tokens = range(64 * block, min(64 * block + 64, 150))
        assert token_id == min(tokens, key=lambda i: waiting_time(u, 2**32 + i) / row[i])


def test_distributions_that_are_alike_mostly_draw_the_same() -> None:
    """At least (1 - d) / (1 + d) for each stage, d the total variation distance: what a draft model lives on."""
    generator = torch.Generator().manual_seed(5)
    p = torch.rand(1, 640, generator=generator, dtype=torch.float64) ** 4
    q = p * torch.exp(0.3 * torch.randn(1, 640, generator=generator, dtype=torch.float64))
    p, q = p / p.sum(), q / q.sum()
    distance = float((p - q).abs().sum() / 2)
    uniforms = [uniform(1, position) for position in range(20_000)]
    drawn = [draw((w * 2**50).floor().expand(20_000, -1), uniforms) for w in (p, q)]
    share = float((drawn[0] == drawn[1]).double().mean())
    assert share > (1 - distance) / (1 + distance) - 0.05


def test_draws_follow_the_probabilities() -> None:
    """Chi-squared at 1e-4 over 40 000 draws: seeds are fixed, so it passes always or never."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(12, generator=generator)
    temperature, top_k, top_p = 0.8, 9, 0.9
    expected = (logits / temperature).double().softmax(-1)
    order = expected.argsort(descending=True)
    expected[order[top_k:]] = 0.0
    expected /= expected.sum()
    outside = set(range(12)) - nucleus(expected.log(), top_p)
    expected[list(outside)] = 0.0
    expected /= expected.sum()

    num_draws = 40_000
    weights = filtered_weights(logits.unsqueeze(0), [temperature], top_k=[top_k], top_p=[top_p])
    uniforms = [uniform(seed, position) for seed in range(200) for position in range(num_draws // 200)]
    counts = draw(weights.expand(num_draws, -1), uniforms).bincount(minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chi_squared_pvalue(counts[possible], expected[possible] * num_draws) > 1e-4
