"""/v1/completions through the real openai client."""

from __future__ import annotations

import openai
import pytest

from relevo.core.request import FinishReason
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.router.generation import EndEvent, TokensEvent
from tests.router.http.conftest import NAME, Edge, make_served, running
from tests.router.http.fakes import HANG, make_logprobs, one_by_one, sampled_ids

TEXT = "Return a new list with the items in order."


async def test_a_string_is_completed(edge: Edge, tokenizer: Tokenizer) -> None:
    async with edge.openai() as client:
        reply = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=5, seed=1)
    [request] = edge.dispatcher.requests
    assert list(request.prompt_token_ids) == tokenizer.encode(TEXT)
    assert request.request_id == f"{reply.id}-0"
    assert reply.object == "text_completion"
    assert reply.model == NAME
    [choice] = reply.choices
    assert choice.text == tokenizer.decode(sampled_ids(request))
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(request.prompt_token_ids)
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == len(request.prompt_token_ids) + 5
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 4


async def test_sixteen_tokens_are_the_default(edge: Edge) -> None:
    async with edge.openai() as client:
        await client.completions.create(model=NAME, prompt=TEXT)
        await client.completions.create(model=NAME, prompt=[7] * 250)
    assert [request.sampling.max_tokens for request in edge.dispatcher.requests] == [16, 6]


