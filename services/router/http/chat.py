"""POST /v1/chat/completions"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from relevo.core.errors import InvalidRequest
from services.router.http.answer import Answer, AnswerHead, Usage
from services.router.http.choice import Choice, Delta
from services.router.http.exchange import Exchange
from services.router.http.logprobs import ChatLogprobs, TokenNames, chat_logprobs
from services.router.http.prompt_logprobs import ShownLogprobs, show_prompt_logprobs
from services.router.http.protocol import ChatRequest
from services.router.http.sampling import TokenLimit, make_sampling
from services.router.http.serving import Prompt, Serving, run_long
from services.router.http.stream import GenerationResponse


class ReplyMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]


class ChatReply(TypedDict):
    """prompt_token_ids, and the choices' token_ids: with return_token_ids. prompt_logprobs: if asked for"""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[ShownLogprobs]


class MessageDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """usage: null until the last event, and only there if stream_options.include_usage asks for it

    prompt_token_ids, prompt_logprobs: in the first event, if asked for
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[ShownLogprobs]


async def create_chat_completion(serving: Serving, exchange: Exchange, body: ChatRequest) -> GenerationResponse:
    head = AnswerHead(f"chatcmpl-{secrets.token_hex(16)}", serving.model_name(body.model))
    newer = body.max_completion_tokens
    max_tokens = body.max_tokens if newer is None else newer
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = make_sampling(
        body, serving.defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs
    )
    await serving.structure.check(sampling.structured_outputs, body)
    text = render_chat(serving, body.messages, body.add_generation_prompt, body.chat_template_kwargs)
    prompt = await run_long(
        len(text),
        lambda: Prompt(
            serving.encode_prompt(text, "messages", add_special_tokens=body.add_special_tokens, sampling=sampling)
        ),
    )
    limit = TokenLimit(
        max_tokens,
        serving.defaults.max_tokens,
        prompt_param="messages",
        max_tokens_param="max_tokens" if newer is None else "max_completion_tokens",
    )
    payloads = ChatPayloads(serving, head, body, prompt)
    return serving.generate(exchange, head.id, [prompt], body, sampling, limit, payloads)


def render_chat(
    serving: Serving, messages: list[dict[str, Any]], add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
) -> str:
    """The model's chat template, filled in. Raises InvalidRequest if there is none, or if it refuses."""
    tokenizer = serving.require_tokenizer("messages")
    for name in template_kwargs:
        if name in _RESERVED_KWARGS:
            raise InvalidRequest(f"chat_template_kwargs must not hold {name!r}", "chat_template_kwargs")
    return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, **template_kwargs)


# What rendering itself is told; a request has other parameters for it, or none.
_RESERVED_KWARGS = frozenset(
    {
        "self",
        "messages",
        "conversations",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tools",
        "documents",
        "tokenize",
        "return_assistant_tokens_mask",
        "bos_token",
        "eos_token",
    }
)


class ChatPayloads:
    def __init__(self, serving: Serving, head: AnswerHead, body: ChatRequest, prompt: Prompt) -> None:
        self._head = head
        self._prompt = prompt
        self._names = TokenNames(serving.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._with_token_ids = body.return_token_ids
        self._with_logprobs = body.logprobs
        self._prompt_logprobs = body.prompt_logprobs
        self._include_usage = body.include_usage
        self._begun: set[int] = set()  # choices whose role was told

    def chunks(self, choice: Choice, delta: Delta) -> list[Mapping[str, Any]]:
        deltas: list[MessageDelta] = []
        is_first = not self._begun
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            deltas.append({"role": "assistant", "content": ""})
        logprobs = chat_logprobs(self._names, delta.logprobs) if self._with_logprobs and delta.logprobs else None
        shows_tokens = logprobs is not None or bool(self._with_token_ids and delta.token_ids)
        if delta.text or shows_tokens or delta.finish_reason is not None:
            deltas.append({"content": delta.text} if delta.text or shows_tokens else {})
        chunks = [
            self._chunk([{"index": choice.index, "delta": message, "logprobs": None, "finish_reason": None}])
            for message in deltas
        ]
        if chunks:
            last = chunks[-1]["choices"][0]
            last["logprobs"], last["finish_reason"] = logprobs, delta.finish_reason
            if self._with_token_ids:
                last["token_ids"] = list(delta.token_ids)
        if chunks and is_first and self._with_token_ids:
            chunks[0]["prompt_token_ids"] = self._prompt.token_ids
        if chunks and is_first and self._prompt_logprobs is not None and delta.prompt_logprobs is not None:
            chunks[0]["prompt_logprobs"] = show_prompt_logprobs(
                self._names, delta.prompt_logprobs, self._prompt_logprobs
            )
        return list[Mapping[str, Any]](chunks)

    def usage_chunk(self, usage: Usage) -> Mapping[str, Any]:
        return self._chunk([]) | {"usage": usage}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Mapping[str, Any]:
        reply: ChatReply = {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage,
        }
        if self._with_token_ids:
            reply["prompt_token_ids"] = self._prompt.token_ids
        entries = answers[0].prompt_logprobs
        if self._prompt_logprobs is not None and entries is not None:
            reply["prompt_logprobs"] = show_prompt_logprobs(self._names, entries, self._prompt_logprobs)
        return reply

    def _choice(self, answer: Answer) -> ChatChoice:
        shown: ChatChoice = {
            "index": answer.choice.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": chat_logprobs(self._names, answer.logprobs) if self._with_logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        if self._with_token_ids:
            shown["token_ids"] = answer.token_ids
        return shown

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self._head.id,
            "object": "chat.completion.chunk",
            "created": self._head.created,
            "model": self._head.model,
            "choices": choices,
        }
        if self._include_usage:
            chunk["usage"] = None
        return chunk
