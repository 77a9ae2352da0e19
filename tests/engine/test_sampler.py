"""Rows of any parameters in one batch: each gets the token that its own parameters, seed and position say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import SamplingParams
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.logits_processing import process as process_rows
from relevo.engine.sampler import BadLogits, SampledToken, Sampler
from relevo.kernels import Kernels, load_backend
from tests.support.statistics import chi_squared_pvalue
from tests.support.triton_interpreter import takes_long

EOS = 2


def make_row(prompt: Sequence[int] = (0,), output: Sequence[int] = (), **params: Any) -> SamplingRow:
    params = {"seed": 0, "max_tokens": None, **params}
    return SamplingRow(SamplingParams(**params), [*prompt, *output], len(prompt), (EOS,))


def make_logits(n: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


def sample(kernels: Kernels, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """No row fails."""
    tokens = Sampler(logits.shape[1], "cpu", kernels).sample(logits, rows)
    assert all(isinstance(token, SampledToken) for token in tokens), tokens
    return [token for token in tokens if isinstance(token, SampledToken)]


def choose(kernels: Kernels, logits: list[float] | torch.Tensor, row: SamplingRow) -> int:
    return sample(kernels, torch.as_tensor(logits, dtype=torch.float32).unsqueeze(0), [row])[0].token_id


def process(kernels: Kernels, logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    return process_rows(logits, [row], kernels)[0]


def processed(kernels: Kernels, logits: list[float], row: SamplingRow) -> list[float]:
    result: list[float] = process(kernels, torch.tensor([logits]), row)[0].tolist()
    return result


ROW_PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "presence_penalty": st.sampled_from([0.0, -0.4]),
        "logit_bias": st.sampled_from([{}, {3: 5.0, 4: -100.0}]),
        "min_tokens": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=40, deadline=None)
@given(
    params=st.lists(ROW_PARAMS, min_size=1, max_size=9),
    vocab=st.sampled_from([7, 130, 4099]),
    random=st.randoms(),
    logits_seed=st.integers(0, 99),
)
def test_token_does_not_depend_on_the_rest_of_the_batch(
    backend: str, params: list[dict[str, Any]], vocab: int, random: Any, logits_seed: int
) -> None:
    check_alone_and_together(load_backend(backend, "cpu"), params, vocab, random, logits_seed)


@settings(max_examples=8, deadline=None)
@given(params=st.lists(ROW_PARAMS, min_size=1, max_size=3), random=st.randoms(), logits_seed=st.integers(0, 99))
def test_token_does_not_depend_on_the_rest_of_the_batch_with_triton(
    params: list[dict[str, Any]], random: Any, logits_seed: int
) -> None:
    check_alone_and_together(load_backend("triton", "cpu"), params, 130, random, logits_seed)


def check_alone_and_together(
    kernels: Kernels, params: list[dict[str, Any]], vocab: int, random: Any, logits_seed: int
) -> None:
    rows = [
        make_row(random.choices(range(7), k=4), random.choices(range(7), k=random.randrange(5)), **p) for p in params
    ]
    logits = make_logits(len(rows), vocab, logits_seed)
    sampler = Sampler(vocab, "cpu", kernels)
    together = sampler.sample(logits, rows)
    assert [sampler.sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == together
    order = random.sample(range(len(rows)), random.randint(1, len(rows)))
    assert sampler.sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_rows_beyond_one_part_of_the_draw_get_their_own_token(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, rows = make_logits(30, 50), [make_row(seed=i) for i in range(30)]
    sampler = Sampler(50, "cpu", kernels)
    whole = sampler.sample(logits, rows)
    monkeypatch.setattr("relevo.kernels.sampling.DRAW_ELEMENTS", 4 * 50)
    assert sampler.sample(logits, rows) == whole


def test_seed_and_position_choose_the_token(kernels: Kernels) -> None:
    n = 40 if takes_long(kernels) else 200
    logits = torch.zeros(n, 1000)
    by_seed = [token.token_id for token in sample(kernels, logits, [make_row(seed=i) for i in range(n)])]
    by_position = [token.token_id for token in sample(kernels, logits, [make_row([0] * i) for i in range(1, n + 1)])]
    assert len(set(by_seed)) > 0.75 * n and len(set(by_position)) > 0.75 * n
    # Position is that of the new token in the sequence; where the prompt ends makes no difference.
    assert choose(kernels, logits[0], make_row([5, 6], [7, 8], seed=9)) == choose(
        kernels, logits[0], make_row([1, 2, 3, 4], seed=9)
    )


def test_greedy_is_argmax_with_the_lowest_id_of_equals(kernels: Kernels) -> None:
    logits = make_logits(8, 1000)
    logits[3] = 0.0
    logits[4, 10] = logits[4, 900] = 99.0
    tokens = sample(kernels, logits, [make_row(temperature=0.0)] * 8)
    assert [token.token_id for token in tokens] == [row.index(max(row)) for row in logits.tolist()]
    assert tokens[3].token_id == 0 and tokens[4].token_id == 10


def test_greedy_batch_draws_nothing(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "sample", None)
    sample(kernels, make_logits(4, 50), [make_row(temperature=0.0)] * 4)


@pytest.mark.parametrize("params", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_what_leaves_one_token_is_greedy(kernels: Kernels, params: dict[str, Any]) -> None:
    logits = make_logits(20, 300)
    rows = [make_row(seed=i, **params) for i in range(20)]
    tokens = sample(kernels, logits, rows)
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def test_penalties_by_hand(kernels: Kernels) -> None:
    """Prompt 0 1, output 1 2 2. Repetition 2 halves or doubles 0 1 2; frequency 0.5 and presence 0.25 count output."""
    logits = [4.0, -1.0, 3.0, 1.0]
    row = make_row([0, 1], [1, 2, 2], repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    assert processed(kernels, logits, row) == [2.0, -2.0 - 0.5 - 0.25, 1.5 - 1.0 - 0.25, 1.0]
    assert processed(kernels, logits, make_row([0, 1], [1, 2, 2], frequency_penalty=-1.0)) == [4.0, 0.0, 5.0, 1.0]
    assert processed(kernels, logits, make_row([0, 1], [1, 2, 2], presence_penalty=1.0)) == [4.0, -2.0, 2.0, 1.0]
    assert processed(kernels, logits, make_row([0, 1], presence_penalty=1.0, frequency_penalty=1.0)) == logits


@pytest.mark.parametrize("backend", ["reference", "triton"])
@settings(max_examples=30, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, 49), min_size=1, max_size=80),
    penalty=st.floats(0.2, 3.0),
    seed=st.integers(0, 99),
)
def test_repetition_penalty_equals_transformers(backend: str, token_ids: list[int], penalty: float, seed: int) -> None:
    logits = make_logits(1, 50, seed)
    row = make_row(token_ids, repetition_penalty=penalty)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([token_ids]), logits.clone())
    torch.testing.assert_close(process(load_backend(backend, "cpu"), logits, row), expected, rtol=1e-6, atol=0.0)


def test_bias_comes_before_penalties_and_leaves_the_callers_logits_alone(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0]])
    row = make_row([0], [1], logit_bias={1: 3.0, 99: 5.0}, repetition_penalty=2.0)
    assert process(kernels, logits, row).tolist() == [[0.5, 2.0, 1.0]]
    assert logits.tolist() == [[1.0, 1.0, 1.0]]


def test_bias_of_100_decides(kernels: Kernels) -> None:
    logits = make_logits(1, 500)[0]
    likeliest = int(logits.argmax())
    for seed in range(10 if takes_long(kernels) else 50):
        assert choose(kernels, logits, make_row(seed=seed, logit_bias={77: 100.0})) == 77
        assert (
            choose(kernels, logits, make_row(seed=seed, temperature=2.0, logit_bias={likeliest: -100.0})) != likeliest
        )


def test_min_tokens_excludes_what_would_end_the_request(kernels: Kernels) -> None:
    logits = [0.0, 0.0, 50.0, 40.0, 1.0]  # EOS is 2
    params: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (3, 99), "temperature": 0.0}
    assert choose(kernels, logits, make_row([0], [], **params)) == 4
    assert choose(kernels, logits, make_row([0], [4], **params)) == 4
    assert choose(kernels, logits, make_row([0], [4, 4], **params)) == EOS
    assert choose(kernels, logits, make_row([0], [], ignore_eos=True, **params)) == EOS
    for seed in range(10 if takes_long(kernels) else 50):
        assert choose(kernels, logits, make_row([0], [], seed=seed, min_tokens=1, temperature=5.0)) != EOS


def test_logprobs_are_the_models_own(kernels: Kernels) -> None:
    probs = [0.1, 0.4, 0.2, 0.3]
    logits = [math.log(p) + 5.0 for p in probs]
    row = make_row(temperature=0.0, logprobs=2, logit_bias={0: 100.0}, min_tokens=1)
    token = sample(kernels, torch.tensor([logits]), [row])[0]
    assert token.token_id == 0 and token.logprobs is not None
    assert (token.logprobs.chosen.token_id, token.logprobs.chosen.rank) == (0, 4)
    assert token.logprobs.chosen.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [(top.token_id, top.rank) for top in token.logprobs.top] == [(1, 1), (3, 2)]
    assert [math.exp(top.logprob) for top in token.logprobs.top] == pytest.approx([0.4, 0.3], abs=1e-6)


def test_logprobs_go_to_the_rows_that_want_them_with_equals_sharing_a_rank(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).repeat(3, 1)
    rows = [make_row(temperature=0.0, logprobs=k) for k in (None, 0, 20)]
    none, chosen_only, everything = (token.logprobs for token in sample(kernels, logits, rows))
    assert none is None
    assert chosen_only is not None and everything is not None
    assert chosen_only.top == () and chosen_only.chosen.rank == 1
    assert [(top.token_id, top.rank) for top in everything.top] == [(1, 1), (2, 1), (3, 3), (0, 4)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # Triton's draws are held to reference's, one by one
def test_tokens_follow_the_distribution(backend: str) -> None:
    """Chi-squared at 1e-4 over 20 000 draws in mixed batches; seeds are fixed, so it passes always or never."""
    kernels = load_backend(backend, "cpu")
    logits = make_logits(1, 10, seed=3, spread=1.0)
    counts: dict[float, list[int]] = {1.0: [0] * 10, 0.5: [0] * 10}
    for batch in range(100):
        rows = [make_row([0] * (batch + 1), seed=i, temperature=(1.0, 0.5)[i % 2]) for i in range(400)]
        for row, token in zip(rows, sample(kernels, logits.expand(400, -1), rows), strict=True):
            counts[row.sampling.temperature][token.token_id] += 1
    for temperature, observed in counts.items():
        expected = (logits[0].double() / temperature).softmax(-1) * 20_000
        assert chi_squared_pvalue(torch.tensor(observed), expected) > 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5, "top_k": 3}, {"logprobs": 1}])
def test_bad_logits_end_their_own_row(kernels: Kernels, value: float, params: dict[str, Any]) -> None:
    logits = make_logits(3, 20)
    logits[1, 7] = value
    first, second, third = Sampler(20, "cpu", kernels).sample(logits, [make_row(**params)] * 3)
    assert isinstance(second, BadLogits)
    assert isinstance(first, SampledToken) and isinstance(third, SampledToken)


def test_nothing_left_to_choose_is_refused(kernels: Kernels) -> None:
    row = make_row(min_tokens=1, stop_token_ids=(0, 1))
    [refusal] = Sampler(3, "cpu", kernels).sample(torch.tensor([[1.0, 2.0, 3.0]]), [row])
    assert isinstance(refusal, InvalidRequest)
    assert choose(kernels, [-math.inf, -math.inf, -math.inf, 0.0], make_row()) == 3


def test_no_rows(kernels: Kernels) -> None:
    assert sample(kernels, torch.empty(0, 5), []) == []
