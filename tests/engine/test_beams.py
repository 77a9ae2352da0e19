"""Beam search equals transformers' beams, and shares blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relevo import LLM, SamplingParams
from relevo.core import forking
from relevo.core.errors import InvalidRequest
from relevo.engine import beams as beams_module
from relevo.engine.engine import Engine
from tests.support.parity import BLOCK_SIZE, prompts, transformers_greedy
from tests.support.tiny_models import EOS, TinyModels

SMALL: dict[str, Any] = {
    "threads": 1,
    "dtype": "float32",
    "kv_cache_memory": 8 << 20,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 16,
}
NUM_TOKENS = 20
LONG = SamplingParams(max_tokens=40, seed=0, use_beam_search=True, n=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def load_transformers(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def transformers_beams(path: Path, prompt: list[int], **options: Any) -> list[tuple[list[int], float]]:
    """Tokens, without padding, and score of each beam."""
    ids = torch.tensor([prompt])
    num_beams = options["num_beams"]
    values = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "num_return_sequences": num_beams, **options}
    output = load_transformers(path).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        output_scores=True,
        **values,
    )
    found = []
    lengths = (output.beam_indices >= 0).sum(dim=1).tolist()
    for tokens, score, length in zip(output.sequences, output.sequences_scores.tolist(), lengths, strict=True):
        found.append((tokens[len(prompt) : len(prompt) + length].tolist(), score))
    return found


def sampling_of(num_beams: int, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, use_beam_search=True, n=num_beams, **values)


def ask(llm: LLM, token_lists: list[list[int]], sampling: Any) -> list[list[tuple[list[int], Any]]]:
    answers = llm.generate(token_lists, sampling, progress=False)
    check_empty(llm._engine)
    return [[(one.token_ids, one.score) for one in (answer, *answer.alternatives)] for answer in answers]


def check_same(answers: list[list[tuple[list[int], Any]]], expected: list[list[tuple[list[int], Any]]]) -> None:
    assert [[tokens for tokens, _ in one] for one in answers] == [[tokens for tokens, _ in one] for one in expected]
    for answer, other in zip(answers, expected, strict=True):
        for (_, score), (_, other_score) in zip(answer, other, strict=True):
            assert score == (other_score if other_score is None else pytest.approx(other_score, abs=1e-4, rel=1e-5))


def check_empty(engine: Engine) -> None:
    engine.scheduler.check()
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks
    assert not engine.scheduler._requests and not engine._beams._group_of


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "plain": (4, {}, {}),
    "two": (2, {}, {}),
    "length_penalty": (3, {"length_penalty": 2.0}, {"length_penalty": 2.0}),
    "short": (3, {"length_penalty": -1.0}, {"length_penalty": -1.0}),
    "early": (4, {"early_stopping": True}, {"early_stopping": True}),
    "never": (3, {"early_stopping": "never"}, {"early_stopping": "never"}),
    "repetition_penalty": (3, {"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "min_tokens": (4, {"min_tokens": 9}, {"min_new_tokens": 9}),
    "stop_token_ids": (
        3,
        {"stop_token_ids": tuple(range(3, 320, 40))},
        {"eos_token_id": [EOS, *range(3, 320, 40)]},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_beams_are_those_of_transformers(tiny_models: TinyModels, architecture: str, case: str) -> None:
    """All prompts in one batch, tokens and scores; EOS is made likely enough that some beams end before others."""
    path = tiny_models.path(architecture)
    num_beams, ours, theirs = CASES[case]
    bias = {EOS: 4.0}
    theirs = {**theirs, "num_beams": num_beams, "sequence_bias": [[[EOS], 4.0]]}
    expected = [transformers_beams(path, prompt, **theirs) for prompt in prompts()]
    assert len({len(tokens) for beams in expected for tokens, _ in beams}) > 2
    llm = LLM(str(path), **SMALL)
    check_same(ask(llm, prompts(), sampling_of(num_beams, logit_bias=bias, **ours)), expected)
    assert llm._engine.num_copied_blocks > 0


@pytest.fixture(scope="module")
def path(tiny_models: TinyModels) -> Path:
    return tiny_models.path("llama")


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(str(path), **SMALL)


def test_alone_and_among_others_the_beams_are_the_same(llm: LLM, path: Path) -> None:
    kinds = [sampling_of(3), SamplingParams(max_tokens=12, temperature=0.0), sampling_of(5, logprobs=1, min_tokens=3)]
    pairs = [(prompt, kind) for kind in kinds for prompt in prompts()]
    together = ask(llm, [prompt for prompt, _ in pairs], [kind for _, kind in pairs])
    assert [[tokens for tokens, _ in one] for one in together[6:12]] == [[a] for a in transformers_greedy(path)]
    for (prompt, kind), answer in zip(pairs, together, strict=True):
        if kind.use_beam_search:
            [alone] = llm.generate([prompt], kind, progress=False)
            check_same([[(one.token_ids, one.score) for one in (alone, *alone.alternatives)]], [answer])


@pytest.mark.parametrize("num_blocks", [9, 12, 30])
def test_where_not_all_beams_find_room_they_take_turns(llm: LLM, path: Path, num_blocks: int) -> None:
    """Two searches and a plain request in a pool that has no room for one search: the same beams all the same."""
    memory = num_blocks * llm._engine.info.block_bytes
    tight = LLM(str(path), **{**SMALL, "kv_cache_memory": memory, "max_num_seqs": 5})
    token_lists = [prompts()[3], prompts()[4], prompts()[0]]
    samplings = [sampling_of(4), sampling_of(4), SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)]
    check_same(ask(tight, token_lists, samplings), ask(llm, token_lists, samplings))


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Of each time that beams change places: how many go on, how many blocks were copied."""
    seen: list[tuple[int, int]] = []

    def watched(scheduler: Any, beams: Any, parents: Any, token_ids: Any) -> Any:
        copies = forking.reorder(scheduler, beams, parents, token_ids)
        assert len({target for _, target in copies}) == len(copies)
        for beam in beams[: len(parents)]:
            assert sum(beam.block_ids[-1] == target for _, target in copies) <= 1
        scheduler.check()
        seen.append((len(parents) - len(set(parents)), len(copies)))
        return copies

    monkeypatch.setattr(beams_module, "reorder", watched)
    yield seen


