"""The router without its HTTP edge: fleet, placement and dispatch over workers in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from relevo.core.placement import CostModel
from relevo.core.request import FinishReason
from relevo.core.sampling_params import SamplingParams
from services.common.discovery import StaticDiscovery
from services.kvtransfer.agent import Agent
from services.pb import messages_pb2
from services.router.dispatch import FleetDispatcher
from services.router.fleet import Fleet
from services.router.generation import EndEvent
from services.router.http.sampling import sampling_to_proto
from tests.support.agents import TIMEOUT_SECONDS, until
from tests.support.real_workers import RealWorker

# Decode's time is so dear that every prompt is split of which there is a block to send.
SPLIT_WHENEVER_POSSIBLE = CostModel(slowdown_weight=1e6)


@dataclass(frozen=True)
class Answer:
    """logprobs: empty, or one a token. was_split: where it was placed at last.

    prompt_logprobs: of the prompt's tokens but the first, if asked for
    """

    token_ids: list[int]
    logprobs: list[messages_pb2.TokenLogprobs]
    finish_reason: FinishReason
    was_split: bool
    num_tries: int
    prompt_logprobs: list[messages_pb2.TokenLogprobs]


class Router:
    def __init__(self, dispatcher: FleetDispatcher, fleet: Fleet) -> None:
        self.num_tokens = 0  # that came, of all requests
        self._dispatcher = dispatcher
        self._fleet = fleet

    async def until_agents_known(self, agent: Agent, num_blocks: int) -> None:
        """Until placement knows of so many blocks at the agent, or more."""
        await until(lambda: self._fleet.index.num_blocks(f"agent {agent.address}") >= num_blocks)

    async def until_idle(self) -> None:
        """Until all workers have said that they have nothing to do."""
        await until(lambda: not any(worker.load.num_requests for worker in self._fleet.workers))

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, salt: str = "") -> Answer:
        """salt: prompts of different salts share no cached block."""
        request = messages_pb2.GenerationRequest(
            request_id="r", prompt_token_ids=prompt, sampling=sampling_to_proto(sampling), cache_salt=salt
        )
        generation = self._dispatcher.generate(request)
        token_ids: list[int] = []
        logprobs: list[messages_pb2.TokenLogprobs] = []
        prompt_logprobs: list[messages_pb2.TokenLogprobs] = []
        end: EndEvent | None = None
        async for event in generation:
            assert end is None, "something follows the end"
            if isinstance(event, EndEvent):
                end = event
            else:
                self.num_tokens += len(event.token_ids)
                token_ids += event.token_ids
                logprobs += event.logprobs
                prompt_logprobs += event.prompt_logprobs
        assert end is not None and generation.placement is not None
        return Answer(
            token_ids,
            logprobs,
            end.finish_reason,
            generation.placement.best.prefill is not None,
            len(generation.record.routes),
            prompt_logprobs,
        )

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, salt: str = ""
    ) -> list[Answer]:
        """All at once."""
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(self.generate(prompt, sampling, salt)) for prompt in prompts]
        return [answer.result() for answer in answers]


@asynccontextmanager
async def real_router(decode: RealWorker, prefill: RealWorker | None = None) -> AsyncIterator[Router]:
    """Connected to the workers. With a prefill worker it splits whatever can be split."""
    async with router_over([decode], [prefill] if prefill is not None else [], split=True) as router:
        yield router


@asynccontextmanager
async def router_over(
    decodes: Sequence[RealWorker], prefills: Sequence[RealWorker], *, split: bool
) -> AsyncIterator[Router]:
    """split: whatever can be split is; else what costs less is done."""
    addresses = {
        "decode": [worker.address for worker in decodes],
        "prefill": [worker.address for worker in prefills],
    }
    costs = SPLIT_WHENEVER_POSSIBLE if split else None
    fleet = Fleet(StaticDiscovery(addresses))
    run = asyncio.create_task(fleet.run())
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await fleet.wait_connected()
        yield Router(FleetDispatcher(fleet, decodes[0].engine.info.eos_token_ids, costs), fleet)
    finally:
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
