"""`response_format` and `structured_outputs` at the door: what workers get, what is refused and why."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from relevo.core.structured_outputs import StructuredOutputs
from relevo.grammar.compiler import CompiledGrammar, GrammarCompiler
from services.router.http import structure
from tests.router.http.conftest import Edge

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
LARGE = {"type": "object", "properties": {f"property{i}": {"type": "string", "maxLength": 20} for i in range(2200)}}


def schema_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


async def test_what_is_wanted_goes_to_the_worker_as_its_source(edge: Edge) -> None:
    for field, value, kind, source in [
        ("response_format", {"type": "json_object"}, "json", '{"type":"object"}'),
        ("response_format", schema_format({"type": "integer"}), "json", '{"type":"integer"}'),
        ("structured_outputs", {"json": {"type": "null"}}, "json", '{"type":"null"}'),
        ("structured_outputs", {"json": '{"type": "null"}'}, "json", '{"type": "null"}'),
        ("structured_outputs", {"regex": "a+", "json": None}, "regex", "a+"),
        ("structured_outputs", {"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
    ]:
        for path, body in (("chat/completions", CHAT), ("completions", {"prompt": "a", "max_tokens": 2})):
            reply = await edge.http.post(f"/v1/{path}", json={**body, field: value, "n": 2})
            assert reply.status_code == 200, reply.text
            sent = edge.dispatcher.requests[-1].sampling.structured_outputs
            assert (sent.WhichOneof("kind"), getattr(sent, kind)) == (kind, source)
    await edge.http.post("/v1/chat/completions", json={**CHAT, "structured_outputs": {"choice": ["a", "b"]}})
    assert list(edge.dispatcher.requests[-1].sampling.structured_outputs.choice.texts) == ["a", "b"]
    await edge.http.post("/v1/chat/completions", json={**CHAT, "response_format": {"type": "text"}})
    assert not edge.dispatcher.requests[-1].sampling.HasField("structured_outputs")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": schema_format({"type": "string", "minLength": 5, "maxLength": 3})}, "response_format", ""),
        ({"response_format": schema_format({"type": "strin"})}, "response_format", "Invalid type"),
        ({"response_format": schema_format({"not": {}})}, "response_format", "Unimplemented"),
        ({"response_format": schema_format({"enum": ["x" * 200_000]})}, "response_format", "at most 131072"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is required"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format", "con"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "contradicts"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "unknown name"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "not a parameter"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_within_two_seconds_and_no_worker_hears_of_it(
    edge: Edge, fields: dict[str, Any], param: str, says: str
) -> None:
    num_before = len(edge.dispatcher.requests)
    started = time.monotonic()
    reply = await edge.http.post("/v1/chat/completions", json={**CHAT, **fields, "stream": True})
    assert time.monotonic() - started < 2.0
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and says in error["message"]
    assert len(edge.dispatcher.requests) == num_before


async def test_a_large_schema_holds_nobody_up(edge: Edge) -> None:
    """While it is compiled, or found too large, others are answered: the loop never waits for as long as it takes."""
    compiling = asyncio.create_task(
        edge.http.post("/v1/chat/completions", json={**CHAT, "response_format": schema_format(LARGE)})
    )
    started, longest, count = time.monotonic(), 0.0, 0
    while not compiling.done():
        asked = time.monotonic()
        small = {**CHAT, "response_format": schema_format(SCHEMA)}
        assert (await edge.http.post("/v1/chat/completions", json=small)).status_code == 200
        longest, count = max(longest, time.monotonic() - asked), count + 1
    took = time.monotonic() - started
    assert (await compiling).status_code in (200, 400) and took < 2.5
    assert count >= 3 and longest < 0.5 * took


async def test_one_that_is_never_done_is_refused_in_time_and_others_are_answered_meanwhile(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, original = threading.Event(), GrammarCompiler._compile

    def compile_(self: GrammarCompiler, outputs: StructuredOutputs) -> CompiledGrammar:
        if outputs.regex == "endless":
            assert go.wait(60)
        return original(self, outputs)

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_)
    endless, known = ({**CHAT, "structured_outputs": {"regex": regex}} for regex in ("endless", "known"))
    assert (await edge.http.post("/v1/chat/completions", json=known)).status_code == 200
    monkeypatch.setattr(structure, "COMPILE_SECONDS", 0.5)
    refused = asyncio.create_task(edge.http.post("/v1/chat/completions", json=endless))
    try:
        count = 0
        while not refused.done():
            for body in (CHAT, known):
                assert (await edge.http.post("/v1/chat/completions", json=body)).status_code == 200
            count += 1
    finally:
        go.set()
    reply = await refused
    assert count >= 1 and reply.status_code == 400
    assert "takes over 0.5 s to compile" in reply.json()["error"]["message"]
