"""Split, aggregated, moved in mid-answer, offline: the same text, and one that fits."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jsonschema
import torch

from relevo import LLM, SamplingParams
from relevo.core.request import FinishReason
from relevo.core.structured_outputs import StructuredOutputs
from relevo.model_files import resolve_model
from tests.support.agents import running_agent, until
from tests.support.real_router import real_router, router_over
from tests.support.real_workers import real_worker
from tests.support.schemas import random_schema

SETTINGS: dict[str, Any] = {"kv_cache_memory": 32 << 20, "attention_backend": "cpu", "offer_share": 0.0, "threads": 1}
OUTPUTS = (
    StructuredOutputs(json=random_schema(2)),
    StructuredOutputs(regex="[A-Z]{3}-[0-9]{4}(-[a-f]{2,5})?"),
    StructuredOutputs(choice=["yes, indeed", "no, by no means"]),
)
PROMPT = "import os\n" * 12 + "Answer:"


def sampling(outputs: StructuredOutputs) -> SamplingParams:
    return SamplingParams(max_tokens=80, temperature=1.5, seed=5, structured_outputs=outputs)


async def test_the_way_that_a_request_takes_changes_no_token(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    path = resolve_model(None).path
    llm = LLM(dtype="float32", kv_cache_memory=32 << 20, threads=1)
    answers = llm.generate([PROMPT] * len(OUTPUTS), [sampling(outputs) for outputs in OUTPUTS], progress=False)
    expected = [answer.token_ids for answer in answers]
    prompt = answers[0].prompt_token_ids
    if answers[0].finish_reason is FinishReason.STOP:
        jsonschema.Draft202012Validator(random_schema(2)).validate(json.loads(answers[0].text))
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(running_agent(tmp_path, num_blocks=500))
        prefill = await stack.enter_async_context(real_worker(path, "prefill", agent, **SETTINGS))
        dying = await stack.enter_async_context(real_worker(path, "decode", agent, **SETTINGS))
        other = await stack.enter_async_context(real_worker(path, "decode", agent, **SETTINGS))
        async with real_router(other, prefill) as split, real_router(other) as aggregated:
            for nth, (outputs, tokens) in enumerate(zip(OUTPUTS, expected, strict=True)):
                answer = await split.generate(prompt, sampling(outputs), salt=f"split {nth}")
                assert answer.was_split and answer.token_ids == tokens
                assert (await aggregated.generate(prompt, sampling(outputs))).token_ids == tokens
        async with router_over([dying, other], [], split=False) as router:
            dying.hold_at(6)
            generating = [
                asyncio.create_task(router.generate(prompt, sampling(outputs), salt="moved")) for outputs in OUTPUTS * 2
            ]
            await until(lambda: dying.is_held)
            stopping = asyncio.create_task(dying.stop())
            await until(lambda: dying.worker.num_requests == 0 or dying.is_held)
            dying.let_go()
            await stopping
            assert [(await answer).token_ids for answer in generating] == expected * 2
    torch.set_num_threads(threads)
