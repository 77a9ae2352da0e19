"""What /v1/completions and /v1/chat/completions have in common in what they send."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from typing_extensions import TypedDict

from services.pb import messages_pb2
from services.router.http.choice import Choice, Delta
from services.router.http.prompt_logprobs import PromptEntries


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """prompt_tokens_details: null if a stop string ended an answer before workers said what they had cached."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every message of one answer repeats. created: seconds since 1970"""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True, eq=False)
class Answer:
    """One choice, whole."""

    choice: Choice
    texts: list[str] = field(default_factory=list)
    logprobs: list[messages_pb2.TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: PromptEntries | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Payloads(Protocol):
    """Makes one answer's JSON."""

    def chunks(self, choice: Choice, delta: Delta) -> list[Mapping[str, Any]]:
        """The stream's events for a delta: none while there is nothing to show."""

    def usage_chunk(self, usage: Usage) -> Mapping[str, Any]:
        """The stream's last event, with no choices."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Mapping[str, Any]:
        """The answer that is not streamed; answers in the order of their choices."""


def count_usage(choices: Sequence[Choice], prompt_lengths: Sequence[int]) -> Usage:
    """A prompt counts once, however many choices it has; its cached tokens are those of its first choice."""
    num_prompt_tokens = sum(prompt_lengths)
    num_completion_tokens = sum(choice.num_tokens for choice in choices)
    cached = {choice.prompt_index: choice.num_cached_tokens for choice in reversed(choices)}
    known = [num_tokens for num_tokens in cached.values() if num_tokens is not None]
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(known)} if len(known) == len(cached) else None,
    }
