"""How one request's tokens are chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from relevo.core.beam_search import EarlyStopping
from relevo.core.errors import InvalidRequest
from relevo.core.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_SEED = 2**63 - 1
MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class LogitsProcessorCall:
    """A custom processor by its entry point's name. arguments: {"args": […], "kwargs": {…}} as JSON, "" = none"""

    name: str
    arguments: str = ""

    @property
    def args(self) -> list[Any]:
        return list(self._parsed.get("args", ()))

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self._parsed.get("kwargs", {}))

    @property
    def _parsed(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.arguments) if self.arguments else {}
        return parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names that OpenAI's and vLLM's APIs gave them.

    max_tokens: None means as many as fit in the model's context
    temperature: 0 is greedy; top_p 1, top_k 0, min_p 0 and penalties of 0 (repetition: 1) are off
    seed: None takes a random one where the request enters the system; after that it is always set
    logprobs: None for none, 0 for the chosen token's, k for the k likeliest as well
    num_speculative_tokens: at most so many drafts a step; 0: none; None: what the engine has. Changes no token
    structured_outputs: what the text must fit. It ends where the grammar does, min_tokens or not; EOS cannot be ignored
    stop: strings; whoever detokenizes looks for them (router, LLM), the engine never sees them
    include_stop_str_in_output: the text ends with the stop string, or stop token, that ended it
    allowed_token_ids: None = all; else nothing but these is chosen
    bad_words: strings that the output does not contain; whoever tokenizes makes bad_words_token_ids of them, and those
        are what the engine looks at
    logprob_token_ids: with logprobs, these tokens' instead of the likeliest ones'
    prompt_logprobs: of the prompt's tokens, as logprobs; None for none
    n: answers for a prompt; the engine makes one, whoever asks it makes several of it
    best_of: so many are made, and the n likeliest kept; None = n
    use_beam_search: the n best of `best_of` hypotheses, as transformers' num_beams, length_penalty and early_stopping;
        temperature, top_p, top_k, min_p and seed mean nothing then
    logits_processors: custom ones, by entry point; see relevo.engine.logits_processors
    truncate_prompt_tokens: keep so many of the prompt's last tokens; -1 = as many as the model takes beside max_tokens

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
    include_stop_str_in_output: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    logits_processors: tuple[LogitsProcessorCall, ...] = ()
    structured_outputs: StructuredOutputs | None = None

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
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos contradicts structured_outputs: such an answer ends with its grammar", "ignore_eos"
            )
        if any(not isinstance(stop, str) or stop == "" for stop in self.stop):
            raise InvalidRequest("stop must hold non-empty strings", "stop")
        self._check_answers()
        self._check_choice()

    @property
    def num_choices(self) -> int:
        """How many answers are made, to keep n of them."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_beams(self) -> int:
        """0 = no beam search."""
        return self.num_choices if self.use_beam_search else 0

    def _check_answers(self) -> None:
        _check_int("n", self.n, 1, MAX_CHOICES)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_CHOICES)
        _check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        if self.use_beam_search and self.structured_outputs is not None:
            raise InvalidRequest("use_beam_search does not go with structured_outputs", "use_beam_search")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequest(
                f'early_stopping must be true, false or "never", not {self.early_stopping!r}', "early_stopping"
            )

    def _check_choice(self) -> None:
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest(
                    "allowed_token_ids must not be empty: leave it out to allow all", "allowed_token_ids"
                )
            for token_id in self.allowed_token_ids:
                _check_int("allowed_token_ids", token_id, 0, None)
        if any(not isinstance(word, str) or not word.strip() for word in self.bad_words):
            raise InvalidRequest("bad_words must hold strings that are not blank", "bad_words")
        for word in self.bad_words_token_ids:
            if not word:
                raise InvalidRequest("bad_words_token_ids must not hold empty words", "bad_words_token_ids")
            for token_id in word:
                _check_int("bad_words_token_ids", token_id, 0, None)
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequest("logprob_token_ids goes with logprobs", "logprob_token_ids")
        if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise InvalidRequest(
                f"logprob_token_ids must hold at most {MAX_LOGPROB_TOKEN_IDS}, not {len(self.logprob_token_ids)}",
                "logprob_token_ids",
            )
        for token_id in self.logprob_token_ids:
            _check_int("logprob_token_ids", token_id, 0, None)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens not in (None, -1):
            _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, None)

    @property
    def needs_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def needs_text(self) -> bool:
        """What is done to a row's logits depends on which tokens are before it, and not on their number alone."""
        return (
            self.needs_penalties
            or bool(self.bad_words_token_ids or self.logits_processors)
            or self.structured_outputs is not None
            or self.use_beam_search
            or self.prompt_logprobs is not None
        )


def choice_seed(seed: int, index: int) -> int:
    """Of the index-th choice for one prompt. Choice 0 takes the seed itself: asking for more changes no answer."""
    if index == 0:
        return seed
    return int.from_bytes(sha256(f"{seed}:{index}".encode()).digest()[:8], "little") & MAX_SEED


def mean_logprob(logprobs: Sequence[float]) -> float:
    """By which best_of finds the best of some answers, as OpenAI does."""
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


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
