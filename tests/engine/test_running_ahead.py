"""An engine that launches a step before it has read the one before says what one says that waits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from relevo import LLM
from relevo.core.sampling_params import SamplingParams
from relevo.core.structured_outputs import StructuredOutputs
from relevo.engine import prompt_logprobs, sampler
from relevo.engine.engine import Engine
from relevo.engine.host_copies import Download
from relevo.engine.step_result import EndedRequest, NewTokens
from tests.engine.test_parity import GREEDY, generate, make_engine
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.tiny_models import TinyModels

SAMPLED = SamplingParams(max_tokens=20, temperature=1.1, top_p=0.9, seed=5, ignore_eos=True)


class LateDownload(Download):
    """On a CPU copies are there at once. Here they are not before somebody waits for them."""

    unread = 0

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        super().__init__([tensor.clone() for tensor in tensors], device)
        LateDownload.unread += 1

    def wait(self) -> list[Tensor]:
        LateDownload.unread -= 1
        return super().wait()


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    LateDownload.unread = 0
    for module in (sampler, prompt_logprobs):
        monkeypatch.setattr(module, "Download", LateDownload)
    yield
    assert LateDownload.unread == 0


def ahead(path: Any, **options: Any) -> Engine:
    return make_engine(str(path), backend=options.pop("backend", "cpu"), async_scheduling=True, **options)


def run(engine: Engine, requests: list[Any]) -> tuple[dict[str, list[NewTokens]], dict[str, EndedRequest]]:
    """All at once: what came of each."""
    tokens: dict[str, list[NewTokens]] = {request.request_id: [] for request in requests}
    ended: dict[str, EndedRequest] = {}
    for request in requests:
        engine.submit(request)
    while engine.has_unfinished_requests:
        result = engine.step()
        for new in result.tokens:
            assert new.request_id not in ended
            tokens[new.request_id].append(new)
        for end in result.ended:
            assert end.request_id not in ended, "two ends"
            ended[end.request_id] = end
        engine.scheduler.check()
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks
    return tokens, ended


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_greedy_equals_transformers(tiny_models: TinyModels, architecture: str, backend: str) -> None:
    path = tiny_models.path(architecture)
    engine = ahead(path, backend=backend, max_num_batched_tokens=32, max_num_seqs=4)
    assert generate(engine, prompts()) == transformers_greedy(path)
    assert generate(engine, prompts()) == transformers_greedy(path)


def test_a_step_is_in_flight_while_the_next_one_is_launched(tiny_models: TinyModels) -> None:
    engine = ahead(tiny_models.path("llama"))
    engine.submit(engine.make_request("r", prompts()[0], replace(GREEDY, ignore_eos=True)))
    first = engine.step()
    assert first.admitted == ["r"] and not first.tokens and LateDownload.unread == 1
    counts = [len(engine.step().tokens) for _ in range(NUM_TOKENS)]
    assert counts == [1] * NUM_TOKENS and not engine.is_busy


@pytest.mark.parametrize("logprobs", [None, 3])
def test_sampled_text_and_its_log_probabilities_are_the_same(tiny_models: TinyModels, logprobs: int | None) -> None:
    path = tiny_models.path("qwen2")
    params = [
        replace(SAMPLED, logprobs=logprobs),
        replace(SAMPLED, seed=6, logit_bias={7: 3.0}, min_tokens=4, logprobs=logprobs),
        replace(SAMPLED, temperature=0.0, logprobs=logprobs, logprob_token_ids=(1, 2) if logprobs else ()),
    ]
    results = []
    for engine in (make_engine(str(path), backend="cpu"), ahead(path)):
        requests = [engine.make_request(str(i), prompts()[i], p) for i, p in enumerate(params)]
        results.append(run(engine, requests))
    assert results[0] == results[1]


def test_requests_whose_choice_needs_the_text_wait_for_it(tiny_models: TinyModels) -> None:
    """They come and go among others: the engine waits as long as they are there, and nobody's text changes."""
    path = tiny_models.path("llama")
    params = [
        replace(SAMPLED, max_tokens=30),
        replace(SAMPLED, max_tokens=6, repetition_penalty=1.3),
        replace(SAMPLED, max_tokens=8, prompt_logprobs=1),
        replace(GREEDY, max_tokens=6, use_beam_search=True, n=2),
        replace(SAMPLED, max_tokens=30, bad_words_token_ids=((5, 6),)),
    ]
    results = []
    for engine in (make_engine(str(path), backend="cpu"), ahead(path)):
        requests = [engine.make_request(str(i), prompts()[i], p) for i, p in enumerate(params)]
        results.append(run(engine, requests))
    assert results[0] == results[1]


