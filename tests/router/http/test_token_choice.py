"""Which tokens may be chosen, and how tokens are shown: what workers get of these parameters, and clients see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relevo.core.errors import Exhausted
from relevo.core.request import FinishReason
from relevo.tokenizer import Tokenizer
from services.router.generation import EndEvent, TokensEvent
from tests.router.http.conftest import Edge
from tests.router.http.fakes import make_logprobs, sampled, sampled_ids

TEXT = "Return a new list with the items in order."
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
}


async def ask(edge: Edge, path: str, **values: Any) -> dict[str, Any]:
    reply = await edge.http.post(path, json={**BODIES[path], "max_tokens": 4, "seed": 1, **values})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def stream(edge: Edge, path: str, **values: Any) -> list[dict[str, Any]]:
    reply = await edge.http.post(path, json={**BODIES[path], "max_tokens": 4, "seed": 1, "stream": True, **values})
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines[-1] == "[DONE]", reply.text
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("path", BODIES)
async def test_workers_are_told_which_tokens_may_be_chosen(edge: Edge, tokenizer: Tokenizer, path: str) -> None:
    values = {"allowed_token_ids": [5, 900], "bad_words": ["list", " new"], "logprob_token_ids": [4, 3]}
    await ask(edge, path, logprobs=True if "chat" in path else 1, **values)
    sampling = edge.dispatcher.requests[0].sampling
    assert list(sampling.allowed_token_ids) == [5, 900]
    assert list(sampling.logprob_token_ids) == [4, 3]
    words = [list(word.token_ids) for word in sampling.bad_words]
    assert words == [tokenizer.encode(text, add_special_tokens=False) for text in ("list", " list", "new", " new")]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [4096]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": "list"}, "bad_words"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
        ({"return_token_ids": 1}, "return_token_ids"),
    ],
)
async def test_nonsense_is_a_400_that_names_the_parameter(
    edge: Edge, path: str, values: dict[str, Any], param: str
) -> None:
    reply = await edge.http.post(path, json={**BODIES[path], **values})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert not edge.dispatcher.requests


async def test_prompts_are_truncated_from_the_left(edge: Edge, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    added = tokenizer.encode("")
    long_text = TEXT * 60  # far more than the context
    await ask(edge, "/v1/completions", truncate_prompt_tokens=6)
    await ask(edge, "/v1/completions", prompt=ids, truncate_prompt_tokens=6)
    await ask(edge, "/v1/completions", prompt=long_text, truncate_prompt_tokens=-1)
    await ask(edge, "/v1/chat/completions", truncate_prompt_tokens=6)
    text, given, most, chat = [list(request.prompt_token_ids) for request in edge.dispatcher.requests]
    assert text == [*added, *ids[len(added) - 6 :]]
    assert given == ids[-6:]
    assert most == [*added, *tokenizer.encode(long_text)[len(added) - 252 :]]
    rendered = tokenizer.render_chat(BODIES["/v1/chat/completions"]["messages"], add_generation_prompt=True)
    assert chat == tokenizer.encode(rendered, add_special_tokens=False)[-6:]


async def test_a_truncated_prompt_is_echoed_as_it_was_given_to_the_model(edge: Edge, tokenizer: Tokenizer) -> None:
    reply = await ask(edge, "/v1/completions", prompt=TEXT, truncate_prompt_tokens=6, echo=True)
    [request] = edge.dispatcher.requests
    assert reply["choices"][0]["text"] == tokenizer.decode([*request.prompt_token_ids, *sampled_ids(request)])


@pytest.mark.parametrize("n", [1, 2])
async def test_token_ids_are_returned(edge: Edge, n: int) -> None:
    reply = await ask(edge, "/v1/completions", return_token_ids=True, n=n)
    events = await stream(edge, "/v1/completions", return_token_ids=True, n=n)
    requests = edge.dispatcher.requests
    for index, request in enumerate(requests[:n]):
        choice = reply["choices"][index]
        assert choice["prompt_token_ids"] == list(request.prompt_token_ids)
        assert choice["token_ids"] == sampled_ids(request)
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert parts[0]["prompt_token_ids"] == list(request.prompt_token_ids)
        assert not any("prompt_token_ids" in part for part in parts[1:])
        assert [token for part in parts for token in part["token_ids"]] == sampled_ids(request)


@pytest.mark.parametrize("n", [1, 2])
async def test_token_ids_of_a_chat_are_returned(edge: Edge, n: int) -> None:
    path = "/v1/chat/completions"
    reply = await ask(edge, path, return_token_ids=True, n=n)
    events = await stream(edge, path, return_token_ids=True, n=n)
    prompt = list(edge.dispatcher.requests[0].prompt_token_ids)
    assert reply["prompt_token_ids"] == prompt == events[0]["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in events[1:])
    for index, request in enumerate(edge.dispatcher.requests[:n]):
        assert reply["choices"][index]["token_ids"] == sampled_ids(request)
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [token for part in parts for token in part.get("token_ids", [])] == sampled_ids(request)


async def test_without_being_asked_nobody_gets_token_ids(edge: Edge) -> None:
    for path in BODIES:
        for reply in (await ask(edge, path), *await stream(edge, path)):
            assert "token_ids" not in json.dumps(reply)


async def test_tokens_in_logprobs_are_written_as_ids(edge: Edge) -> None:
    reply = await ask(edge, "/v1/completions", logprobs=2, return_tokens_as_token_ids=True)
    chat = await ask(edge, "/v1/chat/completions", logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    first, second = map(sampled_ids, edge.dispatcher.requests)
    shown = reply["choices"][0]["logprobs"]
    assert shown["tokens"] == [f"token_id:{token}" for token in first]
    assert [list(top) for top in shown["top_logprobs"]] == [[f"token_id:{t}", f"token_id:{t + 1}"] for t in first]
    content = chat["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in second]
    assert [entry["top_logprobs"][1]["token"] for entry in content] == [f"token_id:{token + 1}" for token in second]


@pytest.mark.parametrize("stop_kind", ["string", "token"])
async def test_what_stopped_the_text_is_in_it_if_asked_for(edge: Edge, tokenizer: Tokenizer, stop_kind: str) -> None:
    ids = tokenizer.encode("one two stop", add_special_tokens=False)
    stop = {"stop": " stop"} if stop_kind == "string" else {"stop_token_ids": [ids[-1]]}
    hidden = tokenizer.decode(ids[:-1]) if stop_kind == "token" else "one two"

    def script(request: Any) -> Any:
        yield TokensEvent(ids, make_logprobs(ids, request))
        yield EndEvent(FinishReason.STOP)

    edge.dispatcher.script = script
    for include, expected in ((False, hidden), (True, "one two stop")):
        values = {**stop, "include_stop_str_in_output": include, "return_token_ids": True}
        reply = await ask(edge, "/v1/completions", **values)
        assert reply["choices"][0]["text"] == expected
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["choices"][0]["token_ids"] == ids
        events = await stream(edge, "/v1/chat/completions", **values)
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected


def prompt_entry(tokenizer: Tokenizer, token_id: int, count: int) -> dict[str, Any]:
    """As the fake makes them."""
    ids = {token_id + 1 - i: {"logprob": -1.0 - i, "rank": i + 1} for i in range(count)}
    ids.setdefault(token_id, {"logprob": -2.0, "rank": 2})
    return {str(i): {**values, "decoded_token": tokenizer.token_text(i)} for i, values in ids.items()}


@pytest.mark.parametrize("count", [0, 3])
async def test_prompt_logprobs_are_computed_once_and_shown_with_every_choice(
    edge: Edge, tokenizer: Tokenizer, count: int
) -> None:
    prompts = ["a list of", "the dict"]
    reply = await ask(edge, "/v1/completions", prompt=prompts, prompt_logprobs=count, n=2, add_special_tokens=False)
    requests = edge.dispatcher.requests
    asking = [request.sampling.HasField("prompt_logprobs") for request in requests]
    assert asking == [True, False, True, False]
    events = await stream(edge, "/v1/completions", prompt=prompts, prompt_logprobs=count, n=2, add_special_tokens=False)
    for index, request in enumerate(requests[:4]):
        ids = list(request.prompt_token_ids)
        expected = [None, *(prompt_entry(tokenizer, token_id, count) for token_id in ids[1:])]
        assert reply["choices"][index]["prompt_logprobs"] == expected
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert parts[0]["prompt_logprobs"] == expected
        assert not any("prompt_logprobs" in part for part in parts[1:])


async def test_a_chat_has_its_prompts_logprobs(edge: Edge, tokenizer: Tokenizer) -> None:
    path = "/v1/chat/completions"
    reply = await ask(edge, path, prompt_logprobs=1)
    ids = list(edge.dispatcher.requests[0].prompt_token_ids)
    expected = [None, *(prompt_entry(tokenizer, token_id, 1) for token_id in ids[1:])]
    assert reply["prompt_logprobs"] == expected
    events = await stream(edge, path, prompt_logprobs=1, n=2)
    assert events[0]["prompt_logprobs"] == expected
    assert not any("prompt_logprobs" in event for event in events[1:])


@pytest.mark.parametrize("streams", [False, True])
async def test_echo_with_logprobs_has_the_prompts(edge: Edge, tokenizer: Tokenizer, streams: bool) -> None:
    values: dict[str, Any] = {"prompt": TEXT, "echo": True, "logprobs": 1, "prompt_logprobs": 2}
    if streams:
        parts = [event["choices"][0] for event in await stream(edge, "/v1/completions", **values)]
    else:
        parts = (await ask(edge, "/v1/completions", **values))["choices"]
    [request] = edge.dispatcher.requests
    assert request.sampling.prompt_logprobs == 2
    ids = [*request.prompt_token_ids, *sampled_ids(request)]
    num_prompt_tokens = len(request.prompt_token_ids)
    logprobs = {
        key: [value for part in parts for value in part["logprobs"][key]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    text = "".join(part["text"] for part in parts)
    assert logprobs["tokens"] == [tokenizer.token_text(token_id) for token_id in ids]
    assert logprobs["token_logprobs"] == [None] + [-2.0] * (num_prompt_tokens - 1) + [-0.5] * 4
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:num_prompt_tokens]), "one, and the token itself"
    assert text.startswith(TEXT)
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert text[offset:].startswith(token)


async def test_echo_with_max_tokens_0_is_the_prompt_alone(edge: Edge) -> None:
    """What those ask who score texts."""
    reply = await ask(edge, "/v1/completions", prompt=[TEXT, "b"], echo=True, logprobs=1, max_tokens=0)
    for choice, request in zip(reply["choices"], edge.dispatcher.requests, strict=True):
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(request.prompt_token_ids)
        assert request.sampling.max_tokens == 1
    assert [choice["text"] for choice in reply["choices"]] == [TEXT, "b"]
    assert reply["usage"]["completion_tokens"] == 0
    refused = await edge.http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 0})
    assert refused.status_code == 400


async def test_if_the_choice_that_computes_them_fails_all_fail(edge: Edge) -> None:
    def script(request: Any) -> Any:
        if request.sampling.HasField("prompt_logprobs"):
            yield Exhausted("no room", 2.0)
        yield from sampled(request)

    edge.dispatcher.script = script
    reply = await edge.http.post("/v1/completions", json={"prompt": TEXT, "prompt_logprobs": 1, "n": 3})
    assert reply.status_code == 429
