"""The step by which memory is profiled: as large as settings allow, and computed by the engine's own parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from relevo.core.errors import RelevoError
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import ScheduledRequest
from relevo.engine import engine as engine_module
from relevo.engine import parts
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.gpu.graphs import GRAPH_BYTES
from relevo.engine.gpu.largest_step import largest_step
from relevo.engine.gpu.memory import GpuMemory
from relevo.engine.model_runner import ModelRunner, RunResult
from relevo.engine.shortage import OutOfMemory
from relevo.kernels import reference
from relevo.models.causal_lm import CausalLM
from tests.support.fake_gpu import GIB, FakeGpu
from tests.support.tiny_models import TinyModels


def sizes(entries: Sequence[ScheduledRequest]) -> list[tuple[int, int]]:
    """Of each request: known tokens in this step, drafts."""
    return [(entry.num_known_tokens, len(entry.draft_token_ids)) for entry in entries]


@pytest.mark.parametrize(
    ("options", "max_model_len", "expected"),
    [
        ({"max_num_seqs": 4, "max_num_batched_tokens": 20}, 100, [(17, 0), (1, 0), (1, 0), (1, 0)]),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 4}, 100, [(1, 0)] * 4),
        # prompts can't be longer than the context
        ({"max_num_seqs": 4, "max_num_batched_tokens": 20}, 9, [(8, 0), (8, 0), (3, 0), (1, 0)]),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 99}, 9, [(8, 0)] * 4),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 20, "speculative": "draft:demo"}, 100, [(9, 5), (1, 5)]),
        # drafts are what the step has room for
        ({"max_num_seqs": 4, "max_num_batched_tokens": 14, "speculative": "ngram"}, 100, [(3, 2)] + [(1, 2)] * 3),
        ({"max_num_seqs": 1, "max_num_batched_tokens": 64, "speculative": "suffix"}, 6, [(1, 4)]),
        ({"max_num_seqs": 1, "max_num_batched_tokens": 1}, 1, [(1, 0)]),
    ],
)
def test_shape(options: dict[str, Any], max_model_len: int, expected: list[tuple[int, int]]) -> None:
    entries = largest_step(EngineConfig(block_size=4, **options), max_model_len, vocab_size=50)
    assert sizes(entries) == expected
    for entry in entries:
        request = entry.request
        assert entry.samples
        assert len(request.block_ids) * 4 >= request.num_computed_tokens + entry.num_scheduled_tokens
        assert len(entry.token_ids) == entry.num_scheduled_tokens


def test_first_request_has_the_longest_context_and_as_many_prompt_logprobs_as_a_step_may() -> None:
    first, second = largest_step(EngineConfig(max_num_seqs=2, max_num_batched_tokens=3000), 8000, vocab_size=1 << 15)
    assert first.request.num_computed_tokens + first.num_scheduled_tokens == 7999
    assert first.request.num_missing_prompt_logprobs == 1024
    assert second.request.num_missing_prompt_logprobs == 0


@contextmanager
def started_on(gpu: FakeGpu) -> Iterator[GpuMemory]:
    yield GpuMemory(torch.device("cpu"), gpu.total, gpu.free, 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """An engine takes the CPU for this one, and its model 16 GiB of it."""
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    monkeypatch.setattr(engine_module, "start_on", lambda device, lock_dir: started_on(gpu))
    load_configured: Any = vars(parts)["load_configured"]

    def load(*args: Any) -> CausalLM:
        gpu.running.allocated += 16 * GIB
        model: CausalLM = load_configured(*args)
        return model

    monkeypatch.setattr(parts, "load_configured", load)
    return gpu


# Of graphs: how many, and the rows of the largest.
@pytest.mark.parametrize(
    ("speculative", "enforce_eager", "num_graphs", "graph_rows"),
    [(None, False, 2, 2), (None, True, 0, 0), ("draft", False, 4 + 4, 8), ("ngram", False, 4, 8)],
)
@pytest.mark.usefixtures("skips_padding")
def test_engine_computes_it_and_takes_what_is_left(
    speculative: str | None,
    enforce_eager: bool,
    num_graphs: int,
    graph_rows: int,
    gpu: FakeGpu,
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in's memory grows as the step's logits do: half a gibibyte for every row."""
    path = str(tiny_models.path("llama"))
    runs: list[tuple[Sequence[ScheduledRequest], RunResult]] = []
    most_rows = 0
    run, forward = ModelRunner.run, CausalLM.forward

    def seen_run(self: ModelRunner, scheduled: Sequence[ScheduledRequest]) -> RunResult:
        result = run(self, scheduled)
        runs.append((scheduled, result))
        return result

    def seen_forward(self: CausalLM, input_ids: Tensor, positions: Tensor, context: Any, wanted: Tensor) -> Tensor:
        nonlocal most_rows
        most_rows = max(most_rows, len(wanted))
        with gpu.allocated(len(wanted) * GIB // 2):
            return forward(self, input_ids, positions, context, wanted)

    monkeypatch.setattr(ModelRunner, "run", seen_run)
    monkeypatch.setattr(CausalLM, "forward", seen_forward)
    engine = Engine(
        EngineConfig(
            model=path,
            dtype="float32",
            attention_backend="reference",
            max_num_seqs=2,
            max_num_batched_tokens=16,
            max_model_len=24,
            speculative=f"draft:{path}" if speculative == "draft" else speculative,
            num_speculative_tokens=3 if speculative else None,
            gpu_memory_utilization=0.37,
            enforce_eager=enforce_eager,
        )
    )
    scheduled, result = runs[0]
    num_drafts = 3 if speculative else 0
    assert sizes(scheduled) == [(15 - 2 * num_drafts, num_drafts), (1, num_drafts)]
    assert set(result.sampled) == {"largest-0", "largest-1"}
    assert not any(isinstance(tokens, RelevoError) for tokens in result.sampled.values())
    num_prompt_rows = 15 - 2 * num_drafts - 1
    assert len(result.prompt_logprobs["largest-0"]) == num_prompt_rows
    assert most_rows == 2 * (1 + num_drafts) + num_prompt_rows
    graphs = graph_rows * GIB // 2 + num_graphs * GRAPH_BYTES
    kv_bytes = int(0.37 * 80 * GIB) - 16 * GIB - GIB // 2 - most_rows * GIB // 2 - graphs
    block_bytes = engine.info.block_bytes * (2 if speculative == "draft" else 1)
    assert engine.info.num_blocks == kv_bytes // block_bytes
    assert gpu.running.cached == most_rows * GIB // 2, "kept for steps"
    # And it works.
    engine.submit(engine.make_request("a", [1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0, seed=0)))
    tokens: list[int] = []
    while engine.has_unfinished_requests:
        tokens += [token for new in engine.step().tokens for token in new.token_ids]
    assert len(tokens) == 4


def test_step_that_does_not_fit_says_what_to_lower(
    gpu: FakeGpu, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has …")

    monkeypatch.setattr(reference, "sample", fail)
    config = EngineConfig(model=str(tiny_models.path("llama")), attention_backend="reference")
    with pytest.raises(
        OutOfMemory, match=r"for a step of 512 tokens of 64 requests .* 9.00 GiB.*lower max_num_batched"
    ):
        Engine(config)
