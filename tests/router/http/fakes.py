"""A dispatcher without workers: generations follow a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any

from relevo.core.request import FinishReason
from services.pb import messages_pb2
from services.router.generation import EndEvent, ServedModel, TokensEvent
from services.router.route_log import RouteRecord
from services.router.timeline import Timeline

MODEL = ServedModel(max_model_len=256, vocab_size=4096, block_size=16)

HANG = "hang"
ACCEPT = "accept"
# A float: seconds to wait. HANG: nothing more comes. ACCEPT: a worker has it.
Step = TokensEvent | EndEvent | Exception | float | str
Script = Callable[[messages_pb2.GenerationRequest], Iterable[Step]]


class FakeGeneration:
    """num_pulled: tokens handed out. closed_at: when aclose() was called first, on the clock of time.perf_counter."""

    def __init__(self, request: messages_pb2.GenerationRequest, steps: Iterable[Step]) -> None:
        self.request = request
        self.on_accepted: Callable[[], None] | None = None
        self.timeline = Timeline()
        self.num_pulled = 0
        self.has_begun = asyncio.Event()
        self.closed = asyncio.Event()
        self.closed_at = 0.0
        self._steps: Iterator[Step] = iter(steps)

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> TokensEvent | EndEvent:
        self.has_begun.set()
        for step in self._steps:
            if step == ACCEPT:
                if self.on_accepted is not None:
                    self.on_accepted()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            elif isinstance(step, str):
                await asyncio.Event().wait()
            else:
                if isinstance(step, TokensEvent):
                    self.num_pulled += len(step.token_ids)
                return step
        raise StopAsyncIteration

    def explain(self, max_candidates: int | None = None) -> dict[str, Any] | None:
        return {"request_id": self.request.request_id, "max_candidates": max_candidates}

    async def aclose(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self.closed_at = time.perf_counter()


class FakeDispatcher:
    """generations: all that were asked for, in order."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.script: Script = sampled
        self.served: ServedModel | None = MODEL
        self.ready = True
        self.reason = ""
        self.trouble = ""
        self.route_records: list[RouteRecord] = []
        self.generations: list[FakeGeneration] = []
        self.generation_class = FakeGeneration

    def generate(self, request: messages_pb2.GenerationRequest) -> FakeGeneration:
        generation = self.generation_class(request, self.script(request))
        self.generations.append(generation)
        return generation

    def model(self) -> ServedModel | None:
        return self.served

    def explain(self, request_id: str) -> list[dict[str, Any]]:
        names = [generation.request.request_id for generation in self.generations]
        return [{"request_id": name} for name in names if name.startswith(f"{request_id}-")]

    def records(self) -> list[RouteRecord]:
        return self.route_records

    async def describe_fleet(self) -> dict[str, Any]:
        return {"workers": [], "agents": []}

    def is_ready(self) -> bool:
        return self.ready

    def warning(self) -> str:
        return self.trouble

    def complaint(self) -> str:
        return self.reason

    @property
    def requests(self) -> list[messages_pb2.GenerationRequest]:
        return [generation.request for generation in self.generations]


def sampled_ids(request: messages_pb2.GenerationRequest) -> list[int]:
    """max_tokens ids that depend on prompt, seed and position; none of them special."""
    prompt = bytes(str(list(request.prompt_token_ids)), "ascii")
    draws = (sha256(b"%b %d %d" % (prompt, request.sampling.seed, i)) for i in range(request.sampling.max_tokens))
    return [300 + int.from_bytes(draw.digest()[:4], "little") % 3000 for draw in draws]


def sampled(request: messages_pb2.GenerationRequest) -> Iterator[Step]:
    """One token a step to the full length; 4 tokens of the prompt were cached."""
    yield from one_by_one(sampled_ids(request), request)


def one_by_one(
    token_ids: Iterable[int],
    request: messages_pb2.GenerationRequest,
    finish_reason: FinishReason = FinishReason.LENGTH,
) -> Iterator[Step]:
    prompt_logprobs = make_prompt_logprobs(request)
    for token_id in token_ids:
        yield TokensEvent([token_id], make_logprobs([token_id], request), prompt_logprobs=prompt_logprobs)
        prompt_logprobs = []
    yield EndEvent(finish_reason, num_cached_tokens=4)


def make_prompt_logprobs(request: messages_pb2.GenerationRequest) -> list[messages_pb2.TokenLogprobs]:
    """Each token is one rank below the likeliest, whose id is one higher; others follow."""
    if not request.sampling.HasField("prompt_logprobs"):
        return []
    return [
        messages_pb2.TokenLogprobs(
            chosen=messages_pb2.Logprob(token_id=token_id, logprob=-2.0, rank=2),
            top=[
                messages_pb2.Logprob(token_id=token_id + 1 - i, logprob=-1.0 - i, rank=i + 1)
                for i in range(request.sampling.prompt_logprobs)
            ],
        )
        for token_id in request.prompt_token_ids[1:]
    ]


def make_logprobs(
    token_ids: Iterable[int], request: messages_pb2.GenerationRequest
) -> list[messages_pb2.TokenLogprobs]:
    """The chosen token is always the likeliest; the others follow with ids one higher each."""
    if not request.sampling.HasField("logprobs"):
        return []
    return [
        messages_pb2.TokenLogprobs(
            chosen=messages_pb2.Logprob(token_id=token_id, logprob=-0.5, rank=1),
            top=[
                messages_pb2.Logprob(token_id=token_id + i, logprob=-0.5 - i, rank=i + 1)
                for i in range(request.sampling.logprobs)
            ],
        )
        for token_id in token_ids
    ]
