"""Speculative output is that of plain decoding, token by token and logprob by logprob, for every sampling parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from relevo.core.sampling_params import SamplingParams
from relevo.engine.engine import Engine
from relevo.engine.step_result import NewTokens
from tests.engine.spec_engines import generate, make_engine
from tests.support.parity import has_variety, prompts
from tests.support.tiny_models import TinyModels

FEW = {7: 90.0, 9: 90.0, 12: 89.0}  # text of three tokens: there is always something to look up
EVERY_PARAMETER: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3, "ignore_eos": True},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "top_p": 0.9, "seed": 4, "logprobs": 0},
    {"temperature": 1.0, "top_k": 7, "min_p": 0.02, "seed": 5},
    {"temperature": 0.7, "repetition_penalty": 1.3, "seed": 6},
    {"temperature": 0.0, "frequency_penalty": 0.8, "presence_penalty": 0.4},
    {"temperature": 1.0, "logit_bias": {7: 4.0, 9: -100.0, 11: 3.0}, "seed": 7},
    {"temperature": 0.9, "min_tokens": 20, "seed": 8, "logit_bias": {2: 6.0}},
    {"temperature": 0.0, "stop_token_ids": tuple(range(40, 70))},
    {"temperature": 1.0, "logit_bias": FEW, "seed": 7, "logprobs": 1},
    {"temperature": 0.5, "logit_bias": FEW, "seed": 8, "repetition_penalty": 1.01},
    {"temperature": 0.0, "logit_bias": FEW, "presence_penalty": 0.1, "frequency_penalty": 0.3},
    {"temperature": 0.6, "num_speculative_tokens": 0, "seed": 9},
    {"temperature": 0.6, "num_speculative_tokens": 1, "seed": 9},
]


def asks(max_tokens: int = 40) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that repeat themselves."""
    token_lists = [prompt[:25] * 2 for prompt in prompts()]
    return [
        (token_lists[index % len(token_lists)], SamplingParams(**{"max_tokens": max_tokens, "seed": 0, **params}))
        for index, params in enumerate(EVERY_PARAMETER)
    ]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tiny_models: TinyModels) -> str:
    return str(tiny_models.path(request.param))


@pytest.fixture(scope="module")
def plain(path: str) -> Engine:
    return make_engine(path)


def assert_equal(answers: Sequence[NewTokens], expected: Sequence[NewTokens]) -> None:
    """Token by token; logprobs but for the rounding of attention over differently cut chunks."""
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        for entry, right in zip(answer.logprobs, other.logprobs, strict=True):
            assert entry.chosen.token_id == right.chosen.token_id
            assert abs(entry.chosen.rank - right.chosen.rank) <= 1  # of two that are as likely, either may come first
            assert [top.token_id for top in entry.top] == [top.token_id for top in right.top]
            assert entry.chosen.logprob == pytest.approx(right.chosen.logprob, abs=1e-4)


@pytest.mark.parametrize("kind", ["ngram", "suffix", "draft"])
@pytest.mark.parametrize("num_drafts", [1, 5])
def test_speculative_equals_plain_for_every_parameter(path: str, plain: Engine, kind: str, num_drafts: int) -> None:
    """All in one batch, prompts in chunks beside answers; then again, with blocks found by name; then one by one."""
    engine = make_engine(
        path,
        f"draft:{path}" if kind == "draft" else kind,
        num_speculative_tokens=num_drafts,
        max_num_batched_tokens=48,
        max_num_seqs=16,
    )
    expected = generate(plain, asks(), later=4)
    assert has_variety([answer.token_ids for answer in expected])
    assert_equal(generate(engine, asks(), later=4), expected)
    assert_equal(generate(engine, asks(), later=4), expected)
    assert_equal([generate(engine, [ask])[0] for ask in asks()], expected)
    stats = engine.load().speculation
    assert stats is not None and stats.num_accepted_tokens > 20
    assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens <= stats.num_draft_tokens
