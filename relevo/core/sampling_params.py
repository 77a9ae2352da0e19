"""How one request's tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from relevo.core.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names that OpenAI's and vLLM's APIs gave them.

    max_tokens: None means as many as fit in the model's context
    temperature: 0 is greedy; top_p 1, top_k 0, min_p 0 and penalties of 0 (repetition: 1) are off
    seed: None takes a random one where the request enters the system; after that it is always set
    logprobs: None for none, 0 for the chosen token's, k for the k likeliest as well
    num_speculative_tokens: at most so many drafts a step; 0: none; None: what the engine has. Changes no token
    stop: strings; whoever detokenizes looks for them (router, LLM), the engine never sees them

    Raises InvalidRequest naming the parameter, its value and what is allowed.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    num_speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        upper = self.max_tokens
        _check_int("min_tokens", self.min_tokens, 0, upper)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.num_speculative_tokens is not None:
            _check_int("num_speculative_tokens", self.num_speculative_tokens, 0, None)
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, None)
            _check_float("logit_bias", bias, -100.0, 100.0)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, None)
        if any(not isinstance(stop, str) or stop == "" for stop in self.stop):
            raise InvalidRequest("stop must hold non-empty strings", "stop")

    @property
    def needs_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be an integer, not {value!r}", name)
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequest(f"{name} must be {allowed}, not {value}", name)


def _check_float(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, not {value!r}", name)
    if value < low or value > high or (above_low and value == low):
        allowed = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise InvalidRequest(f"{name} must be {allowed}, not {value:g}", name)
