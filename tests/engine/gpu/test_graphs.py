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
from relevo.engine.gpu.graphs import Replay, draft_graph_shapes, graph_shapes
from relevo.engine.shortage import OutOfMemory
from relevo.engine.spec_decode.draft_model import DraftModelProposer
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


def capture(engine: Engine, max_drafts: int = 0) -> Recomputing:
    recomputing = Recomputing()
    engine.runner.forward.capture_graphs(recomputing, graph_shapes(4, max_drafts), engine.info.max_model_len)
    assert engine.runner.forward.graphs is not None
    return recomputing


def engine_of(tiny_models: TinyModels, **options: Any) -> Engine:
    options = {"backend": "reference", "max_num_seqs": 4, "max_model_len": 64, **options}
    return make_engine(str(tiny_models.path("llama")), **options)


def sizes(max_num_seqs: int) -> list[int]:
    return [shape.num_seqs for shape in graph_shapes(max_num_seqs, 0)]


def test_sizes_are_few_and_never_twice_the_batch() -> None:
    assert sizes(1) == [1] and sizes(4) == [1, 2, 4] and sizes(5) == [1, 2, 4, 5]
    many = sizes(300)
    assert many[-1] == 300 and len(many) < 30 and many == sorted({*many})
    assert all(after <= 2 * before for before, after in pairwise(many))
    assert graph_shapes(2, 3) == [(1, 1), (2, 1), (1, 4), (2, 4)]


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
def test_long_prompts_are_computed_without_graphs(tiny_models: TinyModels) -> None:
    engine = engine_of(tiny_models)
    recomputing = capture(engine, max_drafts=1)
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
    recomputing = capture(engine, max_drafts=3)
    assert generate(engine, repeating, GREEDY) == expected
    stats = engine.speculator.stats()
    assert stats.num_draft_tokens and recomputing.counts[0]


@pytest.mark.usefixtures("skips_padding")
def test_a_draft_model_drafts_in_graphs(tiny_models: TinyModels) -> None:
    """The target's own weights, so that all drafts are accepted: two tokens to catch up with, then one by one."""
    path = str(tiny_models.path("llama"))
    engine = engine_of(tiny_models, speculative=f"draft:{path}", num_speculative_tokens=3, adaptive_speculation=False)
    sampling = replace(GREEDY, max_tokens=16)
    expected = generate(engine, PROMPTS, sampling)
    proposer = engine.speculator.proposer if engine.speculator else None
    assert isinstance(proposer, DraftModelProposer)
    recomputing = Recomputing()
    proposer.forward.capture_graphs(recomputing, draft_graph_shapes(4), engine.info.max_model_len)
    capture(engine, max_drafts=3)
    assert generate(engine, PROMPTS, sampling) == expected
    one_token, two_tokens = recomputing.counts[3:], recomputing.counts[:3]
    assert sum(one_token) > sum(two_tokens) > 0


@pytest.mark.usefixtures("skips_padding")
def test_rows_whose_logits_nobody_wants_are_left_out(tiny_models: TinyModels) -> None:
    """Prompts of two, three and four tokens, one of them with log-probabilities, in the graph for four of four."""
    engine = engine_of(tiny_models)
    token_lists = [[5, 6], [7, 8, 9], [10, 11, 12, 13]]
    params = [GREEDY, replace(GREEDY, temperature=1.0), replace(GREEDY, prompt_logprobs=2)]
    results = []
    for graphs in (False, True):
        recomputing = capture(engine, max_drafts=3) if graphs else Recomputing()
        told: list[Any] = []
        for name, ids, sampling in zip("abc", token_lists, params, strict=True):
            engine.submit(engine.make_request(name, ids, sampling, cache_salt=str(graphs)))
        while engine.has_unfinished_requests:
            result = engine.step()
            told += [*result.tokens, *result.prompt_logprobs]
        results.append(told)
    assert recomputing.counts[0] == 1 and sum(recomputing.counts) == 6
    assert [[new.request_id for new in told] for told in results] == [[new.request_id for new in results[0]]] * 2
    for one, other in zip(*results, strict=True):
        assert getattr(one, "token_ids", None) == getattr(other, "token_ids", None)
        assert [[e.logprob for e in each.top] for each in one.logprobs] == [
            pytest.approx([e.logprob for e in each.top], abs=1e-5) for each in other.logprobs
        ]


def test_where_a_model_cannot_be_captured_there_are_no_graphs(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(tiny_models)
    forward: ForwardPass = engine.runner.forward

    def fail(compute: Callable[[], None]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors")

    forward.capture_graphs(fail, graph_shapes(4, 0), 64)
    assert forward.graphs is None and "operation not permitted when stream is capturing" in caplog.text
    assert "CUDA kernel errors" not in caplog.text

    def exhaust(compute: Callable[[], None]) -> Replay:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match=r"out of memory for CUDA graphs .*or set enforce_eager"):
        forward.capture_graphs(exhaust, graph_shapes(4, 0), 64)
