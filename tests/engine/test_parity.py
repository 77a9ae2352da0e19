"""The engine alone says what transformers says, token by token, however the work is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from relevo.core.sampling_params import SamplingParams
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from tests.support.parity import ARCHITECTURES, NUM_TOKENS, has_variety, prompts, transformers_greedy
from tests.support.tiny_models import TinyModels

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)


def make_engine(path: str, *, backend: str, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 8 << 20, "attention_backend": backend}
    return Engine(EngineConfig(model=path, **{**defaults, **options}))


def generate(
    engine: Engine, token_lists: Sequence[Sequence[int]], sampling: SamplingParams = GREEDY
) -> list[list[int]]:
    """All at once; the engine is empty and whole afterwards."""
    answers: dict[str, list[int]] = {}
    for index, token_ids in enumerate(token_lists):
        answers[str(index)] = []
        engine.submit(engine.make_request(str(index), token_ids, sampling))
    for _ in range(2000):
        if not engine.has_unfinished_requests:
            break
        for tokens in engine.step().tokens:
            answers[tokens.request_id] += tokens.token_ids
        engine.scheduler.check()
    assert not engine.has_unfinished_requests
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks
    return list(answers.values())


@pytest.mark.parametrize("passes", [True, False], ids=["passes", "plain"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers(tiny_models: TinyModels, architecture: str, backend: str, passes: bool) -> None:
    """One batch of mixed lengths in chunks of 32, then again from the cache, then one by one."""
    path = tiny_models.path(architecture)
    expected = transformers_greedy(path)
    assert has_variety(expected)
    engine = make_engine(str(path), backend=backend, passes=passes, max_num_batched_tokens=32, max_num_seqs=8)
    assert generate(engine, prompts()) == expected
    assert generate(engine, prompts()) == expected
    assert [generate(engine, [prompt])[0] for prompt in prompts()] == expected


@pytest.mark.parametrize("architecture", ["llama"])
def test_greedy_equals_transformers_with_triton(tiny_models: TinyModels, architecture: str) -> None:
    """The first tokens of two prompts: the interpreter takes its time."""
    path = tiny_models.path(architecture)
    engine = make_engine(str(path), backend="triton", max_num_batched_tokens=32, max_num_seqs=8)
    shortest = sorted(range(len(prompts())), key=lambda i: len(prompts()[i]))[:2]
    answers = generate(engine, [prompts()[i] for i in shortest], SamplingParams(max_tokens=5, temperature=0.0, seed=0))
    assert answers == [transformers_greedy(path)[i][:5] for i in shortest]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_cache_in_8_bits_is_a_quarter_of_float32_under_other_names(tiny_models: TinyModels, backend: str) -> None:
    """Tokens are those of a coarser cache, and the same in a batch, from the cache, and alone."""
    path = str(tiny_models.path("llama"))
    wide = make_engine(path, backend=backend)
    engine = make_engine(path, backend=backend, kv_cache_dtype="fp8_e4m3")
    assert 4 * engine.info.block_bytes == wide.info.block_bytes
    assert engine.info.fingerprint != wide.info.fingerprint
    answers = generate(engine, prompts())
    assert has_variety(answers)
    assert generate(engine, prompts()) == answers
    assert [generate(engine, [prompt])[0] for prompt in prompts()] == answers


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_preempted_requests_end_with_the_same_tokens(tiny_models: TinyModels, architecture: str) -> None:
    """A pool with room for little more than the longest prompt."""
    path = tiny_models.path(architecture)
    longest = max(len(prompt) for prompt in prompts()) + NUM_TOKENS
    probe = make_engine(str(path), backend="cpu")
    num_blocks = -(-longest // 16) + 2
    engine = make_engine(
        str(path), backend="cpu", kv_cache_memory=num_blocks * probe.info.block_bytes, max_model_len=longest
    )
    seen = 0
    original = engine.scheduler._preempt

    def counting(request: Any) -> None:
        nonlocal seen
        seen += 1
        original(request)

    engine.scheduler._preempt = counting  # type: ignore[method-assign]
    answers = generate(
        engine, [prompt[-20:] for prompt in prompts()] * 2, SamplingParams(max_tokens=40, temperature=0, seed=0)
    )
    assert seen, "the pool was large enough for all: nothing was shown"
    roomy = make_engine(str(path), backend="cpu")
    assert answers == generate(
        roomy, [prompt[-20:] for prompt in prompts()] * 2, SamplingParams(max_tokens=40, temperature=0, seed=0)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_more_urgent_request_takes_a_place_and_no_text_changes(tiny_models: TinyModels, temperature: float) -> None:
    """Two places are taken when a third request comes, with a lower number."""
    engine = make_engine(str(tiny_models.path("llama")), backend="cpu", max_num_seqs=2)
    sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=3, ignore_eos=True)
    expected = [generate(engine, [prompt], sampling)[0] for prompt in prompts()[:3]]
    requests = [
        engine.make_request(f"urgency-{priority}", prompt, sampling, priority=priority)
        for prompt, priority in zip(prompts(), (2, 1, 0), strict=False)
    ]
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ended: list[str] = []
    engine.submit(requests[0])
    engine.submit(requests[1])
    while engine.has_unfinished_requests:
        result = engine.step()
        for tokens in result.tokens:
            answers[tokens.request_id] += tokens.token_ids
        ended += [request.request_id for request in result.ended]
        if len(answers["urgency-1"]) == 8:
            engine.submit(requests[2])
    assert ended == ["urgency-1", "urgency-0", "urgency-2"]
    assert [request.num_preemptions for request in requests] == [1, 0, 0]
    assert list(answers.values()) == expected


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_block_size_does_not_change_the_tokens(tiny_models: TinyModels, block_size: int) -> None:
    path = tiny_models.path("mistral")
    engine = make_engine(str(path), backend="cpu", block_size=block_size, max_num_batched_tokens=64)
    assert generate(engine, prompts()) == transformers_greedy(path)


def test_seeded_sampling_does_not_depend_on_neighbours_or_preemption(tiny_models: TinyModels) -> None:
    path = str(tiny_models.path("qwen2"))
    roomy = make_engine(path, backend="cpu")
    sampling = SamplingParams(max_tokens=40, temperature=1.2, top_p=0.95, top_k=50, seed=11, frequency_penalty=0.3)
    token_lists = [prompt[-20:] for prompt in prompts()]
    alone = [generate(roomy, [prompt], sampling)[0] for prompt in token_lists]
    assert len({tuple(answer) for answer in alone}) == len(alone)
    assert generate(roomy, token_lists, sampling) == alone
    tight = make_engine(path, backend="cpu", kv_cache_memory=8 * roomy.info.block_bytes, max_model_len=64)
    assert generate(tight, token_lists, sampling) == alone


def test_other_seeds_give_other_tokens(tiny_models: TinyModels) -> None:
    engine = make_engine(str(tiny_models.path("llama")), backend="cpu")
    answers = [
        generate(engine, [prompts()[0]], SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True))[0]
        for seed in range(4)
    ]
    assert len({tuple(answer) for answer in answers}) == 4
