"""A mask is a function of the grammar and the output, whatever the matcher was asked before."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relevo.core.errors import Exhausted, InvalidRequest
from relevo.core.structured_outputs import MAX_SOURCE_BYTES, StructuredOutputs
from relevo.grammar import compiler as compiler_module
from relevo.grammar.compiler import GrammarCompiler
from relevo.grammar.matcher import GrammarMatcher, start_matching
from relevo.grammar.patterns import with_exact_patterns
from relevo.grammar.source import llguidance_source
from relevo.model_files import generation_defaults, resolve_model
from relevo.tokenizer import Tokenizer
from tests.support.schemas import random_schema

FILES = resolve_model(None)
EOS = generation_defaults(FILES).eos_token_ids
_found = Tokenizer.from_files(FILES)
assert _found is not None
TOKENIZER = _found
VOCAB = 4096
COMPILER = GrammarCompiler(lambda: TOKENIZER, EOS, vocab_size=VOCAB)
PERSON = StructuredOutputs(
    json={
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def matcher(outputs: StructuredOutputs, stop_token_ids: Sequence[int] = EOS) -> GrammarMatcher:
    matcher = start_matching(COMPILER, outputs, stop_token_ids)
    matcher.wait(10.0)
    assert matcher.is_ready and matcher.error is None
    return matcher


def allowed(matcher: GrammarMatcher, output: Sequence[int]) -> list[int]:
    words = np.empty(VOCAB // 32, dtype=np.int32)
    matcher.fill_mask(output, words.ctypes.data, words.nbytes)
    ids: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    return ids


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def reason(**outputs: object) -> str:
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(StructuredOutputs(**outputs)).result()  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.param == "structured_outputs"
    return caught.value.message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mask_does_not_depend_on_where_the_matcher_was_before(data: st.DataObject) -> None:
    """Outputs that grow, lose drafted tokens, hold tokens that the grammar does not allow, and start over."""
    used, output = matcher(PERSON), list[int]()
    for _ in range(12):
        choices = allowed(used, output)
        assert choices == allowed(matcher(PERSON), output)
        kind = data.draw(st.sampled_from(["grow", "grow", "grow", "draft", "back", "over"]))
        if kind == "grow" and not set(choices) <= set(EOS):
            output = [*output, data.draw(st.sampled_from([i for i in choices if i not in EOS]))]
        elif kind == "draft":
            drafts = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3))
            assert allowed(used, [*output, *drafts]) == allowed(matcher(PERSON), [*output, *drafts])
        elif kind == "back":
            output = output[: data.draw(st.integers(0, len(output)))]
        elif kind == "over":
            output = []


def test_only_the_end_may_follow_what_is_complete_or_not_allowed() -> None:
    person = matcher(PERSON)
    whole = encode('{"name": "Ada", "age": 36}')
    for end in range(len(whole)):
        assert whole[end] in allowed(person, whole[:end])
    assert allowed(person, whole) == sorted(EOS)
    assert allowed(person, [*whole, EOS[0], 50]) == sorted(EOS)
    assert allowed(person, encode('{"nome"')) == sorted(EOS)
    assert whole[1] in allowed(person, whole[:1])


def test_special_tokens_are_never_inside_though_their_text_may_be() -> None:
    special = {i for i in range(VOCAB) if TOKENIZER.is_special(i)} - set(EOS)
    choice = matcher(StructuredOutputs(choice=["<|im_start|>", "<|im_end|>"]))
    output: list[int] = []
    while ids := [i for i in allowed(choice, output) if i not in EOS]:
        assert not special & set(ids)
        output.append(ids[0])
    assert TOKENIZER.decode(output, skip_special_tokens=False) in ("<|im_start|>", "<|im_end|>")


def test_stop_tokens_may_come_where_the_text_may_end() -> None:
    [stop] = encode("!")
    digits = matcher(StructuredOutputs(regex="[0-9]{2,3}"), stop_token_ids=(*EOS, stop))
    assert stop not in allowed(digits, encode("1"))
    assert {stop, *EOS} < set(allowed(digits, encode("12")))
    assert set(allowed(digits, encode("123"))) == {stop, *EOS}


@pytest.mark.parametrize(
    "text", ["a b", 'q"uote', "back\\slash", "new\nline", "größe 中", "/x/", "%json {}", "<|pad|>"]
)
def test_choices_are_taken_literally(text: str) -> None:
    choice = matcher(StructuredOutputs(choice=[text, "another"]))
    tokens = [TOKENIZER.encode(character, add_special_tokens=False) for character in text]
    output: list[int] = []
    for token_id in (token_id for character in tokens for token_id in character):
        assert token_id in allowed(choice, output)
        output.append(token_id)
    assert allowed(choice, output) == sorted(EOS)


def test_both_notations_of_grammars_and_compact_json() -> None:
    for grammar in ('root ::= "a" | "b" digit+\ndigit ::= [0-9]', 'start: "a" | "b" DIGIT+\nDIGIT: /[0-9]/'):
        assert set(EOS) < set(allowed(matcher(StructuredOutputs(grammar=grammar)), encode("b1")))
    spaced, compact = '{"name": "A"', '{"name":"A"'
    tight = matcher(StructuredOutputs(json=PERSON.json, disable_any_whitespace=True))
    assert allowed(tight, encode(spaced)) == sorted(EOS)
    assert allowed(tight, encode(compact)) != sorted(EOS)


def test_what_nothing_fits_or_nobody_can_read_is_refused_with_the_reason() -> None:
    assert "minimum (5) is greater than maximum (3)" in reason(json={"type": "integer", "minimum": 5, "maximum": 3})
    assert "uniqueItems" in reason(json={"type": "array", "uniqueItems": True})
    assert "no text fits" in reason(json={"$ref": "#"})
    assert "no text fits" in reason(grammar="start: A\nA: /a+/ & /b+/")
    assert "unclosed group" in reason(regex="a(")
    assert "look-around" in reason(regex="(?=a)b")
    assert "unknown name" in reason(grammar="start: nothing")
    assert "no JSON" in reason(json="{")
    assert "schema is false" in reason(json=False)
    assert "recursion" in reason(json='{"items":' * 500 + "{}" + "}" * 500)
    assert "x" * 500 not in reason(regex="(" + "x" * 5000)


def test_multiples_that_would_take_seconds_are_refused_and_round_ones_are_not() -> None:
    large = {"properties": {f"p{i}": {"type": "integer", "multipleOf": 9973 + 2 * i} for i in range(50)}}
    started = time.thread_time()
    with pytest.raises(ValueError, match="multipleOf are 501,100 together"):
        llguidance_source(StructuredOutputs(json=large))
    assert time.thread_time() - started < 0.5
    assert "multipleOf are 501,100" in reason(json=large)
    for multiple in (7, 0.01, 2.5, 10_000_000):
        assert matcher(StructuredOutputs(json={"type": "number", "multipleOf": multiple}))


def test_what_is_wrong_on_sight_does_not_get_to_the_compiler() -> None:
    wrongs: list[dict[str, Any]] = [{}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": "ab"}, {"json": 3}]
    for wrong in wrongs:
        with pytest.raises(InvalidRequest, match="structured_outputs"):
            StructuredOutputs(**wrong)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_SOURCE_BYTES}"):
        StructuredOutputs(json={"enum": ["x" * MAX_SOURCE_BYTES]})


def test_a_large_one_is_refused_and_another_compiles_meanwhile() -> None:
    strict = GrammarCompiler(lambda: TOKENIZER, EOS, vocab_size=VOCAB, compile_seconds=0.05)
    properties = {f"property{i}": {"type": "string"} for i in range(1000)}
    large = strict.compile(StructuredOutputs(json={"type": "object", "properties": properties}))
    small = strict.compile(StructuredOutputs(choice=["a"]))
    assert small.result(timeout=10) and not large.done()
    with pytest.raises(InvalidRequest, match="too large: compiling takes"):
        large.result(timeout=30)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own there")
def test_compiling_gives_way_to_what_computes_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    priorities: list[int] = []

    def compile_(self: GrammarCompiler, outputs: StructuredOutputs) -> None:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    GrammarCompiler(lambda: TOKENIZER, EOS).compile(StructuredOutputs(regex="a")).result(timeout=10)
    assert priorities == [compiler_module.NICENESS]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_one_that_only_checks_judges_as_one_that_serves() -> None:
    """And gives the same first mask, only later."""
    checker = GrammarCompiler(lambda: TOKENIZER, EOS, vocab_size=VOCAB, checks_only=True)
    described = [StructuredOutputs(json=random_schema(seed)) for seed in range(60)]
    described += [StructuredOutputs(regex=regex) for regex in ("[a-z]+", "a{2,400}", "(?i:yes|no)", "(", "[^a]*b")]
    described += [StructuredOutputs(grammar=grammar) for grammar in ("start: /a/", "start: missing", "root ::= [0-9]+")]
    for outputs in described:
        checked, served = checker.compile(outputs), COMPILER.compile(outputs)
        assert (checked.exception(10) is None) == (served.exception(10) is None)
        if served.exception() is None:
            masks = [done.result().template.compute_bitmask() for done in (checked, served)]
            assert masks[0] == masks[1]


def test_each_is_compiled_once_and_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 2)
    compiler = GrammarCompiler(lambda: TOKENIZER, EOS, vocab_size=VOCAB)
    first = compiler.compile(StructuredOutputs(regex="a"))
    assert compiler.compile(StructuredOutputs(regex="a")) is first
    for regex in ("b", "c"):
        compiler.compile(StructuredOutputs(regex=regex))
    assert compiler.compile(StructuredOutputs(regex="a")) is not first


def test_more_than_may_wait_are_refused() -> None:
    compiler = GrammarCompiler(lambda: TOKENIZER, EOS, vocab_size=VOCAB, max_pending=0)
    with pytest.raises(Exhausted):
        compiler.compile(StructuredOutputs(regex="a"))


def test_a_model_without_tokenizer_or_end_says_so() -> None:
    for compiler in (GrammarCompiler(lambda: None, EOS), GrammarCompiler(lambda: TOKENIZER, [])):
        with pytest.raises(InvalidRequest, match="this model has no"):
            compiler.compile(StructuredOutputs(regex="a")).result(timeout=10)


def test_patterns_that_exclude_quotes_exclude_them_escaped_too() -> None:
    schema = {
        "properties": {"pattern": {"pattern": r'^[^"\\]{3}\[[^]a]$'}, "const": {"pattern": "[^b]"}},
        "patternProperties": {"^[^_]$": {}},
        "enum": [{"pattern": "[^c]"}],
    }
    assert with_exact_patterns(schema) == {
        "properties": {"pattern": {"pattern": r'^[^\x00"\\]{3}\[[^]\x00a]$'}, "const": {"pattern": r"[^\x00b]"}},
        "patternProperties": {r"^[^\x00_]$": {}},
        "enum": [{"pattern": "[^c]"}],
    }
    three = matcher(StructuredOutputs(json={"type": "string", "pattern": r'^[^"]{3}$'}))
    assert allowed(three, encode(json.dumps('a"b')[:-1])) == sorted(EOS)
    assert allowed(three, encode(json.dumps("a\\b")[:-1])) != sorted(EOS)
