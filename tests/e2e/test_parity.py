"""Parity is a contract: split = aggregated = `transformers`, token by token. All in one process, and all but HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from relevo.core.sampling_params import SamplingParams
from services.kvtransfer.agent import Agent
from services.pb import messages_pb2
from tests.support.agents import running_agent, until
from tests.support.parity import ARCHITECTURES, BLOCK_SIZE, NUM_TOKENS, has_variety, prompts, transformers_greedy
from tests.support.real_router import Answer, Router, real_router
from tests.support.real_workers import RealWorker, real_worker
from tests.support.tiny_models import EOS, TinyModels

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)
ON_NUMBA = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss")  # the others: on the reference kernels
OVER_TCP = ("llama", "gemma3")
WITHOUT_PASSES = ("llama", "gemma3", "mixtral")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Stack:
    """All holding nothing in the end: real_worker() and running_agent() assert that."""

    agent: Agent
    prefill: RealWorker
    decode: RealWorker
    split: Router
    aggregated: Router  # the same decode worker, alone


@asynccontextmanager
async def running_stack(path: Path, tmp_path: Path, **settings: Any) -> AsyncIterator[Stack]:
    """Decode offers nothing, unless told to: what is handed over is counted."""
    settings = {"offer_share": 0.0, **settings}
    async with (
        running_agent(tmp_path, num_blocks=4000) as agent,
        real_worker(path, "prefill", agent, **settings) as prefill,
        real_worker(path, "decode", agent, **settings) as decode,
        real_router(decode, prefill) as split,
        real_router(decode) as aggregated,
    ):
        yield Stack(agent, prefill, decode, split, aggregated)


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def num_full(prompt: Sequence[int]) -> int:
    return len(prompt) // BLOCK_SIZE


def begins_with_blocks_of(prompt: Sequence[int], other: Sequence[int]) -> bool:
    """A prompt does with those of itself; every one does with none."""
    end = num_full(other) * BLOCK_SIZE
    return end > 0 and list(prompt[:end]) == list(other[:end])


def num_names(token_lists: Sequence[Sequence[int]]) -> int:
    """Different full blocks, with all that is before them."""
    return len({tuple(ids[: end * BLOCK_SIZE]) for ids in token_lists for end in range(1, num_full(ids) + 1)})


def num_computed(answers: Sequence[Sequence[int]], num_uncached: Sequence[int]) -> int:
    """By a worker to whom all but so many tokens of each prompt came: the last output token is not computed."""
    assert all(len(answer) > 1 for answer in answers), "whether decode computes anything then is a race"
    return sum(uncached + len(answer) - 1 for answer, uncached in zip(answers, num_uncached, strict=True))


@pytest.mark.parametrize(
    ("architecture", "num_agents", "passes"),
    [
        *((name, 1, True) for name in ARCHITECTURES),
        *((name, 2, True) for name in OVER_TCP),
        *((name, 1, False) for name in WITHOUT_PASSES),
    ],
)
async def test_greedy_tokens_are_those_of_transformers(
    tiny_models: TinyModels, tmp_path: Path, architecture: str, num_agents: int, passes: bool
) -> None:
    """Split, and again from decode's cache; split with prefill and agent warm; unsplit, and again from the cache."""
    path = tiny_models.path(architecture)
    expected = transformers_greedy(path)
    assert has_variety(expected)
    uncached = [len(prompt) for prompt in prompts()]
    unsent = [len(prompt) - num_full(prompt) * BLOCK_SIZE for prompt in prompts()]
    # What is cached everywhere still has its last token computed, and so the block that it is in.
    warm = [len(prompt) - (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts()]
    # Decode offers nothing: what was handed over is counted here.
    settings = {
        "attention_backend": "cpu" if architecture in ON_NUMBA else "reference",
        "passes": passes,
        "offer_share": 0.0,
    }
    async with AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(running_agent(tmp_path, num_blocks=4000)) for _ in range(num_agents)]
        prefill = await stack.enter_async_context(real_worker(path, "prefill", agents[0], **settings))
        decode, other_decode = [
            await stack.enter_async_context(real_worker(path, "decode", agents[-1], **settings)) for _ in range(2)
        ]
        counters = agents[0].store.counters

        async with real_router(decode, prefill) as router:
            answers = await router.generate_all(prompts(), GREEDY)
            assert tokens(answers) == expected
            assert [answer.was_split for answer in answers] == [num_full(prompt) > 0 for prompt in prompts()]
            assert counters.sealed_blocks == num_names(prompts())
            assert decode.num_computed_tokens == num_computed(expected, unsent)

            before = decode.num_computed_tokens
            assert tokens(await router.generate_all(prompts(), GREEDY)) == expected
            assert decode.num_computed_tokens - before == num_computed(expected, warm)

        async with real_router(other_decode, prefill) as router:
            before = prefill.num_computed_tokens
            assert tokens(await router.generate_all(prompts(), GREEDY)) == expected
            assert other_decode.num_computed_tokens == num_computed(expected, unsent)
            # At most: the agent has all blocks, so decode may be done before prefill's turn came.
            # Prefill is cancelled then.
            assert prefill.num_computed_tokens - before <= sum(
                num_uncached for num_uncached, prompt in zip(warm, prompts(), strict=True) if num_full(prompt)
            )
            assert counters.sealed_blocks == num_names(prompts())

        async with real_router(other_decode) as router:
            for num_uncached in (uncached, warm):
                before = other_decode.num_computed_tokens
                answers = await router.generate_all(prompts(), GREEDY, salt="aggregated")
                assert tokens(answers) == expected
                assert not any(answer.was_split for answer in answers)
                # At most, when cold: the prompts share blocks among themselves.
                assert other_decode.num_computed_tokens - before <= num_computed(expected, num_uncached)
            assert counters.sealed_blocks == num_names(prompts())