async def test_the_four_shapes_of_a_prompt(edge: Edge, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    async with edge.openai() as client:
        for prompt in (TEXT, [TEXT, TEXT], ids, [ids, ids]):
            reply = await client.completions.create(model=NAME, prompt=prompt, max_tokens=3, seed=7)
            one = tokenizer.decode(sampled_ids(edge.dispatcher.requests[0]))
            assert {choice.text for choice in reply.choices} == {one}
            assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
    assert [list(request.prompt_token_ids) for request in edge.dispatcher.requests] == [ids] * 6


async def test_n_choices_differ_and_the_first_is_that_of_n_1(edge: Edge) -> None:
    async with edge.openai() as client:
        alone = await client.completions.create(model=NAME, prompt=["a", "b"], max_tokens=4, seed=3)
        reply = await client.completions.create(model=NAME, prompt=["a", "b"], max_tokens=4, seed=3, n=3)
    texts = [choice.text for choice in reply.choices]
    assert len(set(texts)) == 6
    assert [texts[0], texts[3]] == [choice.text for choice in alone.choices]
    assert reply.usage is not None
    assert alone.usage is not None
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
    assert reply.usage.completion_tokens == 24


async def test_without_a_seed_every_prompt_gets_its_own(edge: Edge) -> None:
    async with edge.openai() as client:
        await client.completions.create(model=NAME, prompt=["a", "a"], n=2, max_tokens=1)
    assert len({request.sampling.seed for request in edge.dispatcher.requests}) == 4


async def test_a_stream_says_the_same_as_the_whole(edge: Edge) -> None:
    async with edge.openai() as client:
        whole = await client.completions.create(model=NAME, prompt=["x", "y"], max_tokens=12, seed=5, n=2, echo=True)
        stream = await client.completions.create(
            model=NAME,
            prompt=["x", "y"],
            max_tokens=12,
            seed=5,
            n=2,
            echo=True,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts = [""] * 4
        reasons: list[str | None] = [None] * 4
        usage = None
        async for chunk in stream:
            assert usage is None, "usage comes last"
            for choice in chunk.choices:
                assert reasons[choice.index] is None, "nothing comes after a finish_reason"
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason
            usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert all(text[0] == prompt for text, prompt in zip(texts, "xxyy", strict=True))
    assert reasons == ["length"] * 4
    assert usage == whole.usage


async def test_echo_of_token_ids_is_their_text(edge: Edge, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    async with edge.openai() as client:
        reply = await client.completions.create(model=NAME, prompt=ids, max_tokens=1, echo=True)
    assert reply.choices[0].text.startswith(TEXT)


async def test_logprobs_name_tokens_and_where_they_begin(edge: Edge, tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode(" the words é", add_special_tokens=False)
    edge.dispatcher.script = lambda request: one_by_one(answer, request)
    async with edge.openai() as client:
        reply = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=20, logprobs=2)
        stream = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=20, logprobs=2, stream=True)
        streamed = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [tokenizer.token_text(token_id) for token_id in answer]
    assert logprobs.token_logprobs == [-0.5] * len(answer)
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    for token_id, top in zip(answer, logprobs.top_logprobs, strict=True):
        assert next(iter(top.items())) == (tokenizer.token_text(token_id), -0.5)
    text = reply.choices[0].text
    assert [text[at : at + 4] for at in logprobs.text_offset[:1]] == [text[:4]]
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert logprobs.text_offset[-1] < len(text)
    assert [offset for part in streamed if part for offset in part.text_offset or []] == logprobs.text_offset
    assert [token for part in streamed if part for token in part.tokens or []] == logprobs.tokens


async def test_logprobs_0_gives_the_chosen_token_alone(edge: Edge) -> None:
    async with edge.openai() as client:
        reply = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=2, logprobs=0)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert [list(top.values()) for top in logprobs.top_logprobs] == [[-0.5], [-0.5]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_across_token_borders(
    edge: Edge, tokenizer: Tokenizer, stream: bool
) -> None:
    before, after = "one two", " three four five"
    answer = [*tokenizer.encode(before, add_special_tokens=False), *tokenizer.encode(after, add_special_tokens=False)]
    stop = "wo thr"
    num_used = next(n for n in range(len(answer)) if stop in tokenizer.decode(answer[:n]))
    edge.dispatcher.script = lambda request: [TokensEvent([i], make_logprobs([i], request)) for i in answer] + [HANG]
    async with edge.openai() as client:
        reply = await client.completions.create(
            model=NAME, prompt=TEXT, max_tokens=50, stop=["nowhere", stop], logprobs=0, stream=stream
        )
        if isinstance(reply, openai.AsyncStream):
            choices = [chunk.choices[0] async for chunk in reply]
        else:
            choices = reply.choices
            assert reply.usage is not None
            assert reply.usage.completion_tokens == num_used
    assert "".join(choice.text for choice in choices) == "one t"
    assert choices[-1].finish_reason == "stop"
    assert sum(len(choice.logprobs.tokens or []) for choice in choices if choice.logprobs) == num_used
    [generation] = edge.dispatcher.generations
    assert generation.closed.is_set()
    assert generation.num_pulled == num_used


async def test_the_token_that_stops_is_counted_and_not_shown(edge: Edge, tokenizer: Tokenizer) -> None:
    words = tokenizer.encode(" a b", add_special_tokens=False)
    edge.dispatcher.script = lambda request: one_by_one([*words, 999], request, FinishReason.STOP)
    async with edge.openai() as client:
        reply = await client.completions.create(
            model=NAME, prompt=TEXT, max_tokens=50, extra_body={"stop_token_ids": [999]}
        )
    assert list(edge.dispatcher.requests[0].sampling.stop_token_ids) == [999]
    assert reply.choices[0].text == " a b"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(words) + 1


async def test_eos_is_not_text_even_with_special_tokens_shown(
    edge: Edge, tokenizer: Tokenizer, defaults: GenerationDefaults
) -> None:
    eos = defaults.eos_token_ids[0]
    word = tokenizer.encode(" a", add_special_tokens=False)
    edge.dispatcher.script = lambda request: one_by_one([*word, eos], request, FinishReason.STOP)
    texts = []
    async with edge.openai() as client:
        for ignore_eos in (False, True):
            reply = await client.completions.create(
                model=NAME,
                prompt=TEXT,
                max_tokens=5,
                extra_body={"skip_special_tokens": False, "ignore_eos": ignore_eos},
            )
            texts.append(reply.choices[0].text)
    assert texts == [" a", " a" + tokenizer.decode([eos], skip_special_tokens=False)]


async def test_cached_tokens_known_early_survive_a_stop_string(edge: Edge, tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode("a stop", add_special_tokens=False)
    edge.dispatcher.script = lambda request: [TokensEvent(answer, (), num_cached_tokens=3), HANG]
    async with edge.openai() as client:
        reply = await client.completions.create(model=NAME, prompt=TEXT, stop="stop")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 3


async def test_half_a_character_is_never_sent(edge: Edge, tokenizer: Tokenizer) -> None:
    text = "😀 日本 é ✓"
    ids = tokenizer.encode(text, add_special_tokens=False)
    edge.dispatcher.script = lambda request: one_by_one(ids, request)
    async with edge.openai() as client:
        stream = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=100, stream=True)
        texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts) == text
    assert not any("\ufffd" in part for part in texts)


async def test_tokens_of_one_event_are_one_chunk(edge: Edge, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four", add_special_tokens=False)
    edge.dispatcher.script = lambda request: [TokensEvent(ids), EndEvent(FinishReason.STOP)]
    async with edge.openai() as client:
        stream = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=100, stream=True)
        texts = [chunk.choices[0].text async for chunk in stream]
    assert texts == ["one two three four", ""]


async def test_a_model_without_tokenizer_speaks_in_ids() -> None:
    served = make_served(None, GenerationDefaults())
    async with running(served) as edge, edge.openai() as client:
        reply = await client.completions.create(model=NAME, prompt=[1, 2, 3], max_tokens=3, seed=1, logprobs=1)
        ids = sampled_ids(edge.dispatcher.requests[0])
        assert reply.choices[0].text.split() == [str(token_id) for token_id in ids]
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            await client.completions.create(model=NAME, prompt="text")
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            await client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "text"}])
