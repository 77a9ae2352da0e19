"""POST /v1/completions"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from relevo.core.sampling_params import SamplingParams
from relevo.prompts import truncate_prompt
from services.router.http.answer import Answer, AnswerHead, Usage
from services.router.http.choice import Choice, Delta
from services.router.http.exchange import Exchange
from services.router.http.logprobs import CompletionLogprobs, TextOffsets, TokenNames, completion_logprobs
from services.router.http.prompt_logprobs import ShownLogprobs, cut_top, show_prompt_logprobs
from services.router.http.protocol import CompletionRequest
from services.router.http.protocol import Prompt as GivenPrompt
from services.router.http.sampling import TokenLimit, make_sampling
from services.router.http.serving import Prompt, Serving, run_long
from services.router.http.stream import GenerationResponse

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionChoice(TypedDict):
    """token_ids, prompt_token_ids: with return_token_ids. What is the prompt's is in a choice's first event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[ShownLogprobs]


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
    max_tokens = 1 if body.asks_for_prompt_alone else body.max_tokens
    wanted = (body.prompt_logprobs, body.logprobs if body.echo else None)
    sampling = make_sampling(
        body,
        serving.defaults,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max((count for count in wanted if count is not None), default=None),
    )
    await serving.structure.check(sampling.structured_outputs, body)
    serving.check_num_choices(len(body.prompt), body.n)
    prompts = await run_long(
        sum(map(len, body.prompt)), lambda: [_read_prompt(serving, given, body, sampling) for given in body.prompt]
    )
    payloads = CompletionPayloads(serving, head, body, prompts)
    limit = TokenLimit(max_tokens, default, prompt_param="prompt", prompt_alone=body.asks_for_prompt_alone)
    return serving.generate(exchange, head.id, prompts, body, sampling, limit, payloads)


def _read_prompt(serving: Serving, given: GivenPrompt, body: CompletionRequest, sampling: SamplingParams) -> Prompt:
    if isinstance(given, str):
        token_ids = serving.encode_prompt(
            given, "prompt", add_special_tokens=body.add_special_tokens, sampling=sampling
        )
        if body.truncate_prompt_tokens is None or not body.echo:
            return Prompt(token_ids, given)
        given = token_ids
    else:
        given = truncate_prompt(given, sampling, serving.model().max_model_len, None)
    if not body.echo:
        return Prompt(given)
    if serving.tokenizer is None:
        return Prompt(given, "".join(f"{token_id} " for token_id in given))
    return Prompt(given, serving.tokenizer.decode(given, skip_special_tokens=body.skip_special_tokens))


class CompletionPayloads:
    def __init__(self, serving: Serving, head: AnswerHead, body: CompletionRequest, prompts: Sequence[Prompt]) -> None:
        self._head = head
        self._names = TokenNames(serving.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._prompts = prompts
        self._with_token_ids = body.return_token_ids
        self._skip_special_tokens = body.skip_special_tokens
        self._logprobs = body.logprobs
        self._prompt_logprobs = body.prompt_logprobs
        self._echo = body.echo
        self._include_usage = body.include_usage
        # The text that each prompt's choices begin with.
        self._echoes = [prompt.text if body.echo else "" for prompt in prompts]
        self._offsets: dict[int, TextOffsets] = {}  # by choice; of those that have begun

    def chunks(self, choice: Choice, delta: Delta) -> list[Mapping[str, Any]]:
        text = delta.text
        if choice.index not in self._offsets:
            text = self._echoes[choice.prompt_index] + text
        shows_tokens = self._with_token_ids or (self._logprobs is not None and delta.logprobs)
        if not text and not (shows_tokens and delta.token_ids) and delta.finish_reason is None:
            return []
        reply = self._reply([self._choice(choice, text, delta)])
        if self._include_usage:
            reply["usage"] = None
        return [reply]

    def usage_chunk(self, usage: Usage) -> Mapping[str, Any]:
        return self._reply([]) | {"usage": usage}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Mapping[str, Any]:
        choices = [
            self._choice(answer.choice, self._echoes[answer.choice.prompt_index] + answer.text, answer)
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

    def _choice(self, choice: Choice, text: str, part: Delta | Answer) -> CompletionChoice:
        offsets = self._offsets.get(choice.index)
        is_first = offsets is None
        if offsets is None:
            offsets = self._offsets[choice.index] = TextOffsets(self._names, self._skip_special_tokens)
        shown: CompletionChoice = {
            "index": choice.index,
            "text": text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
        }
        prompt = self._prompts[choice.prompt_index].token_ids
        entries = part.prompt_logprobs
        if self._logprobs is not None:
            echoed = (prompt[0], cut_top(entries, self._logprobs)) if self._echo and entries is not None else None
            shown["logprobs"] = completion_logprobs(self._names, offsets, part.logprobs, echoed)
        if self._prompt_logprobs is not None and entries is not None:
            shown["prompt_logprobs"] = show_prompt_logprobs(self._names, entries, self._prompt_logprobs)
        if self._with_token_ids:
            shown["token_ids"] = list(part.token_ids)
            if is_first:
                shown["prompt_token_ids"] = prompt
        return shown
