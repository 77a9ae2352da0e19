"""An engine, driven step by step under a deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.gpu.clock import Deadline, synchronize
from bench.gpu.parts import Bench
from bench.gpu.shapes import Shape
from relevo.core.sampling_params import SamplingParams
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine

BLOCK_SIZE = 16
CHUNK_TOKENS = 4096  # computed in one step
MAX_REQUESTS = 256
SPARE_BYTES = 6 << 30  # for activations, on a GPU


@dataclass(frozen=True, slots=True)
class Step:
    """num_tokens: computed; num_sampled: requests that got a token"""

    seconds: float
    num_tokens: int
    num_sampled: int


@dataclass(frozen=True, slots=True)
class Run:
    """tokens: each request's output, in order"""

    seconds: float
    steps: list[Step]
    tokens: list[list[int]]


def make_engine(bench: Bench, shape: Shape, kv_tokens: int) -> Engine:
    """Dummy weights in bfloat16; KV for so many tokens, or for as many as the GPU has room for beside the weights."""
    kv_memory = (kv_tokens + BLOCK_SIZE) * shape.kv_bytes_per_token
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0] - shape.num_weights * 2 - SPARE_BYTES
        kv_memory = max(shape.kv_bytes_per_token * BLOCK_SIZE * 2, min(kv_memory, free))
    return Engine(
        EngineConfig(
            model=str(shape.folder),
            load_format="dummy",
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            kv_cache_memory=kv_memory,
            max_num_seqs=MAX_REQUESTS,
            max_num_batched_tokens=CHUNK_TOKENS,
            step_stretch=math.inf,
            device="cuda" if bench.device.type == "cuda" else "cpu",
            threads=1 if bench.tiny else None,
            attention_backend=bench.backend,
        )
    )


def make_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    numbers = np.random.Generator(np.random.PCG64(seed))
    prompts: list[list[int]] = numbers.integers(3, vocab_size, (count, length)).tolist()
    return prompts


def run(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, deadline: Deadline) -> Run:
    """All at once, greedy, so many tokens each. Raises OutOfTime; requests are left in the engine then."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=0, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    requests = [engine.make_request(f"request-{i}", prompt, sampling) for i, prompt in enumerate(prompts)]
    device = engine.kv_cache.storage.device
    synchronize(device)
    started = before = time.perf_counter()
    for request in requests:
        answers[request.request_id] = []
        engine.submit(request)
    steps = []
    while engine.has_unfinished_requests:
        deadline.check()
        result = engine.step()
        for tokens in result.tokens:
            answers[tokens.request_id] += tokens.token_ids
        for ended in result.ended:
            if ended.error is not None:
                raise ended.error
        now = time.perf_counter()
        steps.append(Step(now - before, result.num_scheduled_tokens, len(result.tokens)))
        before = now
    synchronize(device)
    return Run(time.perf_counter() - started, steps, list(answers.values()))
