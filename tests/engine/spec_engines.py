"""Engines that speculate, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relevo.core.sampling_params import SamplingParams
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.step_result import NewTokens


def make_engine(path: str, speculative: str | None = None, **options: Any) -> Engine:
    """Drafts whenever there may be some: whether they pay is another question."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_memory": 8 << 20,
        "attention_backend": "cpu",
        "speculative": speculative,
        "adaptive_speculation": False,
        "threads": 1,
    }
    return Engine(EngineConfig(model=path, **{**defaults, **options}))


def generate(
    engine: Engine, asks: Sequence[tuple[Sequence[int], SamplingParams]], *, later: int = 0, salt: str = ""
) -> list[NewTokens]:
    """All tokens of each request; `later` of them come after some steps. The engine is empty and whole afterwards."""
    answers: dict[str, NewTokens] = {}
    requests = []
    for index, (token_ids, sampling) in enumerate(asks):
        answers[str(index)] = NewTokens(str(index), [], [])
        requests.append(engine.make_request(str(index), token_ids, sampling, cache_salt=salt))
    for request in requests[: len(requests) - later]:
        engine.submit(request)
    for step in range(3000):
        if step == 5:
            for request in requests[len(requests) - later :]:
                engine.submit(request)
        if step > 5 and not engine.has_unfinished_requests:
            break
        for tokens in engine.step().tokens:
            answers[tokens.request_id].token_ids.extend(tokens.token_ids)
            answers[tokens.request_id].logprobs.extend(tokens.logprobs)
        engine.scheduler.check()
    assert not engine.has_unfinished_requests
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks
    return list(answers.values())


def copy_block(source: Engine, block_id: int, target: Engine, target_id: int) -> None:
    """As a hand-over does."""
    with source.kv_cache.leaving([block_id]) as (block,), target.kv_cache.arriving([target_id], None) as (place,):
        place[:] = block
