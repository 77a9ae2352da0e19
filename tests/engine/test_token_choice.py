"""Parameters that say which tokens may be chosen: equal to transformers', alone and mixed in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relevo import LLM, SamplingParams
from relevo.core.errors import InvalidRequest
from relevo.core.request import FinishReason
from relevo.engine.step_result import EndedRequest
from relevo.llm import Completion
from tests.support.parity import NUM_TOKENS, prompts, transformers_greedy
from tests.support.tiny_models import EOS, TinyModels

SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 8 << 20}
ALLOWED = tuple(range(5, 300, 11))


@pytest.fixture(scope="module")
def path(tiny_models: TinyModels) -> Path:
    return tiny_models.path("llama")


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(str(path), **SMALL)


@cache
def load_transformers(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def transformers_answers(path: Path, prompt_lists: Sequence[list[int]], **options: Any) -> list[list[int]]:
    answers = []
    for prompt in prompt_lists:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "num_beams": 1, **options}
        output = load_transformers(path).generate(ids, attention_mask=torch.ones_like(ids), **options)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, **values)


def generate(llm: LLM, prompt_lists: list[list[int]], sampling: SamplingParams | list[SamplingParams]) -> list[Any]:
    return [answer.token_ids for answer in llm.generate(prompt_lists, sampling, progress=False)]


def bad_words_of(answers: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """What each answer says at its beginning, and two tokens of it further on: so that all of them must change."""
    return tuple({tuple(part) for answer in answers for part in (answer[:1], answer[3:5]) if part})


def test_allowed_token_ids_equal_transformers(llm: LLM, path: Path) -> None:
    expected = transformers_answers(path, prompts(), prefix_allowed_tokens_fn=lambda _batch, _ids: list(ALLOWED))
    answers = generate(llm, prompts(), greedy(allowed_token_ids=ALLOWED))
    assert answers == expected
    assert {token for answer in answers for token in answer} <= set(ALLOWED)


def test_bad_words_equal_transformers(llm: LLM, path: Path) -> None:
    """transformers looks at the prompt too; no word here begins with a prompt's last token."""
    words = bad_words_of(transformers_greedy(path))
    assert any(len(word) > 1 for word in words)
    assert not {word[0] for word in words if len(word) > 1} & {prompt[-1] for prompt in prompts()}
    expected = transformers_answers(path, prompts(), bad_words_ids=[list(word) for word in words])
    answers = generate(llm, prompts(), greedy(bad_words_token_ids=words))
    assert answers == expected
    assert all(answer != before for answer, before in zip(answers, transformers_greedy(path), strict=True))


def test_a_bad_word_of_several_tokens_is_looked_for_in_the_output_alone(llm: LLM) -> None:
    """As in vLLM: what the prompt ends with begins no bad word."""
    prompt = prompts()[0]
    [answer] = generate(llm, [prompt], greedy())
    assert generate(llm, [prompt], greedy(bad_words_token_ids=((prompt[-1], answer[0]),))) == [answer]
    [other] = generate(llm, [prompt], greedy(bad_words_token_ids=((answer[0], answer[1]),)))
    assert other[0] == answer[0] and other[1] != answer[1]


def test_every_parameter_alone_is_what_it_is_in_one_batch(llm: LLM, path: Path) -> None:
    words = bad_words_of(transformers_greedy(path))
    kinds = [
        SamplingParams(max_tokens=NUM_TOKENS, seed=3, temperature=1.3),
        greedy(allowed_token_ids=ALLOWED),
        SamplingParams(max_tokens=NUM_TOKENS, seed=4, allowed_token_ids=ALLOWED, repetition_penalty=1.5, min_tokens=5),
        greedy(bad_words_token_ids=words, logit_bias={EOS: 2.0}),
        SamplingParams(max_tokens=NUM_TOKENS, seed=5, bad_words_token_ids=words, top_p=0.8),
    ]
    pairs = [(prompt, kind) for kind in kinds for prompt in prompts()]
    together = generate(llm, [prompt for prompt, _ in pairs], [kind for _, kind in pairs])
    assert together == [generate(llm, [prompt], [kind])[0] for prompt, kind in pairs]


