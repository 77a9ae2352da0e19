"""Custom logits processors: found by entry point, applied to their own request, and no more harm than to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from relevo import LLM, SamplingParams
from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import LogitsProcessorCall
from relevo.engine.step_result import EndedRequest
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.processors import Favour, install
from tests.support.tiny_models import TinyModels

SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 8 << 20}
FAVOUR = LogitsProcessorCall("favour", '{"args": [3], "kwargs": {"bonus": 9}}')


@pytest.fixture(scope="module")
def llm(tiny_models: TinyModels) -> LLM:
    return LLM(str(tiny_models.path("llama")), **SMALL)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)


def greedy(*calls: LogitsProcessorCall, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0, logits_processors=calls, **values)


def test_a_processor_changes_what_it_changes_in_transformers(llm: LLM, tiny_models: TinyModels) -> None:
    """In one batch with requests that have none, and alone."""
    path = tiny_models.path("llama")
    favour = Favour(3, bonus=9)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def theirs(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return favour(input_ids[0].tolist(), [], scores[0].clone())[None]

    expected = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        processors = LogitsProcessorList([theirs])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            logits_processor=processors,
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert expected != transformers_greedy(path)
    answers = llm.generate([*prompts(), *prompts()], [greedy(FAVOUR)] * 6 + [greedy()] * 6, progress=False)
    assert [answer.token_ids for answer in answers] == expected + transformers_greedy(path)
    alone = [llm.generate([prompt], greedy(FAVOUR), progress=False)[0].token_ids for prompt in prompts()]
    assert alone == expected


def test_one_that_raises_ends_its_own_request_alone(llm: LLM, tiny_models: TinyModels) -> None:
    engine = llm._engine
    fail = LogitsProcessorCall("fail_after", '{"args": [3]}')
    engine.submit(engine.make_request("fails", prompts()[0], greedy(fail, ignore_eos=True)))
    search = SamplingParams(max_tokens=9, seed=0, use_beam_search=True, n=3, ignore_eos=True, logits_processors=(fail,))
    engine.submit(engine.make_request("search", prompts()[2], search))
    engine.submit(engine.make_request("other", prompts()[1], greedy()))
    ended: dict[str, EndedRequest] = {}
    tokens: dict[str, list[int]] = {"fails": [], "other": []}
    while engine.has_unfinished_requests:
        result = engine.step()
        for end in result.ended:
            assert end.request_id not in ended
            ended[end.request_id] = end
        for new in result.tokens:
            tokens[new.request_id] += new.token_ids
        engine.scheduler.check()
    assert len(tokens["fails"]) == 3
    for name in ("fails", "search"):
        error = ended[name].error
        assert isinstance(error, InvalidRequest) and "as told" in error.message and error.param == "logits_processors"
    assert tokens["other"] == transformers_greedy(tiny_models.path("llama"))[1]
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (LogitsProcessorCall("nobody"), "no logits processor"),
        (LogitsProcessorCall("broken"), "can't be loaded"),
        (LogitsProcessorCall("favour", '{"kwargs": {"colour": 1}}'), "does not take these arguments"),
    ],
)
def test_what_is_not_there_is_refused_before_it_runs(llm: LLM, call: LogitsProcessorCall, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        llm.generate([prompts()[0]], greedy(call), progress=False)
    assert error.value.param == "logits_processors"