STOPS = {"stop_token_ids": tuple(range(3, 320, 9))}
LIKELY_EOS = {"logit_bias": {EOS: 5.0}}
ALL = {
    "temperature": 1.4,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.005,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
    "logit_bias": {5: 3.0, 17: -100.0, EOS: 4.0},
    "min_tokens": 4,
    "stop_token_ids": (11, 23, 42, 77),
    "ignore_eos": True,
    "logprobs": 3,
}


def make_sampling(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": 11, **values})


@pytest.mark.parametrize(
    ("others", "parameter"),
    [
        pytest.param({}, {"temperature": 0.0}, id="greedy"),
        pytest.param({}, {"temperature": 1.8}, id="temperature"),
        pytest.param({}, {"seed": 12}, id="seed"),
        pytest.param({}, {"top_p": 0.5}, id="top_p"),
        pytest.param({}, {"top_k": 3}, id="top_k"),
        pytest.param({}, {"min_p": 0.3}, id="min_p"),
        pytest.param({}, {"presence_penalty": 2.0}, id="presence_penalty"),
        pytest.param({}, {"frequency_penalty": 2.0}, id="frequency_penalty"),
        pytest.param({}, {"repetition_penalty": 2.0}, id="repetition_penalty"),
        pytest.param({}, {"logit_bias": {7: 5.0, 9: -100.0}}, id="logit_bias"),
        pytest.param({}, STOPS, id="stop_token_ids"),
        pytest.param(STOPS, {"min_tokens": 6}, id="min_tokens"),
        pytest.param(LIKELY_EOS, {"ignore_eos": True}, id="ignore_eos"),
        pytest.param({}, {"logit_bias": {EOS: 100.0}}, id="eos-first"),
        pytest.param({}, {"max_tokens": 1}, id="max_tokens-1"),
        pytest.param({}, ALL, id="all"),
    ],
)
async def test_sampling_parameter_means_the_same_when_split(
    tiny_models: TinyModels, tmp_path: Path, others: dict[str, Any], parameter: dict[str, Any]
) -> None:
    """`others` is what makes the parameter show: with it the tokens are not those without."""
    async with running_stack(tiny_models.path("llama"), tmp_path, attention_backend="cpu") as stack:
        aggregated = await check_split_equals_aggregated(stack, make_sampling(**others | parameter))
        without = await stack.aggregated.generate_all(prompts(), make_sampling(**others))
        assert tokens(without) != tokens(aggregated), "the parameter does nothing here"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
async def test_all_sampling_parameters_at_once(tiny_models: TinyModels, tmp_path: Path, architecture: str) -> None:
    async with running_stack(tiny_models.path(architecture), tmp_path) as stack:
        await check_split_equals_aggregated(stack, make_sampling(**ALL))


@pytest.mark.parametrize("logprobs", [0, 5])
async def test_logprobs_are_the_same_when_split(tiny_models: TinyModels, tmp_path: Path, logprobs: int) -> None:
    async with running_stack(tiny_models.path("llama"), tmp_path, attention_backend="cpu") as stack:
        answers = await check_split_equals_aggregated(stack, make_sampling(logprobs=logprobs))
        assert tokens(answers) == tokens(await stack.aggregated.generate_all(prompts(), make_sampling()))
        for answer in answers:
            assert [entry.chosen.token_id for entry in answer.logprobs] == answer.token_ids
            assert all(len(entry.top) == logprobs for entry in answer.logprobs)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
async def test_workers_that_run_ahead_change_no_token(
    tiny_models: TinyModels, tmp_path: Path, architecture: str
) -> None:
    """As on a GPU: each step is launched before the one before it is read. Blocks go over by what has been read."""
    path = tiny_models.path(architecture)
    async with running_stack(path, tmp_path, attention_backend="cpu", async_scheduling=True) as stack:
        answers = await check_split_equals_aggregated(stack, make_sampling(logprobs=2))
        penalized = await check_split_equals_aggregated(stack, make_sampling(**ALL), salt="penalized")
        for router in (stack.split, stack.aggregated):
            assert tokens(await router.generate_all(prompts(), GREEDY, salt="greedy")) == transformers_greedy(path)
    async with running_stack(path, tmp_path, attention_backend="cpu") as stack:
        assert tokens(await stack.aggregated.generate_all(prompts(), make_sampling(logprobs=2))) == tokens(answers)
        assert tokens(await stack.aggregated.generate_all(prompts(), make_sampling(**ALL))) == tokens(penalized)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
async def test_blocks_that_come_from_cache_to_cache_change_no_token(
    tiny_models: TinyModels, tmp_path: Path, any_nixl: None, architecture: str
) -> None:
    path = tiny_models.path(architecture)
    async with running_stack(path, tmp_path, attention_backend="cpu", direct_kv=True) as stack:
        await stack.split.generate_all(prompts(), GREEDY, salt="first")
        worker = stack.decode.worker
        assert worker.direct_kv is not None
        [peer] = worker.direct_kv._peers.values()
        await until(lambda: peer.is_connected)
        before = worker.transfers._blocks.labels("in")._value.get()
        assert tokens(await stack.split.generate_all(prompts(), GREEDY, salt="greedy")) == transformers_greedy(path)
        await check_split_equals_aggregated(stack, make_sampling(**ALL), salt="sampled")
        assert worker.transfers._blocks.labels("direct")._value.get() >= 2 * num_names(prompts())
        assert worker.transfers._blocks.labels("in")._value.get() == before


async def check_split_equals_aggregated(stack: Stack, sampling: SamplingParams, salt: str = "") -> list[Answer]:
    """From cold caches both. Returns the aggregated answers."""
    num_sealed = stack.agent.store.counters.sealed_blocks
    split = await stack.split.generate_all(prompts(), sampling, salt=salt)
    assert stack.agent.store.counters.sealed_blocks - num_sealed == num_names(prompts())
    assert [answer.was_split for answer in split] == [num_full(prompt) > 0 for prompt in prompts()]
    aggregated = await stack.aggregated.generate_all(prompts(), sampling, salt=f"aggregated {salt}")
    assert not any(answer.was_split for answer in aggregated)
    for one, other in zip(split, aggregated, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert [flat(entry) for entry in one.logprobs] == [flat(entry) for entry in other.logprobs]
    return aggregated


def flat(entry: messages_pb2.TokenLogprobs) -> list[tuple[int, int, Any]]:
    return [(one.token_id, one.rank, pytest.approx(one.logprob, abs=1e-4)) for one in (entry.chosen, *entry.top)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
async def test_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption(
    tiny_models: TinyModels, tmp_path: Path, architecture: str
) -> None:
    """Split or not. Answers are longer than what decode reserves for them when split: so those are preempted too."""
    path = tiny_models.path(architecture)
    sampling = make_sampling(max_tokens=90, top_p=0.95, frequency_penalty=0.3, ignore_eos=True)
    token_lists = [prompt[-20:] for prompt in prompts() if num_full(prompt)]
    async with running_stack(path, tmp_path, attention_backend="cpu", max_model_len=128) as stack:
        memory = 13 * stack.decode.engine.info.block_bytes
        settings = {"max_model_len": 128, "kv_cache_memory": memory, "offer_share": 0.0}
        async with real_worker(path, "decode", stack.agent, attention_backend="cpu", **settings) as tight:
            alone = [(await stack.aggregated.generate(ids, sampling)).token_ids for ids in token_lists]
            assert all(len(answer) == 90 for answer in alone)
            split_alone = [await stack.split.generate(ids, sampling, salt="alone") for ids in token_lists]
            assert all(answer.was_split for answer in split_alone)
            assert tokens(split_alone) == alone
            assert tokens(await stack.split.generate_all(token_lists, sampling, salt="batch")) == alone
            assert tokens(await stack.aggregated.generate_all(token_lists, sampling, salt="aggregated")) == alone
            assert not stack.decode.num_preemptions
            for prefill in (stack.prefill, None):
                before = tight.num_preemptions
                async with real_router(tight, prefill) as router:
                    answers = await router.generate_all(token_lists, sampling, salt=f"tight, {prefill is not None}")
                assert tokens(answers) == alone
                assert tight.num_preemptions > before, "there was room for all: nothing was shown"


@pytest.mark.parametrize("num_steps", [0, 1, 4])
async def test_prefill_worker_that_stops_in_the_middle_changes_no_token(
    tiny_models: TinyModels, tmp_path: Path, num_steps: int
) -> None:
    """Of the five steps at least that the prompts take there: some are announced, some sealed in part, some through."""
    path = tiny_models.path("gemma3")
    async with running_stack(path, tmp_path, attention_backend="cpu") as stack:
        stack.prefill.hold_at(num_steps)
        generating = asyncio.create_task(stack.split.generate_all(prompts(), GREEDY))
        await until(lambda: stack.prefill.is_held)
        stopping = asyncio.create_task(stack.prefill.stop())
        await until(lambda: not stack.agent.store.table.audit().num_leases)  # all are cancelled, and none has ended
        stack.prefill.let_go()
        await stopping
        answers = await generating
        assert tokens(answers) == transformers_greedy(path)
        assert any(answer.was_split for answer in answers)
        assert stack.agent.store.counters.sealed_blocks < num_names(prompts())
        # Again, now that the router knows: by decode alone.
        again = await stack.split.generate_all(prompts(), GREEDY, salt="again")
        assert tokens(again) == transformers_greedy(path)
        assert not any(answer.was_split for answer in again)


async def test_prefill_worker_that_stops_after_its_first_tokens_changes_no_token(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients have them, and no block was sealed: decode computes the prompts and goes on from the second token."""
    sampling = make_sampling(ignore_eos=True)
    # Whose blocks all come for another prompt has to wait for that one's.
    apart = [prompt for prompt in prompts() if sum(begins_with_blocks_of(other, prompt) for other in prompts()) <= 1]
    num_split = sum(num_full(prompt) > 0 for prompt in apart)
    assert num_split > 1
    path = tiny_models.path("llama")
    async with running_stack(path, tmp_path, attention_backend="cpu") as stack:

        async def never_copy(copy: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(stack.prefill.worker.copier, "run", never_copy)
        generating = asyncio.create_task(stack.split.generate_all(apart, sampling))
        # A first token each, and all of those that are too short to be split.
        num_tokens = num_split + NUM_TOKENS * (len(apart) - num_split)
        await until(lambda: stack.split.num_tokens == num_tokens)
        await stack.prefill.stop()
        answers = await generating
        assert stack.agent.store.counters.sealed_blocks == 0
        assert tokens(answers) == tokens(await stack.aggregated.generate_all(apart, sampling, salt="aggregated"))
