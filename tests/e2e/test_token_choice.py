"""What is asked about tokens means the same where prefill and decode are split, and wherever the request moves."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path

import pytest

from relevo import LLM
from relevo.core.errors import InvalidRequest
from relevo.core.request import FinishReason
from relevo.core.sampling_params import LogitsProcessorCall, choice_seed
from tests.e2e.test_parity import check_split_equals_aggregated, flat, make_sampling, one_thread, running_stack, tokens
from tests.support.agents import running_agent, until
from tests.support.parity import BLOCK_SIZE, prompts
from tests.support.processors import install
from tests.support.real_router import Answer, router_over
from tests.support.real_workers import real_worker
from tests.support.tiny_models import EOS, TinyModels

__all__ = ["one_thread"]  # a fixture that every test here uses


async def test_prompt_logprobs_are_the_same_where_prompts_are_split(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Decode computes such prompts itself, all of each, though prefill and cache are there."""
    plain = make_sampling()
    sampling = make_sampling(prompt_logprobs=2)
    async with running_stack(tiny_models.path("llama"), tmp_path, attention_backend="cpu") as stack:
        expected = await stack.aggregated.generate_all(prompts(), sampling, salt="aggregated")
        assert tokens(await stack.split.generate_all(prompts(), plain)) == tokens(expected)
        before = stack.decode.num_computed_tokens
        answers = await stack.split.generate_all(prompts(), sampling)
        assert not any(answer.was_split for answer in answers)
        num_outputs = sum(len(answer.token_ids) - 1 for answer in answers)
        assert stack.decode.num_computed_tokens - before == sum(map(len, prompts())) + num_outputs
        assert tokens(answers) == tokens(expected)
        for prompt, one, other in zip(prompts(), answers, expected, strict=True):
            assert [entry.chosen.token_id for entry in one.prompt_logprobs] == prompt[1:]
            assert [flat(entry) for entry in one.prompt_logprobs] == [flat(entry) for entry in other.prompt_logprobs]
        assert not any(answer.prompt_logprobs for answer in await stack.split.generate_all(prompts(), plain))


def with_long_context(path: Path, folder: Path) -> Path:
    """The same model for more positions: it rotates, so that it can."""
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.mark.parametrize("is_split", [False, True], ids=["direct", "split"])
async def test_eight_choices_hold_the_prompts_kv_once(tiny_models: TinyModels, tmp_path: Path, is_split: bool) -> None:
    """At most 1.1 × (prompt + 8 outputs), of a prompt of 1,000 tokens; and each is what it is alone."""
    path = with_long_context(tiny_models.path("llama"), tmp_path / "model")
    numbers = random.Random(1)
    prompt = [numbers.randrange(3, 300) for _ in range(1000)]
    samplings = [make_sampling(seed=choice_seed(5, nth), max_tokens=64, ignore_eos=True) for nth in range(8)]
    async with running_stack(path, tmp_path, attention_backend="cpu", max_num_batched_tokens=256) as stack:
        router = stack.split if is_split else stack.aggregated
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(router.generate(prompt, sampling)) for sampling in samplings]
        allowed_tokens = 1.1 * (len(prompt) + 8 * 64)
        assert stack.decode.most_blocks * BLOCK_SIZE <= allowed_tokens
        assert stack.prefill.most_blocks <= (-(-len(prompt) // BLOCK_SIZE) if is_split else 0)
        # The prompt is computed once, in the fleet; of it each choice computes the end, which is no full block.
        rest = len(prompt) % BLOCK_SIZE
        computed = stack.decode.num_computed_tokens + stack.prefill.num_computed_tokens
        assert computed <= len(prompt) + 8 * (rest + 63)
        alone = [await stack.aggregated.generate(prompt, sampling, salt="alone") for sampling in samplings[:3]]
        assert [answer.result().token_ids for answer in answers[:3]] == tokens(alone)
        assert len({tuple(answer.result().token_ids) for answer in answers}) == 8


def beams_of(answer: Answer) -> list[tuple[list[int], object, FinishReason]]:
    return [(list(beam.token_ids), pytest.approx(beam.score, abs=1e-4), beam.finish_reason) for beam in answer.beams]


async def test_beams_are_those_of_the_engine_alone_wherever_prefill_is(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path("llama")
    llm = LLM(str(path), dtype="float32", kv_cache_memory=8 << 20)
    sampling = make_sampling(
        use_beam_search=True, n=3, best_of=4, length_penalty=0.7, logit_bias={EOS: 3.0}, logprobs=1
    )
    alone = llm.generate(prompts(), sampling, progress=False)
    async with running_stack(path, tmp_path, attention_backend="cpu") as stack:
        for router in (stack.aggregated, stack.split):
            answers = await router.generate_all(prompts(), sampling)
            for answer, expected in zip(answers, alone, strict=True):
                assert not answer.token_ids, "nothing is streamed"
                assert beams_of(answer) == [
                    (one.token_ids, one.score, one.finish_reason) for one in (expected, *expected.alternatives)
                ]
                for beam in answer.beams:
                    assert [entry.chosen.token_id for entry in beam.logprobs] == list(beam.token_ids)


async def test_beams_go_on_from_the_prompt_if_their_worker_is_lost(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path("llama")
    sampling = make_sampling(use_beam_search=True, n=3, ignore_eos=True)
    async with (
        running_agent(tmp_path, num_blocks=200) as agent,
        real_worker(path, "decode", agent) as first,
        real_worker(path, "decode", agent) as second,
        router_over([first, second], [], split=False) as router,
    ):
        expected = await router.generate(prompts()[3], sampling, salt="before")
        for worker in (first, second):
            worker.hold_at(worker.num_steps + 6)
        generating = asyncio.create_task(router.generate(prompts()[3], sampling))
        await until(lambda: first.is_held or second.is_held)
        lost, other = (first, second) if first.is_held else (second, first)
        other.let_go()
        stopping = asyncio.create_task(lost.stop())
        await asyncio.sleep(0)
        lost.let_go()
        answer = await generating
        await stopping
        assert beams_of(answer) == [(list(b.token_ids), b.score, b.finish_reason) for b in expected.beams]
        assert answer.num_tries == 2


async def test_processors_mean_the_same_when_split_and_unknown_ones_are_refused(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    call = LogitsProcessorCall("favour", '{"kwargs": {"step": 5, "bonus": 3}}')
    async with running_stack(tiny_models.path("llama"), tmp_path, attention_backend="cpu") as stack:
        answers = await check_split_equals_aggregated(stack, make_sampling(logits_processors=(call,)))
        assert tokens(answers) != tokens(await stack.aggregated.generate_all(prompts(), make_sampling()))
        for router in (stack.split, stack.aggregated):
            for name, arguments, message in (("nobody", "", "no logits"), ("fail_after", '{"args": [2]}', "as told")):
                refused = make_sampling(logits_processors=(LogitsProcessorCall(name, arguments),), ignore_eos=True)
                other = asyncio.create_task(router.generate(prompts()[1], make_sampling()))
                with pytest.raises(InvalidRequest, match=message) as error:
                    await router.generate(prompts()[3], refused, salt=name)
                assert error.value.param == "logits_processors"
                await other
            first = make_sampling(logits_processors=(LogitsProcessorCall("fail_after", '{"args": [0]}'),))
            with pytest.raises(InvalidRequest, match="as told"):  # where split, prefill is the first to find out
                await router.generate(prompts()[3], first, salt="first")