def test_logprobs_of_named_tokens_are_a_plain_log_softmax(llm: LLM, path: Path) -> None:
    named = (7, 300, 8)
    sampling = SamplingParams(max_tokens=3, temperature=0.0, logprobs=5, logprob_token_ids=named, logit_bias={9: 100.0})
    [answer] = llm.generate([prompts()[1]], sampling, progress=False)
    ids = torch.tensor([[*answer.prompt_token_ids, *answer.token_ids]])
    with torch.inference_mode():
        logits = load_transformers(path)(ids).logits[0, len(answer.prompt_token_ids) - 1 : -1].double()
    for row, entry in zip(logits, answer.logprobs, strict=True):
        assert [one.token_id for one in entry.top] == list(named)
        for one in (entry.chosen, *entry.top):
            assert one.logprob == pytest.approx(row.log_softmax(-1)[one.token_id].item(), abs=1e-4)
            assert one.rank == 1 + int((row > row[one.token_id]).sum())


def test_who_leaves_no_token_ends_alone(llm: LLM, path: Path) -> None:
    """With a reason, while the others in the batch go on."""
    engine = llm._engine
    words = ((ALLOWED[0],),)
    refused = SamplingParams(max_tokens=4, seed=0, allowed_token_ids=ALLOWED[:1], bad_words_token_ids=words)
    engine.submit(engine.make_request("refused", prompts()[0], refused))
    engine.submit(engine.make_request("other", prompts()[1], SamplingParams(max_tokens=4, temperature=0.0, seed=0)))
    ended: dict[str, EndedRequest] = {}
    tokens: list[int] = []
    while engine.has_unfinished_requests:
        result = engine.step()
        ended |= {end.request_id: end for end in result.ended}
        tokens += [token for new in result.tokens if new.request_id == "other" for token in new.token_ids]
        engine.scheduler.check()
    assert isinstance(ended["refused"].error, InvalidRequest)
    assert ended["refused"].finish_reason is FinishReason.CANCELLED
    assert tokens == transformers_greedy(path)[1][:4]
    with pytest.raises(InvalidRequest, match="no token"):
        llm.generate([prompts()[0]], refused, progress=False)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"bad_words": (" ",)}, "bad_words"),
        ({"bad_words_token_ids": ((),)}, "bad_words_token_ids"),
        ({"logprob_token_ids": (1,)}, "logprob_token_ids"),
        ({"logprob_token_ids": tuple(range(129)), "logprobs": 1}, "logprob_token_ids"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ],
)
def test_nonsense_is_refused_by_name(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**values)
    assert error.value.param == param


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(**{**SMALL, "kv_cache_memory": 32 << 20})


def ask(demo: LLM, text: str, **values: Any) -> Completion:
    [answer] = demo.generate([text], SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **values}), progress=False)
    return answer


def test_a_bad_word_is_not_said_with_or_without_a_space_before_it(demo: LLM) -> None:
    text = ask(demo, "The list is").text
    word = max((word for word in text.split() if word.isalpha()), key=len)
    without = ask(demo, "The list is", bad_words=(word,)).text
    assert word in text and word not in without.split()
    assert ask(demo, "The list is", bad_words=(f" {word}",)).text == without


def test_the_text_ends_with_what_stopped_it_if_it_is_included(demo: LLM) -> None:
    answer = ask(demo, "The list is")
    stop = answer.text[8:12]
    cut = ask(demo, "The list is", stop=(stop,))
    whole = ask(demo, "The list is", stop=(stop,), include_stop_str_in_output=True)
    assert cut.text + stop == whole.text and cut.token_ids == whole.token_ids
    assert demo.tokenizer is not None
    token_id = answer.token_ids[5]
    cut = ask(demo, "The list is", stop_token_ids=(token_id,))
    whole = ask(demo, "The list is", stop_token_ids=(token_id,), include_stop_str_in_output=True)
    assert cut.text + demo.tokenizer.token_text(token_id) == whole.text


def test_a_prompt_is_truncated_from_the_left(demo: LLM) -> None:
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode("Return a new list with the items in order.")
    [answer] = demo.generate([ids], SamplingParams(max_tokens=2, truncate_prompt_tokens=5), progress=False)
    assert answer.prompt_token_ids == ids[-5:]
    limit = demo._engine.info.max_model_len
    [answer] = demo.generate([ids * 400], SamplingParams(max_tokens=7, truncate_prompt_tokens=-1), progress=False)
    assert answer.prompt_token_ids == (ids * 400)[7 - limit :] and len(answer.token_ids) <= 7
    # Of a text, the special token that the tokenizer begins it with stays.
    added = demo.tokenizer.encode("")
    assert added == ids[: len(added)] and added
    [answer] = demo.generate(["Return a new list."], SamplingParams(truncate_prompt_tokens=3), progress=False)
    assert answer.prompt_token_ids == [*added, *demo.tokenizer.encode("Return a new list.")[len(added) - 3 :]]
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens"):
        demo.generate([ids], SamplingParams(truncate_prompt_tokens=limit + 1), progress=False)
