"""The offline door."""

from __future__ import annotations

from typing import Any

import pytest

from relevo import LLM, SamplingParams
from relevo.core.errors import InvalidRequest, StartupError
from relevo.core.request import FinishReason
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.tiny_models import TinyModels

GREEDY = SamplingParams(max_tokens=12, temperature=0)
SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 32 << 20}


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(**SMALL)


def test_token_ids_in_equal_transformers_out(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    llm = LLM(str(path), **SMALL)
    answers = llm.generate(prompts(), SamplingParams(max_tokens=NUM_TOKENS, temperature=0), progress=False)
    assert [answer.token_ids for answer in answers] == transformers_greedy(path)
    assert [answer.prompt_token_ids for answer in answers] == prompts()
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        llm.generate("text")


def test_one_prompt_or_several_text_or_ids(demo: LLM) -> None:
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode("def main(")
    single = demo.generate("def main(", GREEDY, progress=False)
    mixed: list[str | list[int]] = ["import os", ids]
    several = demo.generate(mixed, [GREEDY, GREEDY], progress=False)
    assert single[0].token_ids == several[1].token_ids == demo.generate(ids, GREEDY, progress=False)[0].token_ids
    assert single[0].text == demo.tokenizer.decode(single[0].token_ids)


def test_repeated_prompt_comes_from_the_cache(demo: LLM) -> None:
    prompt = "class Cache:\n" * 20
    first, second = (demo.generate(prompt, GREEDY, progress=False)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.num_cached_tokens < second.num_cached_tokens < len(second.prompt_token_ids)


def test_stop_string_cuts_the_text_and_ends_the_request(demo: LLM) -> None:
    whole = demo.generate("import os\n", GREEDY, progress=False)[0]
    stop = whole.text[2:5]
    cut = demo.generate("import os\n", SamplingParams(max_tokens=12, temperature=0, stop=(stop,)), progress=False)[0]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.token_ids) <= len(whole.token_ids)


def test_chat_takes_a_conversation_or_several(demo: LLM) -> None:
    conversation = [{"role": "user", "content": "What does os.path.join do?"}]
    one = demo.chat(conversation, GREEDY, progress=False)
    two = demo.chat([conversation, conversation], GREEDY, progress=False)
    assert [one[0].token_ids] * 2 == [answer.token_ids for answer in two]


def test_seed_repeats_and_its_absence_does_not(demo: LLM) -> None:
    hot = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    seeded = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True, seed=9)
    assert (
        demo.generate("x", seeded, progress=False)[0].token_ids
        == demo.generate("x", seeded, progress=False)[0].token_ids
    )
    assert len({tuple(demo.generate("x", hot, progress=False)[0].token_ids) for _ in range(3)}) == 3


def test_logprobs_come_one_a_token(demo: LLM) -> None:
    answer = demo.generate("x", SamplingParams(max_tokens=3, temperature=0, logprobs=2), progress=False)[0]
    assert len(answer.logprobs) == len(answer.token_ids)
    assert all(each.chosen.rank == 1 and each.top[0] == each.chosen for each in answer.logprobs)


def test_progress_bar_counts_the_prompts(demo: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    demo.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().out


def test_bad_prompt_names_what_is_wrong_and_leaves_the_engine_well(demo: LLM) -> None:
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        demo.generate([[5], []], GREEDY, progress=False)
    with pytest.raises(InvalidRequest, match="2 prompts, but 1"):
        demo.generate(["a", "b"], [GREEDY], progress=False)
    assert demo.generate("a", GREEDY, progress=False)[0].token_ids


def test_option_that_cannot_work_stops_the_start() -> None:
    with pytest.raises(StartupError, match="max_num_batched_tokens"):
        LLM(max_num_batched_tokens=1, max_num_seqs=2)
    with pytest.raises(StartupError, match="at least 2 are needed"):
        LLM(kv_cache_memory=1000)
