"""From a request's description to the language that llguidance compiles."""

from __future__ import annotations

import json
from typing import Any

from relevo.core.structured_outputs import StructuredOutputs
from relevo.grammar.multiples import check_multiples
from relevo.grammar.patterns import with_exact_patterns

# Without a bound, a model that has begun to write spaces may never end.
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"

# The model decides how a text is cut into tokens. Forcing the tokenizer's own cut could force a special token that is
# spelled out in an enum, and what comes next would no longer depend on the text alone.
_START = '%llguidance {"no_forcing": true}\nstart: @body'


def llguidance_source(outputs: StructuredOutputs) -> str:
    """A top-level grammar. Raises ValueError for what cannot even be read."""
    try:
        return json.dumps({"grammars": _grammars(outputs)}, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("it is nested too deeply (recursion limit)") from error


def _grammars(outputs: StructuredOutputs) -> list[dict[str, Any]]:
    kind, source, is_compact = outputs.source
    body: dict[str, Any]
    if kind == "json":
        assert isinstance(source, str)
        body = {"json_schema": _schema(source, is_compact=is_compact)}
    elif kind == "choice":
        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in source)
        body = {"lark_grammar": f"start: {alternatives}"}
    elif kind == "regex":
        assert isinstance(source, str)
        from llguidance import LLMatcher

        body = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]
    else:
        assert isinstance(source, str)
        body = {"lark_grammar": _lark(source)}
    return [{"lark_grammar": _START}, {**body, "name": "body"}]


def _schema(text: str, *, is_compact: bool) -> dict[str, Any] | bool:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the schema is no JSON: {error}") from error
    if schema is False:
        return False
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError(f"the schema must be an object or a boolean, not {type(schema).__name__}")  # noqa: TRY004 (the world's, not ours)
    check_multiples(schema)
    whitespace = {"whitespace_flexible": False} if is_compact else {"whitespace_pattern": JSON_WHITESPACE}
    own = schema.get("x-guidance")
    return {**with_exact_patterns(schema), "x-guidance": {**whitespace, **(own if isinstance(own, dict) else {})}}


def _lark(text: str) -> str:
    """Lark as it is, GBNF translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark: str = any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the translator raises nothing narrower
        raise ValueError(f"the grammar is neither Lark nor GBNF: {error}") from error
    return lark
