"""The border inside the router: what dispatch offers, and what the HTTP edge makes answers of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from relevo.core.request import FinishReason
from services.pb import messages_pb2
from services.router.route_log import RouteRecord
from services.router.timeline import Timeline


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Output tokens, in order. logprobs: empty, or one a token.

    prompt_logprobs: with the first tokens, if asked for: of every token of the prompt but the first
    num_cached_tokens: as in EndEvent, if it is known already: a request that a stop string ends gets no EndEvent
    """

    token_ids: Sequence[int]
    logprobs: Sequence[messages_pb2.TokenLogprobs] = ()
    num_cached_tokens: int | None = None
    prompt_logprobs: Sequence[messages_pb2.TokenLogprobs] = ()


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The last event of a generation that did not fail.

    num_cached_tokens: tokens of the prompt whose KV was not computed for this request
    """

    finish_reason: FinishReason
    num_cached_tokens: int = 0


class Generation(Protocol):
    """One request on its way: any number of TokensEvents, then exactly one EndEvent, then StopAsyncIteration.

    Iteration raises a RelevoError if the request failed: Exhausted, Unavailable, InvalidRequest, DeadlineExceeded …;
    before any token or after some. It is the last thing that iteration does then.

    on_accepted: called once, inside iteration, when a worker has taken the request on: Exhausted does not follow
    timeline: where it notes what becomes of it; may be replaced before the first `__anext__`
    """

    on_accepted: Callable[[], None] | None
    timeline: Timeline

    def __aiter__(self) -> Generation: ...

    async def __anext__(self) -> TokensEvent | EndEvent: ...

    def explain(self, max_candidates: int | None = None) -> Mapping[str, Any] | None:
        """Why it was placed where it was, as JSON, with so many candidates of each try; None before it was placed."""

    async def aclose(self) -> None:
        """Cancels the request at every stage if it has not ended. Calling it twice, or after the end, is harmless."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What workers said of the model. max_model_len: tokens, prompt and output together."""

    max_model_len: int
    vocab_size: int
    block_size: int


class Dispatcher(Protocol):
    """Places requests on workers and relays their tokens."""

    def generate(self, request: messages_pb2.GenerationRequest) -> Generation:
        """Nothing happens before the first `__anext__`."""

    def model(self) -> ServedModel | None:
        """None until some worker was seen."""

    def explain(self, request_id: str) -> Sequence[Mapping[str, Any]]:
        """Generation.explain of the request, or of those named REQUEST_ID-0, -1, …, with their timelines; empty if too
        long ago, or never."""

    def records(self) -> Collection[RouteRecord]:
        """The last requests that were placed, the oldest first; some may be on their way."""

    async def describe_fleet(self) -> Mapping[str, Any]:
        """Workers and agents as they are now, as JSON; see fleet_state.describe_fleet."""

    def is_ready(self) -> bool:
        """Whether a request could be served now."""

    def complaint(self) -> str:
        """What keeps it from being ready, as far as that is known."""

    def warning(self) -> str:
        """What is amiss while requests are served; "" if nothing is."""
