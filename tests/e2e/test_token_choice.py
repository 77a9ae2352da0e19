"""What is asked about tokens means the same where prefill and decode are split, and wherever the request moves."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.test_parity import flat, make_sampling, one_thread, running_stack, tokens
from tests.support.parity import prompts
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
