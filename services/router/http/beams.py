"""A beam search's choices: one generation, which gives all of them when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from relevo.core.errors import InvalidRequest
from services.router.generation import EndEvent, Generation, TokensEvent
from services.router.timeline import Timeline


class BeamSearchResult:
    """Pulled by whichever choice asks first; the others wait for what comes."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._turn = asyncio.Lock()
        self._end: EndEvent | None = None

    async def wait(self) -> EndEvent:
        """Raises what the generation raises."""
        async with self._turn:
            while self._end is None:
                event = await anext(self.generation)
                if isinstance(event, EndEvent):
                    self._end = event
            return self._end

    async def aclose(self) -> None:
        """Its first choice to be closed has all that it needs, or nobody will get anything."""
        await self.generation.aclose()


class BeamGeneration:
    """One beam, as the Generation of a choice of its own."""

    def __init__(self, result: BeamSearchResult, index: int) -> None:
        self.on_accepted: Callable[[], None] | None = None
        # The search is one request: its first choice tells of it.
        self.timeline = result.generation.timeline if index == 0 else Timeline()
        self._result = result
        self._index = index
        self._end: EndEvent | None = None

    def __aiter__(self) -> BeamGeneration:
        return self

    async def __anext__(self) -> TokensEvent | EndEvent:
        if self._end is not None:
            return self._end
        end = await self._result.wait()
        if self._index >= len(end.beams):
            raise InvalidRequest(f"the parameters leave {len(end.beams)} beams, less than n", "n")
        beam = end.beams[self._index]
        self._end = EndEvent(beam.finish_reason, end.num_cached_tokens)
        return TokensEvent(beam.token_ids, beam.logprobs, end.num_cached_tokens, end.prompt_logprobs)

    def explain(self, max_candidates: int | None = None) -> Mapping[str, Any] | None:
        return self._result.generation.explain(max_candidates)

    async def aclose(self) -> None:
        await self._result.aclose()
