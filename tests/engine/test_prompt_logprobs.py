"""A prompt's logprobs are those of a plain forward pass, however the work is cut up and whatever is cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relevo import LLM, SamplingParams
from relevo.core.errors import RelevoError
from relevo.engine import prompt_logprobs
from relevo.engine.logprobs import TokenLogprobs
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.tiny_models import TinyModels

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_memory": 8 << 20,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
}
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, prompt_logprobs=3, logprobs=1)


def check(path: Path, prompt: list[int], entries: list[TokenLogprobs], num_top: int = 3) -> None:
    """Against log_softmax of transformers' own logits."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    assert len(entries) == len(prompt) - 1
    for token_id, row, entry in zip(prompt[1:], expected, entries, strict=True):
        assert entry.chosen.token_id == token_id
        assert entry.chosen.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert abs(entry.chosen.rank - 1 - int((row > row[token_id]).sum())) <= 1  # float32 may see two as equal
        assert [one.logprob for one in entry.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_they_are_those_of_a_plain_forward_pass(tiny_models: TinyModels, architecture: str) -> None:
    """Longer than a chunk and shorter, in one batch with requests that ask for none; then again, all of it cached."""
    path = tiny_models.path(architecture)
    llm = LLM(str(path), **SMALL)
    plain = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    for _ in range(2):
        answers = llm.generate([*prompts(), *prompts()], [SAMPLING] * 6 + [plain] * 6, progress=False)
        assert [answer.token_ids for answer in answers] == transformers_greedy(path) * 2
        for prompt, answer in zip(prompts(), answers, strict=False):
            check(path, prompt, answer.prompt_logprobs)
            assert answer.num_cached_tokens == 0
        assert not any(answer.prompt_logprobs for answer in answers[6:])
    assert answers[-1].num_cached_tokens > 0, "others find the blocks that were computed for them"


def test_they_survive_preemption_without_being_given_twice(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    roomy = LLM(str(path), **SMALL)
    options = {"kv_cache_memory": 8 * roomy._engine.info.block_bytes, "max_num_batched_tokens": 4, "max_num_seqs": 2}
    tight = LLM(str(path), **{**SMALL, **options})
    scheduler = tight._engine.scheduler
    preempted = []
    original = scheduler._preempt

    def counting(request: Any) -> None:
        preempted.append(request.num_missing_prompt_logprobs)
        original(request)

    scheduler._preempt = counting  # type: ignore[method-assign]
    # The first grows into what the second holds, which is in the middle of its prompt then.
    growing = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    _, answer = tight.generate([prompts()[1], prompts()[3]], [growing, SAMPLING], progress=False)
    assert 0 < preempted[0] < len(prompts()[3]) - 1
    check(path, prompts()[3], answer.prompt_logprobs)
    scheduler.check()


def test_no_more_rows_of_logits_are_held_than_allowed(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests of a step share the bound."""
    path = tiny_models.path("llama")
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGITS", 320 * 10)
    llm = LLM(str(path), **SMALL)
    model = llm._engine.runner.model
    forward = type(model).forward
    num_rows: list[int] = []

    def watched(self: Any, input_ids: Any, positions: Any, context: Any, indices: Any) -> Any:
        num_rows.append(len(indices))
        return forward(self, input_ids, positions, context, indices)

    monkeypatch.setattr(type(model), "forward", watched)
    answers = llm.generate([prompts()[3], prompts()[4]], SAMPLING, progress=False)
    check(path, prompts()[3], answers[0].prompt_logprobs)
    check(path, prompts()[4], answers[1].prompt_logprobs)
    assert num_rows[0] == 10
    assert max(num_rows) <= 10 + 2  # and one for each that samples


def test_a_prompt_of_one_token_has_none(tiny_models: TinyModels) -> None:
    llm = LLM(str(tiny_models.path("llama")), **SMALL)
    [answer] = llm.generate([[7]], SAMPLING, progress=False)
    assert answer.prompt_logprobs == [] and answer.token_ids


def test_their_number_is_bounded_by_what_fits_into_memory_and_into_a_message() -> None:
    assert prompt_logprobs.max_rows(320) == 1024
    assert prompt_logprobs.max_rows(152_000) == (1 << 25) // 152_000
    assert prompt_logprobs.max_rows(1 << 30) == 1
    with pytest.raises(RelevoError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=-1)
