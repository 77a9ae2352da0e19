"""Launching a step looks at nothing that the device computes: tensors without values show it, for looking at one fails.

So on a GPU nobody in a step waits but who reads its tokens. Kernels are those of `reference`, but for those that look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relevo.core.errors import RelevoError
from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import ScheduledRequest
from relevo.engine.engine import Engine
from relevo.engine.grammar_masks import Masks
from relevo.engine.kv_cache import KVCache
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.model_runner import LaunchedStep, ModelRunner
from relevo.engine.sampler import EnqueuedTokens, Sampler
from relevo.kernels import reference
from tests.engine.test_parity import make_engine
from tests.support.builders import make_request
from tests.support.tiny_models import TinyModels

VOCAB = 100
NOWHERE = torch.device("meta")


def attention_somewhere(query: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], v_cache.shape[3])


def sample_somewhere(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


def store_somewhere(*_: Any) -> None:
    pass


KERNELS: Any = SimpleNamespace(
    **{
        **vars(reference),
        "paged_attention": attention_somewhere,
        "sample": sample_somewhere,
        "store_kv": store_somewhere,
        "rotary_store_kv": lambda query, *_: query,
    }
)


def enqueue(params: Sequence[SamplingParams], masks: Masks | None = None) -> EnqueuedTokens:
    rows = [SamplingRow(p, [1, 2, 3, 4, 3], 3, (0,)) for p in params]
    logits = torch.empty(len(rows), VOCAB, device=NOWHERE)
    return Sampler(VOCAB, NOWHERE, KERNELS).enqueue(logits, rows, masks)


PLAIN = SamplingParams(max_tokens=9, seed=1)
MANY = [
    PLAIN,
    replace(PLAIN, temperature=0.0),
    replace(PLAIN, top_k=3, top_p=0.5, min_p=0.1),
    replace(PLAIN, logprobs=3),
    replace(PLAIN, logprobs=3, logprob_token_ids=(5, 6)),
    replace(PLAIN, logit_bias={3: 1.0}, min_tokens=8, allowed_token_ids=(1, 2, 3)),
    replace(PLAIN, repetition_penalty=1.1, frequency_penalty=0.5, bad_words_token_ids=((3, 4), (7,))),
]


@pytest.mark.parametrize("params", [*([each] for each in MANY), MANY], ids=lambda params: str(len(params)))
def test_choosing_tokens(params: list[SamplingParams]) -> None:
    enqueued = enqueue(params)
    assert enqueued.token_ids.shape == (len(params),)
    with pytest.raises((NotImplementedError, RuntimeError)):
        enqueued.read()


def test_masking_by_grammars() -> None:
    masks = Masks(np.array([1], dtype=np.int64), np.ones((1, 4), dtype=np.int32))
    assert enqueue([PLAIN, PLAIN], masks).token_ids.shape == (2,)


@pytest.fixture
def runner(tiny_models: TinyModels) -> ModelRunner:
    """Of an engine's model, moved to where nothing has a value; without passes, which keep their weights."""
    engine: Engine = make_engine(str(tiny_models.path("llama")), backend="reference", passes=False)
    model = engine.runner.model
    moved = replace(model, module=model.module.to(NOWHERE))
    cache = KVCache(engine.kv_cache.layout, 8, NOWHERE)
    return ModelRunner(moved, cache, KERNELS, Sampler(model.vocab_size, NOWHERE, KERNELS), (0,))


def running(name: str, num_tokens: int, num_computed: int) -> Request:
    request = make_request(name, range(5, 5 + num_tokens), block_size=16)
    request.num_computed_tokens, request.block_ids = num_computed, [1, 2]
    return request


def launch(runner: ModelRunner, *entries: ScheduledRequest, before: LaunchedStep | None = None) -> LaunchedStep:
    return runner.launch(list(entries), before)


def test_launching_a_step_and_the_next_one(runner: ModelRunner) -> None:
    """A chunk, a plain step, and drafts; then a step whose tokens are not known yet."""
    chunk, plain, drafting = running("chunk", 20, 0), running("plain", 9, 8), running("drafting", 9, 8)
    step = launch(
        runner,
        ScheduledRequest(chunk, 12),
        ScheduledRequest(plain, 1),
        ScheduledRequest(drafting, 3, [7, 8], num_draft_slots=2),
    )
    assert step.tokens.token_ids.shape == (4,)
    plain.num_computed_tokens = 9
    plain.token_ids.append(-1)
    plain.num_pending_tokens = 1
    after = launch(runner, ScheduledRequest(plain, 1), before=step)
    assert after.tokens.token_ids.shape == (1,)
    with pytest.raises((NotImplementedError, RuntimeError, RelevoError)):
        after.wait()