def test_a_fork_copies_one_block_at_most_and_none_that_is_full(llm: LLM, forks: list[tuple[int, int]]) -> None:
    engine = llm._engine
    engine.submit(
        engine.make_request("search", prompts()[3], SamplingParams(max_tokens=40, seed=0, use_beam_search=True, n=4))
    )
    most = 0
    while engine.has_unfinished_requests:
        engine.step()
        most = max(most, engine.info.num_blocks - engine.scheduler.pool.num_free_blocks)
    assert all(copied <= forked for forked, copied in forks)
    assert sum(copied for _, copied in forks) > 0
    # The prompt once, and for each beam what follows it: the partial block, the output, and what is handed on.
    assert most <= len(prompts()[3]) // BLOCK_SIZE + 4 * (1 + 40 // BLOCK_SIZE + 1)
    check_empty(engine)


def test_fewer_are_kept_than_searched(llm: LLM) -> None:
    [all_four] = ask(llm, [prompts()[1]], sampling_of(4))
    two = SamplingParams(max_tokens=NUM_TOKENS, use_beam_search=True, n=2, best_of=4)
    check_same(ask(llm, [prompts()[1]], two), [all_four[:2]])


def test_beams_have_logprobs(llm: LLM, path: Path) -> None:
    [answer] = llm.generate([prompts()[1]], sampling_of(3, logprobs=2, prompt_logprobs=0), progress=False)
    for beam in (answer, *answer.alternatives):
        ids = torch.tensor([[*beam.prompt_token_ids, *beam.token_ids]])
        with torch.inference_mode():
            logits = load_transformers(path)(ids).logits[0, len(beam.prompt_token_ids) - 1 : -1].log_softmax(-1)
        assert [entry.chosen.token_id for entry in beam.logprobs] == beam.token_ids
        for row, entry in zip(logits, beam.logprobs, strict=True):
            assert entry.chosen.logprob == pytest.approx(row[entry.chosen.token_id].item(), abs=1e-4)
            assert [one.logprob for one in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert beam.score == pytest.approx(
            sum(entry.chosen.logprob for entry in beam.logprobs) / len(beam.token_ids), abs=1e-4
        )
        assert [entry.chosen.token_id for entry in beam.prompt_logprobs or answer.prompt_logprobs] == prompts()[1][1:]


def test_an_aborted_search_leaves_nothing(llm: LLM) -> None:
    engine = llm._engine
    for num_steps in (0, 1, 3, 8):
        engine.submit(engine.make_request("gone", prompts()[0], LONG))
        for _ in range(num_steps):
            engine.step()
        engine.abort("gone")
        assert [end.request_id for end in engine.step().ended] == ["gone"]
        check_empty(engine)


def test_a_search_that_has_no_token_to_go_on_with_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no token"):
        llm.generate(
            [prompts()[0]], sampling_of(3, allowed_token_ids=(7,), bad_words_token_ids=((7,),)), progress=False
        )
    check_empty(llm._engine)
