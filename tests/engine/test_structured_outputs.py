"""Outputs that fit a grammar, from the demo model: always, whatever else a request asks for.

RELEVO_NUM_SCHEMAS: how many random schemas; 150 unless set.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from llguidance import LLParserLimits

from relevo import LLM, SamplingParams
from relevo.core.errors import InvalidRequest
from relevo.core.request import FinishReason
from relevo.core.structured_outputs import StructuredOutputs
from relevo.engine.engine import Engine
from relevo.engine.step_result import EndedRequest
from relevo.grammar import compiler
from relevo.grammar.compiler import CompiledGrammar, GrammarCompiler
from relevo.llm import Completion
from tests.support.schemas import random_schema

SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 64 << 20, "threads": 1}
PROMPT = "Answer in JSON:"
CODE = StructuredOutputs(regex="[A-Z]{3}-[0-9]{4}(-[a-f]{2,5})?")


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(**SMALL)


def ask(llm: LLM, outputs: StructuredOutputs, count: int = 8, **sampling: Any) -> list[Completion]:
    params = {"max_tokens": 60, "temperature": 1.5, **sampling}
    each = [SamplingParams(seed=seed, structured_outputs=outputs, **params) for seed in range(count)]
    return llm.generate([PROMPT] * count, each, progress=False)


def texts(answers: Sequence[Completion]) -> list[str]:
    return [answer.text for answer in answers]


def test_answers_to_random_schemas_validate_unless_they_are_cut(demo: LLM) -> None:
    schemas = [random_schema(seed) for seed in range(int(os.environ.get("RELEVO_NUM_SCHEMAS", "150")))]
    params = [
        SamplingParams(max_tokens=250, temperature=1.5, seed=seed, structured_outputs=StructuredOutputs(json=schema))
        for seed, schema in enumerate(schemas)
    ]
    answers = demo.generate([PROMPT] * len(schemas), params, progress=False)
    whole = [pair for pair in zip(schemas, answers, strict=True) if pair[1].finish_reason is FinishReason.STOP]
    assert len(whole) > 0.5 * len(schemas)
    for schema, answer in whole:
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


def test_regex_choice_grammar_and_any_object_are_kept_to(demo: LLM) -> None:
    for answer in ask(demo, CODE):
        assert answer.finish_reason is FinishReason.STOP and re.fullmatch(str(CODE.regex), answer.text)
    assert {*texts(ask(demo, StructuredOutputs(choice=["yes", "no"])))} == {"yes", "no"}
    sums = StructuredOutputs(grammar='root ::= n (" + " n){1,3}\nn ::= [1-9] [0-9]?')
    assert all(re.fullmatch(r"[1-9]\d?( \+ [1-9]\d?){1,3}", text) for text in texts(ask(demo, sums)))
    objects = ask(demo, StructuredOutputs(json_object=True), max_tokens=80)
    whole = [answer.text for answer in objects if answer.finish_reason is FinishReason.STOP]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)


def test_greedy_penalties_bias_and_filters_cannot_leave_the_grammar(demo: LLM) -> None:
    assert demo.tokenizer is not None
    away = dict.fromkeys(demo.tokenizer.encode("ABCDEFGHIJ0123456789-", add_special_tokens=False), -100.0)
    for sampling in (
        {"temperature": 0.0},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0},
        {"logit_bias": away, "temperature": 0.0},
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 0.5},
    ):
        assert all(re.fullmatch(str(CODE.regex), text) for text in texts(ask(demo, CODE, count=3, **sampling)))


def test_the_grammar_wins_over_min_tokens_and_stop_strings_cut(demo: LLM) -> None:
    assert all(re.fullmatch(str(CODE.regex), text) for text in texts(ask(demo, CODE, count=4, min_tokens=50)))
    [optional] = {text[:9] for text in texts(ask(demo, CODE, count=1, temperature=0.0))}
    longer = ask(demo, CODE, count=1, temperature=0.0, min_tokens=12)
    assert longer[0].text.startswith(optional) and len(longer[0].token_ids) >= 12
    assert all("-" not in text for text in texts(ask(demo, CODE, count=4, stop=("-",))))
    with pytest.raises(InvalidRequest, match="ignore_eos contradicts"):
        SamplingParams(structured_outputs=CODE, ignore_eos=True)


def test_logprobs_are_of_the_models_own_logits(demo: LLM) -> None:
    [free] = demo.generate(PROMPT, SamplingParams(max_tokens=1, temperature=0.0, logprobs=5), progress=False)
    [bound] = ask(demo, CODE, count=1, temperature=0.0, logprobs=5)
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.token_ids[0] != free.token_ids[0] and bound.logprobs[0].chosen.rank > 1


def test_preemption_neighbours_and_a_move_change_nothing(demo: LLM) -> None:
    outputs = StructuredOutputs(json=random_schema(0))
    expected = ask(demo, outputs, count=8, max_tokens=100)
    tight = LLM(**{**SMALL, "kv_cache_memory": 12 * demo._engine.info.block_bytes, "max_model_len": 128})
    preempted = 0
    original = tight._engine.scheduler._preempt

    def counting(request: Any) -> None:
        nonlocal preempted
        preempted += 1
        original(request)

    tight._engine.scheduler._preempt = counting  # type: ignore[method-assign]
    answers = ask(tight, outputs, count=8, max_tokens=100)
    assert preempted
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert ask(demo, outputs, count=3, max_tokens=100)[2].token_ids == expected[2].token_ids
    for seed, answer in enumerate(expected[:3]):
        half = len(answer.token_ids) // 2
        assert moved(demo._engine, answer, half, outputs, seed) == answer.token_ids[half:]


def moved(
    engine: Engine, answer: Completion, num_output_tokens: int, outputs: StructuredOutputs, seed: int
) -> list[int]:
    """What follows the first output tokens where they come from another worker."""
    sampling = SamplingParams(max_tokens=100, temperature=1.5, seed=seed, structured_outputs=outputs)
    known = [*answer.prompt_token_ids, *answer.token_ids[:num_output_tokens]]
    engine.submit(engine.make_request("moved", known, sampling, num_output_tokens=num_output_tokens))
    token_ids: list[int] = []
    while engine.has_unfinished_requests:
        for tokens in engine.step().tokens:
            token_ids += tokens.token_ids
    return token_ids


def test_what_cannot_be_compiled_or_goes_too_far_ends_alone(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="minimum"):
        ask(demo, StructuredOutputs(json={"type": "integer", "minimum": 5, "maximum": 3}), count=1)
    limits = LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr(compiler, "_limits", lambda: limits)
    with pytest.raises(InvalidRequest, match=r"after \d+ tokens"):
        ask(demo, StructuredOutputs(regex="([a-z]{3}[0-9]{2}){9}"), count=1)
    assert texts(ask(demo, StructuredOutputs(choice=["still here"]), count=2)) == ["still here"] * 2


def test_others_step_while_a_grammar_is_compiled_and_who_waits_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LLM(**SMALL)._engine
    go, original = threading.Event(), GrammarCompiler._compile

    def slow(self: GrammarCompiler, outputs: StructuredOutputs) -> CompiledGrammar:
        assert go.wait(60)
        return original(self, outputs)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    bound = SamplingParams(max_tokens=20, temperature=0.0, seed=0, structured_outputs=CODE)
    for name in ("bound", "leaves"):
        engine.submit(engine.make_request(name, [50, 60], bound))
    engine.submit(engine.make_request("free", [50, 60], SamplingParams(max_tokens=5, temperature=0.0, seed=0)))
    ended: list[EndedRequest] = []
    while not any(entry.request_id == "free" for entry in ended):
        ended += engine.step().ended
    assert engine.is_busy and engine.load().num_waiting == 2
    engine.abort("leaves")
    go.set()
    while engine.has_unfinished_requests:
        ended += engine.step().ended
    assert [(entry.request_id, entry.finish_reason) for entry in ended] == [
        ("free", FinishReason.LENGTH),
        ("leaves", FinishReason.CANCELLED),
        ("bound", FinishReason.STOP),
    ]
    engine.scheduler.check()
