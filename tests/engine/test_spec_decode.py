"""Speculative output is that of plain decoding, token by token and logprob by logprob, for every sampling parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from relevo.core.errors import StartupError
from relevo.core.sampling_params import SamplingParams
from relevo.core.structured_outputs import StructuredOutputs
from relevo.demo import target_path
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.step_result import NewTokens
from tests.engine.spec_engines import copy_block, generate, make_engine
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


LONG = SamplingParams(max_tokens=40, temperature=0.8, seed=1, ignore_eos=True)


def accepted_share(engine: Engine) -> float:
    stats = engine.load().speculation
    assert stats is not None and stats.num_draft_tokens > 10
    return stats.num_accepted_tokens / stats.num_draft_tokens


def test_draft_kv_is_whole_after_preemption(path: str, plain: Engine) -> None:
    """The draft is the target itself: a draft that is rejected would mean that its KV is not that of the text."""
    token_lists = [prompt[-20:] for prompt in prompts()] * 2
    expected = generate(plain, [(token_ids, LONG) for token_ids in token_lists])
    num_blocks = 12
    tight = make_engine(
        path, f"draft:{path}", kv_cache_memory=2 * num_blocks * plain.info.block_bytes, max_model_len=96
    )
    assert tight.info.num_blocks == num_blocks
    num_preempted = 0
    original = tight.scheduler._preempt

    def counting(request: Any) -> None:
        nonlocal num_preempted
        num_preempted += 1
        original(request)

    tight.scheduler._preempt = counting  # type: ignore[method-assign]
    assert_equal(generate(tight, [(token_ids, LONG) for token_ids in token_lists]), expected)
    assert num_preempted and accepted_share(tight) == 1.0


def test_draft_kv_of_blocks_that_were_found_or_came_from_elsewhere_is_computed_first(path: str, plain: Engine) -> None:
    """Blocks of a request that had no drafts; then a prompt whose KV another engine computed, with its first token."""
    engine = make_engine(path, f"draft:{path}", max_num_batched_tokens=32, max_num_seqs=8)
    prompt = prompts()[3]
    quiet = SamplingParams(max_tokens=2, temperature=0.0, seed=0, num_speculative_tokens=0)
    generate(engine, [(prompt, quiet)])
    assert_equal(generate(engine, [(prompt, LONG)]), generate(plain, [(prompt, LONG)]))
    assert accepted_share(engine) == 1.0

    expected = generate(plain, [(prompt, LONG)], salt="other")[0].token_ids
    request = engine.make_request("split", prompt, LONG, cache_salt="split", await_kv=True)
    engine.submit(request)
    reserved = engine.step().reserved[0]
    # `plain` holds the same prompt's blocks, under the other salt's names.
    there = plain.make_request("names", prompt, LONG, cache_salt="other").block_hashes(len(prompt))
    for name, block_id in zip(there, reserved.block_ids, strict=True):
        copy_block(plain, plain.pin([name])[name], engine, block_id)
    plain.unpin(list(plain.scheduler._pinned))
    engine.resume("split", len(there) * 16, expected[:1])
    answer = expected[:1]
    while engine.has_unfinished_requests:
        for tokens in engine.step().tokens:
            answer += tokens.token_ids
    assert answer == expected and accepted_share(engine) == 1.0


def test_a_request_that_moved_here_goes_on_as_it_would_have(path: str, plain: Engine) -> None:
    expected = generate(plain, [(prompts()[1], LONG)])[0].token_ids
    engine = make_engine(path, f"draft:{path}")
    request = engine.make_request("moved", [*prompts()[1], *expected[:17]], LONG, num_output_tokens=17)
    engine.submit(request)
    answer = expected[:17]
    while engine.has_unfinished_requests:
        for tokens in engine.step().tokens:
            answer += tokens.token_ids
    assert answer == expected and accepted_share(engine) == 1.0


def test_a_draft_of_other_weights_changes_nothing(path: str, plain: Engine, tiny_models: TinyModels) -> None:
    """It has another vocabulary, too, and next to nothing of it is accepted."""
    engine = make_engine(path, f"draft:{tiny_models.path('qwen2')}", num_speculative_tokens=3)
    assert_equal(generate(engine, asks(20)), generate(plain, asks(20)))
    assert accepted_share(engine) < 0.5


def test_recent_answers_help_within_one_salt_only(path: str) -> None:
    engine = make_engine(path, "suffix")
    ask = (prompts()[2], replace(LONG, temperature=1.0))
    lengths = []
    for salt in ("a", "b", "b"):
        before = engine.load().speculation
        generate(engine, [ask], salt=salt)
        after = engine.load().speculation
        assert before is not None and after is not None
        lengths.append(after.num_accepted_tokens - before.num_accepted_tokens)
    assert lengths[1] == lengths[0] < 10 and lengths[2] > 25


def test_ended_requests_leave_nothing_behind(path: str) -> None:
    for kind in ("ngram", "suffix", f"draft:{path}"):
        engine = make_engine(path, kind)
        request = engine.make_request("aborted", [7, 9] * 10, replace(LONG, logit_bias={7: 100.0, 9: 100.0}))
        engine.submit(request)
        for _ in range(4):
            engine.step()
        engine.abort("aborted")
        ended = engine.step().ended
        assert [(e.request_id, e.num_draft_tokens > 0) for e in ended] == [("aborted", True)]
        assert engine.speculator is not None and not engine.speculator._drafting
        proposer: Any = engine.speculator.proposer
        assert not (vars(proposer).get("_indexes") or vars(proposer).get("_matches") or vars(proposer).get("_progress"))


@pytest.mark.parametrize("value", ["draft", "draft:", "ngram:3", "medusa", ""])
def test_unknown_proposers_are_refused(value: str) -> None:
    with pytest.raises(StartupError, match="speculative must be"):
        EngineConfig(speculative=value)


def test_output_that_fits_a_grammar_is_the_same() -> None:
    """The demo pair: drafts that the grammar forbids are rejected, and the grammar goes back to where they began."""
    properties = {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}}
    schema = json.dumps({"type": "object", "properties": properties, "required": ["a", "b"]})
    structure = StructuredOutputs(json=schema, disable_any_whitespace=True)
    asks = [
        ([0, *range(300, 312)], SamplingParams(max_tokens=30, temperature=1.0, seed=seed, structured_outputs=structure))
        for seed in range(3)
    ]
    answers = []
    for speculative in (None, "draft:demo", "suffix"):
        engine = make_engine(str(target_path()), speculative, kv_cache_memory=32 << 20)
        answers.append([answer.token_ids for answer in generate(engine, asks)])
    assert answers[0] == answers[1] == answers[2]
