"""What is wrong is refused: a proper status, OpenAI's error shape, the parameter's name; and nothing is started."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from relevo.core.errors import DeadlineExceeded, Exhausted, InvalidRequest, Mismatch, RelevoError, Unavailable
from relevo.core.request import FinishReason
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.router.generation import EndEvent, TokensEvent
from services.router.http.app import EdgeConfig
from services.router.http.unsupported import ANY, CHAT, COMPLETION
from tests.router.http.conftest import MAX_BODY_BYTES, NAME, Edge, make_served, running

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
BASE: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "hi"}, CHATS: {"messages": [USER]}}


def error_of(reply: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["param"] == param, error
    assert isinstance(error, dict)
    return error


BAD_VALUES: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("max_tokens", 2.5),
    ("max_tokens", True),
    ("max_tokens", 1000),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"4096": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "much"}),
    ("logit_bias", [1]),
    ("logit_bias", {str(i): 0 for i in range(1025)}),
    ("stop", ""),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", 1),
    ("stop", ["a"] * 65),
    ("stop_token_ids", [4096]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("n", 0),
    ("n", 129),
    ("n", "2"),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("cache_salt", 5),
    ("logprobs", "x"),
    ("model", 5),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
async def test_bad_values_are_refused_by_name(edge: Edge, path: str) -> None:
    for param, value in BAD_VALUES:
        extra = {"max_tokens": 16} if param == "min_tokens" else {}
        reply = await edge.http.post(path, json=BASE[path] | extra | {param: value})
        error = error_of(reply, 400, param)
        assert param in error["message"]
        assert error["type"] == "invalid_request_error"
    assert not edge.dispatcher.generations


BAD_BODIES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, [2]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [4096]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [2**40]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 256}, "prompt"),
    (COMPLETIONS, {"prompt": "word " * 1000}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 200, "max_tokens": 57}, "max_tokens"),
    (COMPLETIONS, {"prompt": ["a"] * 100, "n": 100}, "n"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
    (CHATS, {}, "messages"),
    (CHATS, {"messages": []}, "messages"),
    (CHATS, {"messages": "hi"}, "messages"),
    (CHATS, {"messages": ["hi"]}, "messages"),
    (CHATS, {"messages": [{"role": "user"}]}, "messages"),
    (CHATS, {"messages": [{"content": "hi"}]}, "messages"),
    (CHATS, {"messages": [USER | {"role": 5}]}, "messages"),
    (CHATS, {"messages": [USER | {"role": "tool"}]}, "messages"),
    (CHATS, {"messages": [USER | {"content": 5}]}, "messages"),
    (CHATS, {"messages": [USER | {"content": []}]}, "messages"),
    (CHATS, {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    (CHATS, {"messages": [USER | {"content": [{"type": "text"}]}]}, "messages"),
    (CHATS, {"messages": [USER | {"content": [{"type": {}, "text": "a"}]}]}, "messages"),
    (CHATS, {"messages": [USER | {"tool_calls": [{}]}]}, "messages"),
    (CHATS, {"messages": [USER | {"content": "word " * 1000}]}, "messages"),
    (CHATS, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHATS, {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
    (CHATS, {"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHATS, {"messages": [USER], "max_completion_tokens": 1000}, "max_completion_tokens"),
    (CHATS, {"messages": [USER], "max_completion_tokens": 2, "max_tokens": 3}, "max_completion_tokens"),
    (CHATS, {"messages": [USER], "stream": True, "stream_options": {"more": 1}}, "stream_options"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [5000]}, "tokens"),
]


async def test_bad_bodies_are_refused(edge: Edge) -> None:
    for path, body, param in BAD_BODIES:
        error = error_of(await edge.http.post(path, json=body), 400, param)
        assert param in error["message"] or error["code"] == "context_length_exceeded"
    assert not edge.dispatcher.generations


async def test_too_long_says_how_long(edge: Edge) -> None:
    error = error_of(await edge.http.post(COMPLETIONS, json={"prompt": [1] * 300}), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "300" in error["message"]
    assert "256" in error["message"]


@pytest.mark.parametrize(("path", "table"), [(COMPLETIONS, COMPLETION), (CHATS, CHAT)])
async def test_unsupported_parameters_are_named_and_harmless_values_pass(
    edge: Edge, path: str, table: dict[str, Any]
) -> None:
    for name, harmless in table.items():
        if harmless is not ANY:
            error = error_of(await edge.http.post(path, json=BASE[path] | {name: {"some": "thing"}}), 400, name)
            assert error["code"] == "unsupported_parameter"
            assert name in error["message"]
    values = {name: (None, *((5, {"a": "b"}) if harmless is ANY else harmless)) for name, harmless in table.items()}
    for nth in range(max(map(len, values.values()))):
        body = {name: allowed[nth] for name, allowed in values.items() if nth < len(allowed)}
        reply = await edge.http.post(path, json=BASE[path] | body | {"max_tokens": 1})
        assert reply.status_code == 200, reply.text


async def test_unknown_parameters_are_named(edge: Edge) -> None:
    error = error_of(await edge.http.post(COMPLETIONS, json={"prompt": "a", "max_token": 5}), 400, "max_token")
    assert error["code"] == "unknown_parameter"
    assert "max_tokens" in error["message"]
    reply = await edge.http.post(COMPLETIONS, json={"prompt": "a", "max_token": None, "max_tokens": 1})
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000,
        b"prompt=a&max_tokens=1",
        b"\x00" * 1000,
    ],
)
async def test_what_is_not_a_json_object_is_a_400(edge: Edge, raw: bytes) -> None:
    for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize"):
        reply = await edge.http.post(path, content=raw)
        assert reply.status_code == 400, (path, reply.text)
        error_of(reply, 400, reply.json()["error"]["param"])


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
async def test_the_content_type_does_not_matter(edge: Edge, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    reply = await edge.http.post(COMPLETIONS, content=orjson.dumps({"prompt": "a", "max_tokens": 1}), headers=headers)
    assert reply.status_code == 200


async def test_huge_bodies_are_a_413_with_and_without_a_content_length(edge: Edge) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * (MAX_BODY_BYTES // 16)

    for path in (COMPLETIONS, "/tokenize"):
        error_of(await edge.http.post(path, content=b" " * (MAX_BODY_BYTES + 1)), 413)
        error_of(await edge.http.post(path, content=pieces()), 413)
    just_fits = orjson.dumps({"prompt": "a", "max_tokens": 1}).ljust(MAX_BODY_BYTES)
    assert (await edge.http.post(COMPLETIONS, content=just_fits)).status_code == 200
    assert EdgeConfig(served_model_names=("m",), version="0").max_body_bytes == 16 << 20


async def test_a_large_prompt_is_refused_and_others_go_on(edge: Edge) -> None:
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": "word and " * 100_000}), 400, "prompt")
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": list(range(4000)) * 10}), 400, "prompt")
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": ["x"] * 20_000}), 400, "n")


async def test_unknown_models_routes_and_methods(edge: Edge) -> None:
    for path, body in BASE.items():
        error = error_of(await edge.http.post(path, json=body | {"model": "gpt-9"}), 404, "model")
        assert error["code"] == "model_not_found"
    error_of(await edge.http.get("/v1/models/gpt-9"), 404, "model")
    error_of(await edge.http.get("/v1/nothing"), 404)
    error_of(await edge.http.post("/v1/completions/"), 404)
    error_of(await edge.http.get(COMPLETIONS), 405)
    reply = await edge.http.delete("/v1/models")
    error_of(reply, 405)
    assert reply.headers["allow"] == "GET"


async def test_keys(tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
    async with running(make_served(tokenizer, defaults, api_key="sésame")) as edge:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sesame"}):
            for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/version", "/debug/route/x", "/nothing"):
                error = error_of(await edge.http.get(path, headers=headers), 401)
                assert error["type"] == "authentication_error"
            error_of(await edge.http.post(COMPLETIONS, content=b"{", headers=headers), 401)
        assert (await edge.http.get("/health")).status_code == 200
        right = httpx.Headers({b"authorization": "Bearer sésame".encode()})
        assert (await edge.http.get("/v1/models", headers=right)).status_code == 200
        async with edge.openai(api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


@pytest.mark.parametrize("given", ["0", "-5", "soon", "1.5", "9" * 30])
async def test_bad_timeouts(edge: Edge, given: str) -> None:
    headers = {"x-request-timeout-ms": given}
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": "a"}, headers=headers), 400, "x-request-timeout-ms")


FAILURES: list[tuple[RelevoError, int, type[openai.APIStatusError]]] = [
    (Exhausted("no room", retry_after_seconds=2.2), 429, openai.RateLimitError),
    (Unavailable("nobody there"), 503, openai.InternalServerError),
    (DeadlineExceeded("too late"), 504, openai.InternalServerError),
    (InvalidRequest("no such thing", "top_k"), 400, openai.BadRequestError),
    (Mismatch("layouts differ"), 500, openai.InternalServerError),
]


@pytest.mark.parametrize(("failure", "status", "error_class"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(
    edge: Edge, failure: RelevoError, status: int, error_class: type[openai.APIStatusError], stream: bool
) -> None:
    edge.dispatcher.script = lambda request: [failure]
    async with edge.openai() as client:
        with pytest.raises(error_class) as caught:
            await client.completions.create(model=NAME, prompt=["a", "b"], stream=stream, n=2)
    error_of(caught.value.response, status, getattr(failure, "param", None))
    assert caught.value.response.headers.get("retry-after") == {429: "3", 503: "5"}.get(status)
    begun = [generation for generation in edge.dispatcher.generations if generation.has_begun.is_set()]
    assert begun
    assert all(generation.closed.is_set() for generation in begun)


async def test_a_failure_after_the_first_token_is_the_streams_last_event(edge: Edge) -> None:
    edge.dispatcher.script = lambda request: [TokensEvent([300]), Unavailable("decode is gone")]
    reply = await edge.http.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert reply.status_code == 200
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert orjson.loads(events[-1])["error"] == {
        "message": "decode is gone",
        "type": "service_unavailable_error",
        "param": None,
        "code": None,
    }
    assert "[DONE]" not in reply.text
    async with edge.openai() as client:
        stream = await client.completions.create(model=NAME, prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="decode is gone"):
            async for _ in stream:
                pass


async def test_a_failure_after_the_first_token_is_a_status_when_nothing_was_sent(edge: Edge) -> None:
    edge.dispatcher.script = lambda request: [TokensEvent([300]), Unavailable("decode is gone")]
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": "a"}), 503)


async def test_a_bug_is_a_500_with_the_request_id(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    edge.dispatcher.script = lambda request: [ZeroDivisionError("secret")]
    for stream in (False, True):
        reply = await edge.http.post(
            COMPLETIONS, json={"prompt": "a", "stream": stream}, headers={"x-request-id": "find-me"}
        )
        error = error_of(reply, 500)
        assert "find-me" in error["message"]
        assert "secret" not in reply.text
    assert sum("find-me" in record.getMessage() and bool(record.exc_info) for record in caplog.records) == 2


async def test_a_bug_in_a_stream_is_an_event(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    edge.dispatcher.script = lambda request: [TokensEvent([300]), ZeroDivisionError("secret")]
    reply = await edge.http.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert "internal error" in reply.text.splitlines()[-2]
    assert "secret" not in reply.text
    assert any(record.exc_info for record in caplog.records)


async def test_a_request_that_the_server_cancelled_is_no_success(edge: Edge) -> None:
    edge.dispatcher.script = lambda request: [EndEvent(FinishReason.CANCELLED)]
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": "a"}), 503)


async def test_before_any_worker_was_seen_there_is_a_503(edge: Edge) -> None:
    edge.dispatcher.served = None
    error_of(await edge.http.post(COMPLETIONS, json={"prompt": "a"}), 503)
    error_of(await edge.http.post(CHATS, json={"messages": [USER]}), 503)
