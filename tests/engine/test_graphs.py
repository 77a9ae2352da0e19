"""Decode steps over static buffers, padded to captured sizes, say what eager ones say.

There is no GPU: what stands in for a graph computes again, from the buffers alone, what was captured. Kernels are
those of `reference`, taught to skip padding as Triton's do; once Triton's own, in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from relevo.core.sampling_params import SamplingParams
from relevo.engine.engine import Engine
from relevo.engine.forward_pass import ForwardPass
from relevo.engine.graphs import Replay, graph_sizes
from relevo.engine.shortage import OutOfMemory
from relevo.engine.spec_decode.ngram import NgramProposer
from relevo.engine.spec_decode.row_costs import RowCosts
from relevo.engine.spec_decode.speculator import Speculator
from tests.engine.test_parity import generate, make_engine
from tests.support.tiny_models import TinyModels

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20] * 17]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, seed=0, ignore_eos=True)


class Recomputing:
    """counts: replays, by the order of capture"""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, compute: Callable[[], None]) -> Replay:
        at = len(self.counts)
        self.counts.append(0)
        compute()

        def replay() -> None:
            self.counts[at] += 1
            compute()

        return replay


def capture(engine: Engine, *query_lens: int) -> Recomputing:
    recomputing = Recomputing()
    engine.runner.forward.capture_graphs(
        recomputing,
        max_num_seqs=4,
        max_model_len=engine.info.max_model_len,
        query_lens=query_lens or (1,),
    )
    assert engine.runner.forward.graphs is not None
    return recomputing


def engine_of(tiny_models: TinyModels, **options: Any) -> Engine:
    options = {"backend": "reference", "max_num_seqs": 4, "max_model_len": 64, **options}
    return make_engine(str(tiny_models.path("llama")), **options)


def test_sizes_are_few_and_never_twice_the_batch() -> None:
    assert graph_sizes(1) == [1] and graph_sizes(4) == [1, 2, 4] and graph_sizes(5) == [1, 2, 4, 5]
    sizes = graph_sizes(300)
    assert sizes[-1] == 300 and len(sizes) < 30 and sizes == sorted({*sizes})
    assert all(after <= 2 * before for before, after in pairwise(sizes))


@pytest.mark.usefixtures("skips_padding")
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_padded_steps_say_what_eager_ones_say(tiny_models: TinyModels, async_scheduling: bool) -> None:
    engine = engine_of(tiny_models, async_scheduling=async_scheduling)
    expected = generate(engine, PROMPTS, GREEDY)
    sampling = replace(GREEDY, temperature=1.0, seed=3)
    sampled = generate(engine, PROMPTS, sampling)
    recomputing = capture(engine)
    assert generate(engine, PROMPTS, GREEDY) == expected
    assert recomputing.counts[0] >= 5  # three requests in the graph for four
    assert generate(engine, PROMPTS, sampling) == sampled
    assert generate(engine, PROMPTS[:1], GREEDY) == expected[:1]
    assert recomputing.counts[2] >= 5


@pytest.mark.usefixtures("skips_padding")
def test_prompts_and_prompt_logprobs_are_computed_without_graphs(tiny_models: TinyModels) -> None:
    engine = engine_of(tiny_models)
    recomputing = capture(engine)
    sampling = replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    engine.submit(engine.make_request("r", PROMPTS[0], sampling))
    results = [engine.step() for _ in range(2)]
    assert [len(told.logprobs) for result in results for told in result.prompt_logprobs] == [2]
    assert not any(recomputing.counts)


def test_padding_is_written_nowhere_with_triton(tiny_models: TinyModels) -> None:
    """Three requests in the graph for four, whose tokens are the same as before."""
    engine = engine_of(tiny_models, backend="triton")
    sampling = replace(GREEDY, max_tokens=3)
    expected = generate(engine, PROMPTS[:1], sampling)
    recomputing = capture(engine)
    for name in "abc":
        engine.submit(engine.make_request(name, PROMPTS[0], sampling))
    engine.step()
    before = engine.kv_cache.storage.clone()
    answers = [new.token_ids for _ in range(2) for new in engine.step().tokens]
    changed = (engine.kv_cache.storage != before).any(dim=1).nonzero().flatten().tolist()
    assert recomputing.counts[0] == 2 and len(changed) == 3
    assert answers == [[token] for token in expected[0][1:] for _ in "abc"]


@pytest.mark.usefixtures("skips_padding")
def test_drafts_are_verified_in_graphs(tiny_models: TinyModels) -> None:
    """Sequences of one to four tokens, in one batch padded to four of four."""
    engine = engine_of(tiny_models)
    repeating = [[5, 6, 7, 8] * 3, [9, 10, 11] * 4, PROMPTS[1]]
    expected = generate(engine, repeating, GREEDY)
    costs = RowCosts({1: 1.0, 64: 1.0})
    engine.speculator = Speculator(NgramProposer(), 3, costs, None, adaptive=False)
    recomputing = capture(engine, 1, 4)
    assert generate(engine, repeating, GREEDY) == expected
    stats = engine.speculator.stats()
    assert stats.num_draft_tokens and recomputing.counts[0]


def test_where_a_model_cannot_be_captured_there_are_no_graphs(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(tiny_models)
    forward: ForwardPass = engine.runner.forward

    def fail(compute: Callable[[], None]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors")

    forward.capture_graphs(fail, max_num_seqs=4, max_model_len=64, query_lens=(1,))
    assert forward.graphs is None and "operation not permitted when stream is capturing" in caplog.text
    assert "CUDA kernel errors" not in caplog.text

    def exhaust(compute: Callable[[], None]) -> Replay:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match=r"out of memory for CUDA graphs .*or set enforce_eager"):
        forward.capture_graphs(exhaust, max_num_seqs=4, max_model_len=64, query_lens=(1,))
