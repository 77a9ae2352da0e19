"""POST /v1/completions"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from services.pb import messages_pb2
from services.router.http.answer import Answer, AnswerHead, Usage
from services.router.http.choice import Choice, Delta
from services.router.http.exchange import Exchange
from services.router.http.logprobs import CompletionLogprobs, TextOffsets, TokenNames, completion_logprobs
from services.router.http.protocol import CompletionRequest
from services.router.http.protocol import Prompt as GivenPrompt
from services.router.http.sampling import TokenLimit, make_sampling
from services.router.http.serving import Prompt, Serving, run_long
from services.router.http.stream import GenerationResponse

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionReply(TypedDict):
    """usage: not in the events of a stream, unless stream_options.include_usage asks for it"""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


async def create_completion(serving: Serving, exchange: Exchange, body: CompletionRequest) -> GenerationResponse:
    head = AnswerHead(f"cmpl-{secrets.token_hex(16)}", serving.model_name(body.model))
    default = serving.defaults.max_tokens or DEFAULT_MAX_TOKENS
    sampling = make_sampling(body, serving.defaults, max_tokens=body.max_tokens, logprobs=body.logprobs)
    serving.check_num_choices(len(body.prompt), body.n)
    prompts = await run_long(
        sum(map(len, body.prompt)), lambda: [_read_prompt(serving, given, body) for given in body.prompt]
    )
    payloads = CompletionPayloads(serving, head, body, [prompt.text for prompt in prompts])
    limit = TokenLimit(body.max_tokens, default, prompt_param="prompt")
    return serving.generate(exchange, head.id, prompts, body, sampling, limit, payloads)


def _read_prompt(serving: Serving, given: GivenPrompt, body: CompletionRequest) -> Prompt:
    if isinstance(given, str):
        token_ids = serving.encode_prompt(given, "prompt", add_special_tokens=body.add_special_tokens)
        return Prompt(token_ids, given)
    if not body.echo:
        return Prompt(given)
    if serving.tokenizer is None:
        return Prompt(given, "".join(f"{token_id} " for token_id in given))
    return Prompt(given, serving.tokenizer.decode(given, skip_special_tokens=body.skip_special_tokens))


class CompletionPayloads:
    """echoes: the text that each prompt's choices begin with, if echo is set"""

    def __init__(self, serving: Serving, head: AnswerHead, body: CompletionRequest, echoes: Sequence[str]) -> None:
        self._head = head
        self._names = TokenNames(serving.tokenizer)
        self._skip_special_tokens = body.skip_special_tokens
        self._with_logprobs = body.logprobs is not None
        self._include_usage = body.include_usage
        self._echoes = echoes if body.echo else [""] * len(echoes)
        self._offsets: dict[int, TextOffsets] = {}  # by choice; of those that have begun

    def chunks(self, choice: Choice, delta: Delta) -> list[Mapping[str, Any]]:
        text = delta.text
        if choice.index not in self._offsets:
            text = self._echoes[choice.prompt_index] + text
        if not text and not (self._with_logprobs and delta.logprobs) and delta.finish_reason is None:
            return []
        reply = self._reply([self._choice(choice, text, delta.logprobs, delta.finish_reason)])
        if self._include_usage:
            reply["usage"] = None
        return [reply]

    def usage_chunk(self, usage: Usage) -> Mapping[str, Any]:
        return self._reply([]) | {"usage": usage}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Mapping[str, Any]:
        choices = [
            self._choice(
                answer.choice,
                self._echoes[answer.choice.prompt_index] + answer.text,
                answer.logprobs,
                answer.finish_reason,
            )
            for answer in answers
        ]
        return self._reply(choices) | {"usage": usage}

    def _reply(self, choices: list[CompletionChoice]) -> CompletionReply:
        head = self._head
        return {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }

    def _choice(
        self,
        choice: Choice,
        text: str,
        entries: Sequence[messages_pb2.TokenLogprobs],
        finish_reason: str | None,
    ) -> CompletionChoice:
        offsets = self._offsets.get(choice.index)
        if offsets is None:
            offsets = self._offsets[choice.index] = TextOffsets(self._names, self._skip_special_tokens)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": completion_logprobs(self._names, offsets, entries) if self._with_logprobs else None,
            "finish_reason": finish_reason,
        }
