"""Models, health, version, tokens and text, metrics, schema, request ids; and many requests at once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from relevo.tokenizer import Tokenizer
from tests.router.http.conftest import NAME, Edge
from tests.router.http.fakes import MODEL, sampled_ids


async def test_models(edge: Edge) -> None:
    async with edge.openai() as client:
        models = [model async for model in client.models.list()]
        one = await client.models.retrieve("alias")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nope")
    assert [model.id for model in models] == [NAME, "alias"]
    assert one.id == "alias"
    assert one.model_dump()["max_model_len"] == MODEL.max_model_len
    edge.dispatcher.served = None
    assert (await edge.http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_health_is_whether_a_request_could_be_served(edge: Edge) -> None:
    assert (await edge.http.get("/health")).json() == {"status": "ok"}
    edge.dispatcher.trouble = "Redis is gone"
    assert (await edge.http.get("/health")).json() == {"status": "ok", "warning": "Redis is gone"}
    edge.dispatcher.ready = False
    reply = await edge.http.get("/health")
    assert reply.status_code == 503
    assert reply.json()["error"]["type"] == "service_unavailable_error"


async def test_what_keeps_workers_away_is_named_to_clients(edge: Edge) -> None:
    edge.dispatcher.ready, edge.dispatcher.served, edge.dispatcher.reason = False, None, "set RELEVO_KV_TOKEN"
    for reply in (
        await edge.http.get("/health"),
        await edge.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}),
    ):
        assert reply.status_code == 503
        assert "set RELEVO_KV_TOKEN" in reply.json()["error"]["message"]


async def test_version(edge: Edge) -> None:
    assert (await edge.http.get("/version")).json() == {"version": "1.2.3"}


async def test_tokenize_and_detokenize(edge: Edge, tokenizer: Tokenizer) -> None:
    text = "The quick brown 😀"
    ids = tokenizer.encode(text)
    reply = (await edge.http.post("/tokenize", json={"prompt": text, "model": NAME})).json()
    assert reply == {"tokens": ids, "count": len(ids), "max_model_len": MODEL.max_model_len}
    bare = (await edge.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()["tokens"]
    assert bare == tokenizer.encode(text, add_special_tokens=False)
    assert (await edge.http.post("/detokenize", json={"tokens": bare})).json() == {"prompt": text}
    assert (await edge.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    long = await edge.http.post("/tokenize", json={"prompt": text * 3000})
    assert long.json()["count"] == len(tokenizer.encode(text * 3000))


async def test_tokenize_messages_gives_what_a_chat_begins_with(edge: Edge) -> None:
    messages = [{"role": "user", "content": "hi"}]
    reply = await edge.http.post("/tokenize", json={"messages": messages})
    await edge.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert reply.json()["tokens"] == list(edge.dispatcher.requests[0].prompt_token_ids)


async def test_request_ids_are_echoed_or_made(edge: Edge) -> None:
    given = await edge.http.get("/version", headers={"x-request-id": "my-id"})
    assert given.headers["x-request-id"] == "my-id"
    made = {(await edge.http.get("/version")).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    for odd in ("x" * 200, "a\tb", ""):
        reply = await edge.http.get("/version", headers={"x-request-id": odd})
        assert reply.headers["x-request-id"] != odd
    stream = await edge.http.post(
        "/v1/completions", json={"prompt": "a", "stream": True}, headers={"x-request-id": "mine"}
    )
    assert stream.headers["x-request-id"] == "mine"
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.text.endswith("data: [DONE]\n\n")


async def test_metrics(fresh_edge: Edge) -> None:
    edge = fresh_edge
    await edge.http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 8, "n": 2})
    await edge.http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 8, "stream": True})
    await edge.http.post("/v1/completions", json={"prompt": []})
    await edge.http.get("/v1/models/nope")
    await edge.http.get("/a/path/nobody/knows")
    reply = await edge.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = set(reply.text.splitlines())
    assert {
        'relevo_http_requests_total{endpoint="/v1/completions",status="200"} 2.0',
        'relevo_http_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'relevo_http_requests_total{endpoint="/v1/models/{model_id:path}",status="404"} 1.0',
        'relevo_http_requests_total{endpoint="other",status="404"} 1.0',
        'relevo_request_success_total{finished_reason="length"} 3.0',
        "relevo_prompt_tokens_total 6.0",
        "relevo_prompt_tokens_cached_total 8.0",
        "relevo_generation_tokens_total 24.0",
        "relevo_time_to_first_token_seconds_count 2.0",
        "relevo_inter_token_latency_seconds_count 21.0",
        "relevo_e2e_request_latency_seconds_count 2.0",
        "relevo_num_requests_running 0.0",
    } <= lines


async def test_the_schema_shows_parameters_and_replies(edge: Edge) -> None:
    schema = (await edge.http.get("/openapi.json")).json()
    assert (await edge.http.get("/docs")).status_code == 200
    completion = schema["components"]["schemas"]["CompletionRequest"]
    assert completion["required"] == ["prompt"]
    assert len(completion["properties"]["prompt"]["anyOf"]) == 4
    assert "repetition_penalty" in completion["properties"]
    for path, model in (("/v1/completions", "CompletionReply"), ("/v1/chat/completions", "ChatReply")):
        responses = schema["paths"][path]["post"]["responses"]
        assert responses["200"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{model}")
        assert responses["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")
        assert "422" not in responses


async def test_64_mixed_requests_at_once_are_all_right(edge: Edge, tokenizer: Tokenizer) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        prompt, length = f"number {number}", 1 + number % 23
        options: dict[str, Any] = {"model": NAME, "max_tokens": length, "seed": number}
        messages: Any = [{"role": "user", "content": prompt}]
        match number % 4:
            case 0:
                text = (await client.completions.create(prompt=prompt, **options)).choices[0].text
            case 1:
                chat = await client.chat.completions.create(messages=messages, **options)
                text = chat.choices[0].message.content or ""
            case 2:
                stream = await client.completions.create(prompt=prompt, stream=True, **options)
                text = "".join([chunk.choices[0].text async for chunk in stream])
            case _:
                chat_stream = await client.chat.completions.create(messages=messages, stream=True, **options)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in chat_stream])
        [request] = [request for request in edge.dispatcher.requests if request.sampling.seed == number]
        assert text == tokenizer.decode(sampled_ids(request))

    async with edge.openai() as client, asyncio.TaskGroup() as group:
        for number in range(64):
            group.create_task(one(client, number))
    assert len(edge.dispatcher.generations) == 64
