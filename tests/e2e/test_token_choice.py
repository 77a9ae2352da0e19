"""What is asked about tokens means the same where prefill and decode are split, and wherever the request moves."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path

import pytest

from relevo.core.sampling_params import choice_seed
from tests.e2e.test_parity import flat, make_sampling, one_thread, running_stack, tokens
from tests.support.parity import BLOCK_SIZE, prompts
from tests.support.tiny_models import TinyModels

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
