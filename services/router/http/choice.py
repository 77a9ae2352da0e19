"""One choice of an answer: a generation's tokens, turned into text as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relevo.core.errors import Unavailable
from relevo.core.request import FinishReason
from relevo.detokenizer import Detokenizer
from services.pb import messages_pb2
from services.router.generation import EndEvent, Generation, TokensEvent
from services.router.http.prompt_logprobs import PromptEntries, SharedPromptLogprobs
from services.router.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to a choice.

    text: may be empty while characters or stop strings are incomplete
    logprobs: empty, or one a token
    token_ids: none in a delta that only ends the choice
    prompt_logprobs: in a choice's first delta, if asked for; None in all others
    finish_reason: "stop" or "length" in the last delta, which every choice that does not fail has
    """

    text: str
    logprobs: Sequence[messages_pb2.TokenLogprobs]
    token_ids: Sequence[int] = ()
    finish_reason: str | None = None
    prompt_logprobs: PromptEntries | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Choice:
    """Pulls its generation event by event, and closes it at a stop string.

    stop_token_ids: EOS (unless it is ignored) and the request's; the one that ends the answer is not in the text,
        unless include_stop says so
    prompt_logprobs: None = not asked for. is_first_of_prompt: it tells the prompt's other choices
    prompt_alone: the answer ends before its first token
    """

    def __init__(
        self,
        index: int,
        prompt_index: int,
        generation: Generation,
        detokenizer: Detokenizer,
        stop_token_ids: frozenset[int],
        *,
        include_stop: bool = False,
        prompt_logprobs: SharedPromptLogprobs | None = None,
        is_first_of_prompt: bool = True,
        prompt_alone: bool = False,
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None  # unknown yet
        self.timeline: Timeline = generation.timeline
        self._generation = generation
        self._prompt_logprobs = prompt_logprobs
        self._is_first_of_prompt = is_first_of_prompt
        self._prompt_alone = prompt_alone
        self._detokenizer = detokenizer
        self._hidden_token_ids = frozenset() if include_stop else stop_token_ids  # as the last one

    async def next(self) -> Delta:
        """Not to be called after the delta with a finish_reason. Raises what the generation raises."""
        event = await anext(self._generation)
        if isinstance(event, EndEvent):
            return self._end(event)
        delta = self._push(event)
        if self._prompt_logprobs is not None:
            if self._is_first_of_prompt:
                self._prompt_logprobs.tell(event.prompt_logprobs)
            delta = replace(delta, prompt_logprobs=await self._prompt_logprobs.wait())
            self._prompt_logprobs = None
        if delta.finish_reason is not None:
            await self._generation.aclose()
        return delta

    def explain(self, max_candidates: int | None) -> Mapping[str, Any] | None:
        return self._generation.explain(max_candidates)

    async def aclose(self) -> None:
        await self._generation.aclose()

    def _push(self, event: TokensEvent) -> Delta:
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
        if self._prompt_alone:
            return Delta("", (), finish_reason=FinishReason.LENGTH.value)
        token_ids = event.token_ids
        num_before = self.num_tokens
        ends = bool(token_ids) and token_ids[-1] in self._hidden_token_ids
        began_at = time.perf_counter()
        text = self._detokenizer.push(token_ids[:-1] if ends else token_ids)
        self.timeline.detokenize_seconds += time.perf_counter() - began_at
        if not self._detokenizer.stopped:
            self.num_tokens += len(token_ids)
            return Delta(text, event.logprobs, token_ids)
        self.num_tokens = self._detokenizer.num_tokens_used
        num_used = self.num_tokens - num_before
        return Delta(text, event.logprobs[:num_used], token_ids[:num_used], FinishReason.STOP.value)

    def _end(self, event: EndEvent) -> Delta:
        if event.finish_reason is FinishReason.CANCELLED:
            raise Unavailable("the request was cancelled by the server")
        self.num_cached_tokens = event.num_cached_tokens
        text = self._detokenizer.finish()
        reason = FinishReason.STOP if self._detokenizer.stopped else event.finish_reason
        return Delta(text, (), finish_reason=reason.value)