def test_whoever_ends_by_a_stop_token_leaves_nothing_behind(tiny_models: TinyModels) -> None:
    """The stop token is read when the next step computes already."""
    path = tiny_models.path("llama")
    engine = ahead(path)
    [answer] = generate(engine, [prompts()[1]], SAMPLED)
    stop = next(token for at, token in enumerate(answer) if at > 3 and token not in answer[:at])
    stopping = replace(SAMPLED, stop_token_ids=(stop,))
    for _ in range(3):
        assert generate(engine, [prompts()[1]], stopping) == [answer[: answer.index(stop) + 1]]
    assert generate(engine, [prompts()[1]], SAMPLED) == [answer]


def test_a_request_that_is_aborted_in_flight_ends_once(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    engine = ahead(path)
    expected = generate(engine, [prompts()[2]], SAMPLED)
    for name in ("a", "b"):
        engine.submit(engine.make_request(name, prompts()[2], SAMPLED))
    ended: list[str] = []
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for count in range(200):
        result = engine.step()
        ended += [each.request_id for each in result.ended]
        for new in result.tokens:
            tokens[new.request_id] += new.token_ids
        if count == 5:
            engine.abort("a")
            num_tokens = len(tokens["a"])
        if not engine.has_unfinished_requests:
            break
    assert ended == ["a", "b"] and len(tokens["a"]) == num_tokens
    assert [tokens["b"]] == expected
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks


def test_who_is_preempted_in_flight_ends_with_the_same_text(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen2")
    sampling = replace(SAMPLED, max_tokens=40)
    token_lists = [prompt[-20:] for prompt in prompts()]
    roomy = make_engine(str(path), backend="cpu")
    expected = generate(roomy, token_lists, sampling)
    tight = ahead(path, kv_cache_memory=8 * roomy.info.block_bytes, max_model_len=64)
    requests = [tight.make_request(str(i), prompt, sampling) for i, prompt in enumerate(token_lists)]
    tokens, _ = run(tight, requests)
    assert sum(request.num_preemptions for request in requests)
    assert [[t for new in its for t in new.token_ids] for its in tokens.values()] == expected


def test_held_blocks_are_told_when_they_are_computed(tiny_models: TinyModels) -> None:
    """A prefill worker's: each chunk's end, never what is only on its way."""
    engine = ahead(tiny_models.path("llama"), max_num_batched_tokens=32, max_num_seqs=4)
    sampling = replace(GREEDY, max_tokens=1)
    engine.submit(engine.make_request("held", prompts()[3], sampling, hold_blocks=True))
    told: list[int] = []
    ended: list[str] = []
    while engine.has_unfinished_requests:
        result = engine.step()
        told += [each.num_computed_tokens for each in result.computed]
        ended += [each.request_id for each in result.ended]
    assert told == [32, 64, 90] and ended == ["held"]
    assert engine.scheduler.pool.num_free_blocks < engine.info.num_blocks
    engine.release("held")
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks


def test_bad_logits_end_their_request_and_no_other(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ahead(tiny_models.path("llama"))
    expected = generate(engine, [prompts()[1]], SAMPLED)
    forward = engine.runner.forward

    def poisoned(batch: Any, late: Any = None) -> Tensor:
        logits = forward(batch, late).clone()
        for at, index in enumerate(batch.logits_indices.tolist()):
            if batch.positions[index] == 40:
                logits[at] = float("nan")
        return logits

    monkeypatch.setattr(engine.runner, "forward", poisoned)
    bad = engine.make_request("bad", prompts()[3][:35], SAMPLED)
    good = engine.make_request("good", prompts()[1], SAMPLED)
    tokens, ended = run(engine, [bad, good])
    assert "NaN" in str(ended["bad"].error) and len(tokens["bad"]) == 6
    assert [[t for new in tokens["good"] for t in new.token_ids]] == expected


def test_a_grammar_waits_for_its_text() -> None:
    code = StructuredOutputs(regex="[A-Z]{3}-[0-9]{4}")
    plain = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    params = [plain, replace(plain, structured_outputs=code), replace(plain, seed=4)]
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 64 << 20, "threads": 1}
    waits, runs = (
        [
            answer.text
            for answer in LLM(**options, async_scheduling=ahead).generate(["Once"] * 3, params, progress=False)
        ]
        for ahead in (False, True)
    )
    assert runs == waits and re.fullmatch(str(code.regex), runs[1])
