"""/v1/chat/completions through the real openai client."""

from __future__ import annotations

import pytest
from openai.types.chat import ChatCompletionMessageParam

from relevo.core.request import FinishReason
from relevo.tokenizer import Tokenizer
from tests.router.http.conftest import NAME, Edge
from tests.router.http.fakes import MODEL, one_by_one, sampled_ids

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "a list?"}]},
]
RENDERED = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "What is\na list?"}]


async def test_the_template_makes_the_prompt_and_the_rest_of_the_context_is_for_the_answer(
    edge: Edge, tokenizer: Tokenizer
) -> None:
    async with edge.openai() as client:
        reply = await client.chat.completions.create(model="alias", messages=MESSAGES, seed=1)
    [request] = edge.dispatcher.requests
    prompt = tokenizer.render_chat(RENDERED)
    assert list(request.prompt_token_ids) == tokenizer.encode(prompt, add_special_tokens=False)
    assert request.sampling.max_tokens == MODEL.max_model_len - len(request.prompt_token_ids)
    assert reply.object == "chat.completion"
    assert reply.model == "alias"
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(sampled_ids(request))
    assert choice.finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == request.sampling.max_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 4


async def test_a_stream_says_the_same_as_the_whole(edge: Edge) -> None:
    async with edge.openai() as client:
        whole = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_completion_tokens=9, seed=2, n=3
        )
        stream = await client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_completion_tokens=9,
            seed=2,
            n=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    texts = ["", "", ""]
    roles: list[list[str]] = [[], [], []]
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert roles == [["assistant"]] * 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_without_include_usage_a_stream_has_no_usage(edge: Edge) -> None:
    async with edge.openai() as client:
        stream = await client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2, stream=True)
        assert all([chunk.usage is None and chunk.choices async for chunk in stream])


async def test_logprobs(edge: Edge, tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode(" yes é", add_special_tokens=False)
    edge.dispatcher.script = lambda request: one_by_one(answer, request)
    async with edge.openai() as client:
        reply = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=20, logprobs=True, top_logprobs=2
        )
        stream = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=20, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content) == " yes é".encode()
    assert [entry.token for entry in logprobs.content] == [tokenizer.token_text(token_id) for token_id in answer]
    assert [[top.logprob for top in entry.top_logprobs] for entry in logprobs.content] == [[-0.5, -1.5]] * len(answer)
    assert [entry for part in streamed if part for entry in part.content or []] == logprobs.content


async def test_logprobs_without_top_logprobs(edge: Edge) -> None:
    async with edge.openai() as client:
        reply = await client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=1, logprobs=True)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].top_logprobs == []


async def test_a_chat_stops(edge: Edge, tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode("Sure. User: and then?", add_special_tokens=False)
    edge.dispatcher.script = lambda request: one_by_one(answer, request, FinishReason.STOP)
    async with edge.openai() as client:
        stream = await client.chat.completions.create(model=NAME, messages=MESSAGES, stop="User:", stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in chunks) == "Sure. "
    assert chunks[-1].finish_reason == "stop"


async def test_the_prompt_can_be_left_open(edge: Edge, tokenizer: Tokenizer) -> None:
    async with edge.openai() as client:
        await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=1, extra_body={"add_generation_prompt": False}
        )
    prompt = tokenizer.render_chat(RENDERED, add_generation_prompt=False)
    expected = tokenizer.encode(prompt, add_special_tokens=False)
    assert list(edge.dispatcher.requests[0].prompt_token_ids) == expected


async def test_parameters_reach_the_workers(edge: Edge) -> None:
    async with edge.openai() as client:
        await client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=11,
            temperature=0.25,
            top_p=0.5,
            seed=2**63 - 1,
            presence_penalty=1.5,
            frequency_penalty=-1.5,
            logit_bias={"17": -100, "18": 3},
            user="somebody",
            extra_body={
                "top_k": 5,
                "min_p": 0.125,
                "min_tokens": 3,
                "repetition_penalty": 1.25,
                "ignore_eos": True,
                "stop_token_ids": [7, 8],
                "cache_salt": "mine",
            },
            extra_headers={"x-request-timeout-ms": "5000"},
        )
    [request] = edge.dispatcher.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (11, 3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 5, 0.125)
    assert sampling.seed == 2**63 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.5, -1.5, 1.25)
    assert dict(sampling.logit_bias) == {17: -100, 18: 3}
    assert not sampling.HasField("logprobs")
    assert list(sampling.stop_token_ids) == [7, 8]
    assert sampling.ignore_eos
    assert request.cache_salt == "mine"
    assert 4000 < request.timeout_ms <= 5000


async def test_the_models_defaults_apply_where_the_request_says_nothing(edge: Edge) -> None:
    """The demo model's generation_config.json says temperature 0.7 and top_p 0.95."""
    async with edge.openai() as client:
        await client.chat.completions.create(model=NAME, messages=MESSAGES)
        await client.chat.completions.create(
            model=NAME, messages=MESSAGES, temperature=0, top_p=None, extra_body={"top_k": -1}
        )
    first, second = (request.sampling for request in edge.dispatcher.requests)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.7, 0.95, 0, 1.0)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 0.95, 0)
    assert edge.dispatcher.requests[0].timeout_ms == 0


@pytest.mark.parametrize("name", ["messages", "tools", "self", "conversations"])
async def test_template_arguments_cannot_replace_parameters(edge: Edge, name: str) -> None:
    body = {"model": NAME, "messages": MESSAGES, "chat_template_kwargs": {name: []}}
    reply = await edge.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "chat_template_kwargs"
