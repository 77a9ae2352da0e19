"""The bodies of requests: what each endpoint takes, and what it refuses by name.

Field names are OpenAI's, and vLLM's where OpenAI has none. A parameter is either a field of its model, or in the
model's table of what we do not support (unsupported.py), or unknown. Ranges are mostly SamplingParams' to check.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import MAX_LOGPROB_TOKEN_IDS, MAX_LOGPROBS, LogitsProcessorCall
from services.router.http.errors import UnknownParameter, UnsupportedParameter
from services.router.http.logits_processors import LogitsProcessorBody, parse_logits_processors
from services.router.http.messages import Messages
from services.router.http.structure import ResponseFormat, StructuredOutputsBody
from services.router.http.unsupported import ANY, CHAT, COMPLETION, Harmless

MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_SPECULATIVE_TOKENS = 2**32 - 1
MAX_PRIORITY = 2**31 - 1
MAX_ALLOWED_IDS = 65_536
MAX_BAD_WORDS = 256
MAX_LISTED_IDS = 1024  # in logit_bias and stop_token_ids: gRPC messages stay under 1 MiB

Prompt = str | list[int]


def parse_prompts(value: object) -> list[Prompt]:
    """The four shapes that OpenAI allows, as a list of prompts. Ids are checked to be integers, not to be in range."""
    if isinstance(value, str) or _is_ids(value):
        prompts: list[Prompt] = [value]  # type: ignore[list-item]  # _is_ids knows
    elif isinstance(value, list) and (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        prompts = value
    else:
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
            "prompt",
        )
    if not prompts or not all(prompts):
        raise InvalidRequest("prompt must not be empty", "prompt")
    return prompts


def parse_stop(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise InvalidRequest("stop must be a string or a list of strings", "stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop must hold at most {MAX_STOP_STRINGS} strings, not {len(strings)}", "stop")
    return tuple(strings)


def parse_logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() and len(key) < 20 for key in value):
        raise InvalidRequest("logit_bias must be an object from token ids to numbers", "logit_bias")
    if len(value) > MAX_LISTED_IDS:
        raise InvalidRequest(f"logit_bias must hold at most {MAX_LISTED_IDS} tokens, not {len(value)}", "logit_bias")
    return {int(key): bias for key, bias in value.items()}


class RequestBody(BaseModel):
    """Strict: a string is no number, 1 is no boolean. null is as if the parameter were not there."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    unsupported: ClassVar[Mapping[str, Harmless]] = {}

    model: str | None = Field(None, description="One of /v1/models. Left out: the one that is served.")

    @classmethod
    def take_known(cls, body: dict[str, Any]) -> dict[str, Any]:
        """The body without nulls and without parameters that ask for nothing; refuses those that ask for something."""
        known = {}
        for name, value in body.items():
            if value is None:
                continue
            if name in cls.model_fields:
                known[name] = value
            elif name not in cls.unsupported:
                raise UnknownParameter(_unknown(name, cls.model_fields), name)
            else:
                harmless = cls.unsupported[name]
                if harmless is not ANY and not any(_same(value, allowed) for allowed in harmless):
                    raise UnsupportedParameter(f"{name} is not supported yet{_but(harmless)}", name)
        return known


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = Field(None, description="A last event with the usage of the whole request.")
    include_obfuscation: Literal[False] | None = Field(None, description="OpenAI's padding; not done here.")
    continuous_usage_stats: Literal[False] | None = Field(None, description="vLLM's; not done here.")


