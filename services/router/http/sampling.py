"""From a request's parameters and the model's defaults to the sampling parameters that workers get."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import SamplingParams
from relevo.model_files import GenerationDefaults
from services.common.structured_outputs import structured_outputs_to_proto
from services.pb import messages_pb2
from services.router.generation import ServedModel
from services.router.http.errors import ContextLengthExceeded
from services.router.http.protocol import SamplingBody
from services.router.http.structure import wanted_structure

_Number = TypeVar("_Number", int, float)

_MAX_UINT32 = 2**32 - 1
_EARLY_STOPPING = {
    False: messages_pb2.EARLY_STOPPING_NO,
    True: messages_pb2.EARLY_STOPPING_YES,
    "never": messages_pb2.EARLY_STOPPING_NEVER,
}


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """How many tokens a request may generate, and what its parameters are called where the answer is "too many".

    max_tokens: as the request says. default: what applies otherwise; None = the rest of the context
    prompt_alone: the one token that is generated is not shown
    """

    max_tokens: int | None
    default: int | None
    prompt_param: str
    max_tokens_param: str = "max_tokens"
    prompt_alone: bool = False

    def resolve(self, num_prompt_tokens: int, max_model_len: int) -> int:
        """Raises ContextLengthExceeded. A default is cut to what fits; what the request says is not."""
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens, but the model's context is {max_model_len} tokens, "
                "of which at least one is for output",
                self.prompt_param,
            )
        if self.max_tokens is None:
            return room if self.default is None else min(room, self.default)
        if self.max_tokens > room:
            raise ContextLengthExceeded(
                f"{self.max_tokens_param} {self.max_tokens} is more than the model's context of {max_model_len} tokens "
                f"leaves after the prompt's {num_prompt_tokens}: at most {room}",
                self.max_tokens_param,
            )
        return self.max_tokens


def make_sampling(
    body: SamplingBody,
    defaults: GenerationDefaults,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The request's parameters; where it says nothing, the model's. Raises InvalidRequest naming the parameter."""
    top_k = defaults.top_k if body.top_k is None else body.top_k
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(body.min_tokens, 0),
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=0 if top_k == -1 else top_k,
        min_p=_or(body.min_p, defaults.min_p),
        seed=body.seed,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=body.logit_bias,
        logprobs=logprobs,
        stop=body.stop,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        num_speculative_tokens=body.num_speculative_tokens,
        include_stop_str_in_output=body.include_stop_str_in_output,
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        bad_words=tuple(body.bad_words),
        logprob_token_ids=tuple(body.logprob_token_ids),
        prompt_logprobs=prompt_logprobs,
        n=body.n,
        best_of=body.best_of,
        use_beam_search=body.use_beam_search,
        length_penalty=body.length_penalty,
        early_stopping=body.early_stopping,
        logits_processors=tuple(body.logits_processors),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        structured_outputs=wanted_structure(body),
    )


def check_token_ids(sampling: SamplingParams, model: ServedModel) -> None:
    """Raises InvalidRequest if a parameter names a token that the model has not."""
    named: dict[str, Iterable[int]] = {
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "logprob_token_ids": sampling.logprob_token_ids,
    }
    for param, token_ids in named.items():
        for token_id in token_ids:
            if token_id >= model.vocab_size:
                raise InvalidRequest(
                    f"{param} names token {token_id}, but the model's ids are below {model.vocab_size}", param
                )


def draw_seed() -> int:
    return secrets.randbits(63)


def sampling_to_proto(
    sampling: SamplingParams, *, max_tokens: int | None = None, seed: int | None = None
) -> messages_pb2.SamplingParams:
    """max_tokens, seed: resolved, where the parameters' own are not."""
    max_tokens = sampling.max_tokens if max_tokens is None else max_tokens
    seed = sampling.seed if seed is None else seed
    assert max_tokens is not None and seed is not None
    return messages_pb2.SamplingParams(
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=min(sampling.top_k, _MAX_UINT32),
        min_p=sampling.min_p,
        seed=seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        num_speculative_tokens=sampling.num_speculative_tokens,
        allowed_token_ids=sampling.allowed_token_ids or (),
        bad_words=[messages_pb2.TokenSequence(token_ids=word) for word in sampling.bad_words_token_ids],
        logprob_token_ids=sampling.logprob_token_ids,
        prompt_logprobs=sampling.prompt_logprobs,
        num_beams=sampling.num_beams,
        num_answers=sampling.n if sampling.use_beam_search else 0,
        length_penalty=sampling.length_penalty,
        early_stopping=_EARLY_STOPPING[sampling.early_stopping],
        logits_processors=[
            messages_pb2.LogitsProcessor(name=each.name, arguments=each.arguments)
            for each in sampling.logits_processors
        ],
        structured_outputs=structured_outputs_to_proto(sampling.structured_outputs),
    )


def _or(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value
