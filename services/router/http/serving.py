"""What the routes work with, and the way from prompts to choices that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from relevo.core.errors import InvalidRequest, Unavailable
from relevo.core.sampling_params import SamplingParams
from relevo.model_files import GenerationDefaults
from relevo.prompts import truncate_prompt
from relevo.tokenizer import Tokenizer
from services.router.admission import Admission, AdmissionLimits
from services.router.generation import Dispatcher, ServedModel
from services.router.http.answer import Payloads
from services.router.http.choices import make_choices
from services.router.http.errors import ContextLengthExceeded, ModelNotFound
from services.router.http.exchange import Exchange
from services.router.http.explain import AnswerIds
from services.router.http.keys import KeyRing
from services.router.http.metrics import EdgeMetrics
from services.router.http.protocol import SamplingBody
from services.router.http.sampling import TokenLimit
from services.router.http.stream import EventWriter, GenerationResponse, WholeWriter
from services.router.http.structure import StructureChecker

_LONG_TEXT_CHARS = 16_384  # takes some 5 ms to tokenize: from here on the event loop does not wait for it

_FAR_CHARS_PER_TOKEN = 16  # a text with so many characters for each token of the context hardly ever fits

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """served_model_names: the first is the model's own, all are answered to

    keys: None = open to everybody
    salt_by_api_key: what one key's requests have cached, another's don't find
    cors_origins: whose pages' scripts may use the server from a browser; ("*",) = anybody's
    """

    served_model_names: tuple[str, ...]
    version: str
    keys: KeyRing | None = None
    salt_by_api_key: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    max_choices: int = 1024  # of one request: prompts × n


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: for echo"""

    token_ids: list[int]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    config: EdgeConfig
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    dispatcher: Dispatcher
    admission: Admission
    metrics: EdgeMetrics
    structure: StructureChecker
    answer_ids: AnswerIds = field(default_factory=AnswerIds)

    def model_name(self, asked: str | None) -> str:
        """Raises ModelNotFound. Who names no model gets the one there is."""
        names = self.config.served_model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ModelNotFound(f"the model {asked[:200]!r} is not served here; {' and '.join(map(repr, names))} is")
        return asked

    def model(self) -> ServedModel:
        """Raises Unavailable before the first worker was seen."""
        model = self.dispatcher.model()
        if model is None:
            raise Unavailable(f"no worker is there yet: {self.dispatcher.complaint() or 'none has been reached'}")
        return model

    def require_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: send token ids to /v1/completions", param)
        return self.tokenizer

    def encode_prompt(
        self, text: str, param: str, *, add_special_tokens: bool, sampling: SamplingParams | None = None
    ) -> list[int]:
        """Token ids, truncated as `sampling` says.

        Raises ContextLengthExceeded for texts far beyond the context, without tokenizing all of them.
        """
        tokenizer = self.require_tokenizer(param)
        max_model_len = self.model().max_model_len
        max_chars = max_model_len * _FAR_CHARS_PER_TOKEN
        if sampling is not None and sampling.truncate_prompt_tokens is not None:
            token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return truncate_prompt(token_ids, sampling, max_model_len, tokenizer if add_special_tokens else None)
        if len(text) > max_chars:
            num_tokens = len(tokenizer.encode(text[:max_chars], add_special_tokens=add_special_tokens))
            if num_tokens > 2 * max_model_len:  # the cut may cost some tokens, but not half of them
                raise ContextLengthExceeded(
                    f"the prompt has more than {num_tokens - 1} tokens; the model's context is {max_model_len} tokens",
                    param,
                )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def check_num_choices(self, num_prompts: int, n: int) -> None:
        if num_prompts * n > self.config.max_choices:
            raise InvalidRequest(
                f"{num_prompts} prompts with n={n} make more than {self.config.max_choices} choices", "n"
            )

    def generate(
        self,
        exchange: Exchange,
        answer_id: str,
        prompts: Sequence[Prompt],
        body: SamplingBody,
        sampling: SamplingParams,
        limit: TokenLimit,
        payloads: Payloads,
    ) -> GenerationResponse:
        """The response that will run all choices. Raises InvalidRequest and its like; nothing was started then."""
        choices = make_choices(self, exchange, answer_id, prompts, body, sampling, limit)
        exchange.timelines = [choice.timeline for choice in choices]
        self.answer_ids.remember(exchange.request_id, answer_id)
        writer = (
            EventWriter(exchange, payloads, include_usage=body.include_usage, alone=len(choices) == 1)
            if body.stream
            else WholeWriter(payloads, choices, keep=body.n)
        )
        lengths = [len(prompt.token_ids) for prompt in prompts]
        return GenerationResponse(exchange, choices, lengths, writer, self.metrics)


async def run_long(num_chars: int, work: Callable[[], _Result]) -> _Result:
    """Short work here and now, long work in a thread."""
    return work() if num_chars < _LONG_TEXT_CHARS else await asyncio.to_thread(work)