class SamplingBody(RequestBody):
    """What both generating endpoints take. None: the model's generation_config.json decides, then OpenAI's default."""

    frequency_penalty: float | None = Field(None, description="-2 to 2")
    presence_penalty: float | None = Field(None, description="-2 to 2")
    repetition_penalty: float | None = Field(None, description="above 0; 1 = off")
    temperature: float | None = Field(None, description="0 = greedy")
    top_p: float | None = Field(None, description="above 0, at most 1; 1 = off")
    top_k: int | None = Field(None, description="0 or -1 = off")
    min_p: float | None = Field(None, description="0 to 1; 0 = off")
    seed: int | None = Field(None, description="0 to 2^63-1. The same seed gives the same answer.")
    logit_bias: Annotated[
        dict[int, float], PlainValidator(parse_logit_bias, json_schema_input_type=dict[str, float])
    ] = Field({}, description="Added to the logits of token ids; -100 to 100.")
    max_tokens: int | None = Field(None, description="Output tokens at most.")
    min_tokens: int | None = Field(None, description="Before so many output tokens nothing ends the answer.")
    stop: Annotated[tuple[str, ...], PlainValidator(parse_stop, json_schema_input_type=str | list[str])] = Field(
        (), description=f"The text ends before the first of these; at most {MAX_STOP_STRINGS}."
    )
    stop_token_ids: list[int] = Field([], max_length=MAX_LISTED_IDS, description="These end the answer.")
    ignore_eos: bool = False
    num_speculative_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        description="Most drafts a step; 0 = none. Changes speed, never the answer.",
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    include_stop_str_in_output: bool = Field(False, description="The text ends with what ended it.")
    allowed_token_ids: list[int] | None = Field(
        None, min_length=1, max_length=MAX_ALLOWED_IDS, description="No other tokens are chosen."
    )
    bad_words: list[str] = Field(
        [], max_length=MAX_BAD_WORDS, description="Not in the output, with or without a space before them."
    )
    logprob_token_ids: list[int] = Field(
        [],
        max_length=MAX_LOGPROB_TOKEN_IDS,
        description=f"With logprobs: these tokens', not the likeliest ones'; at most {MAX_LOGPROB_TOKEN_IDS}.",
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description=f"As logprobs, of the prompt; 0 to {MAX_LOGPROBS}.",
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Only so many of the prompt's last tokens; -1 = as many as fit beside max_tokens."
    )
    return_token_ids: bool = Field(False, description="prompt_token_ids and token_ids in the answer.")
    return_tokens_as_token_ids: bool = Field(False, description='Tokens in logprobs are written "token_id:7".')
    logits_processors: Annotated[
        list[LogitsProcessorCall],
        PlainValidator(parse_logits_processors, json_schema_input_type=list[str | LogitsProcessorBody]),
    ] = Field([], description="Custom ones that workers have installed, by name.")
    response_format: ResponseFormat | None = Field(
        None, description="What the answer is: `text`, `json_object`, or `json_schema`, which it then always fits."
    )
    structured_outputs: StructuredOutputsBody | None = Field(
        None, description="What the answer fits: one of `json`, `json_object`, `regex`, `choice`, `grammar`."
    )
    n: int = Field(1, ge=1, le=MAX_N, description="Choices for each prompt.")
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="So many are made, the n likeliest kept.")
    use_beam_search: bool = Field(False, description="The n best of best_of beams; nothing is drawn.")
    length_penalty: float = Field(1.0, description="Of beams: above 0 favours long ones.")
    early_stopping: bool | Literal["never"] = Field(False, description="When a beam search ends, as in transformers.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = Field("", max_length=256, description="Only requests with the same salt share cached blocks.")
    priority: int = Field(
        0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="Where something is full, the lowest goes first; on a worker it takes the place of higher ones.",
    )
    user: str | None = Field(None, description="Not used.")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """How many are made for each prompt, to keep n."""
        return self.n if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _best_of_is_known_at_the_end(self) -> Self:
        if self.stream and self.num_choices > self.n and not self.use_beam_search:
            raise InvalidRequest(
                f"which {self.n} of best_of {self.best_of} are the likeliest is known when all have ended: no stream",
                "best_of",
            )
        return self

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream: true", "stream_options")
        return self


class CompletionRequest(SamplingBody):
    """POST /v1/completions"""

    unsupported: ClassVar[Mapping[str, Harmless]] = COMPLETION

    prompt: Annotated[
        list[Prompt],
        PlainValidator(parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    add_special_tokens: bool = Field(True, description="Whether the tokenizer adds BOS and the like.")
    echo: bool = Field(False, description="The text begins with the prompt, the logprobs with the prompt's.")
    logprobs: int | None = Field(None, description=f"For each token, the likeliest so many; 0 to {MAX_LOGPROBS}.")

    @property
    def asks_for_prompt_alone(self) -> bool:
        """echo with max_tokens 0: nothing is to be generated."""
        return self.echo and self.max_tokens == 0


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions"""

    unsupported: ClassVar[Mapping[str, Harmless]] = CHAT

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"For each token, the likeliest so many; 0 to {MAX_LOGPROBS}."
    )
    add_special_tokens: bool = Field(False, description="Add BOS and the like, which the template has normally.")
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field({}, description="Handed to the chat template.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs: true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequest(
                f"max_completion_tokens {self.max_completion_tokens} contradicts max_tokens {self.max_tokens}",
                "max_completion_tokens",
            )
        return self


class TokenizeRequest(RequestBody):
    """POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Left out: true for a prompt, false for messages.")
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        return self


class DetokenizeRequest(RequestBody):
    """POST /detokenize"""

    tokens: list[int]
    skip_special_tokens: bool = False


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _same(value: object, allowed: object) -> bool:
    """JSON's equality: true is not 1, 1.0 is."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _unknown(name: str, fields: Mapping[str, object]) -> str:
    message = f"unknown parameter {name[:80]!r}"
    similar = difflib.get_close_matches(name[:80], fields, n=1)
    return f"{message}; did you mean {similar[0]!r}?" if similar else message


def _but(harmless: Harmless) -> str:
    if harmless is ANY or not harmless:
        return ""
    return f" (only {' or '.join(repr(value) for value in harmless)}, which asks for nothing)"
