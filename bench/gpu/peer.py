"""The same work by transformers itself: `generate` one request after another, and its continuous batching."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from bench.gpu.clock import Deadline, synchronize
from bench.gpu.engines import make_prompts
from bench.gpu.figures import LLAMA
from bench.gpu.model_times import workload
from bench.gpu.parts import Bench
from bench.gpu.shapes import load_shape

ONE_BY_ONE = 2  # requests that are measured; the rest would take as long each


def measure_generate(bench: Bench) -> None:
    model = _model(bench)
    count, num_input, num_output = workload(bench)
    prompts = make_prompts(ONE_BY_ONE + 1, num_input, model.config.vocab_size, seed=3)
    _generate(model, prompts[-1], 4, bench.device)
    started = time.perf_counter()
    for prompt in prompts[:ONE_BY_ONE]:
        bench.deadline.check()
        _generate(model, prompt, num_output, bench.device)
    rate = ONE_BY_ONE * num_output / (time.perf_counter() - started)
    _add(bench, "generate", rate, f"extrapolated from {ONE_BY_ONE} of {count} requests")


def measure_continuous(bench: Bench) -> None:
    """With whatever it chooses by itself: attention, memory, CUDA graphs. Its start is not counted,
    nor are two short requests before."""
    model = _model(bench)
    count, num_input, num_output = workload(bench)
    prompts = make_prompts(count, num_input, model.config.vocab_size, seed=3)
    hints = WorkloadHints(max_prompt_length=num_input, max_generated_length=num_output, num_requests=count)
    with model.continuous_batching_context_manager(
        generation_config=_generation(num_output),
        continuous_batching_config=_batching(bench),
        workload_hints=hints,
        timeout=5,
    ) as manager:
        _run(manager, prompts[:2], 4, bench.deadline)
        started = time.perf_counter()
        num_tokens = _run(manager, prompts, num_output, bench.deadline)
        seconds = time.perf_counter() - started
    _add(bench, "continuous", num_tokens / seconds, f"all {count} requests")


def _add(bench: Bench, key: str, rate: float, remark: str) -> None:
    ours = bench.measured.get("throughput")
    bench.add(key, rate, ours.value / rate if ours else None, remark)


def _model(bench: Bench) -> Any:
    """In the shape of the model that Relevo was measured with; random weights."""
    if "transformers" not in bench.kept:
        bench.drop()
        auto_config: Any = AutoConfig
        auto_model: Any = AutoModelForCausalLM
        config = auto_config.from_pretrained(load_shape(LLAMA, tiny=bench.tiny).folder)
        with torch.device(bench.device):
            model = auto_model.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        bench.kept["transformers"] = model
    return bench.kept["transformers"]


def _batching(bench: Bench) -> Any:
    make: Any = ContinuousBatchingConfig
    return make(num_blocks=16, max_batch_tokens=256, page_size=64) if bench.tiny else make()


def _generation(num_tokens: int) -> Any:
    """Greedy; no token has the id that would end a text."""
    make: Any = GenerationConfig
    return make(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


@torch.inference_mode()
def _generate(model: Any, prompt: list[int], num_tokens: int, device: torch.device) -> None:
    ids = torch.tensor([prompt], device=device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_generation(num_tokens))
    synchronize(device)
    if output.shape[1] != len(prompt) + num_tokens:
        raise RuntimeError(f"it gave {output.shape[1] - len(prompt)} tokens instead of {num_tokens}")


def _run(manager: Any, prompts: list[list[int]], num_tokens: int, deadline: Deadline) -> int:
    """Returns how many tokens came. Raises RuntimeError if it were others than asked for."""
    manager.add_requests(inputs=prompts, max_new_tokens=num_tokens)
    finished = total = 0
    while finished < len(prompts):
        deadline.check()
        result = manager.get_result(timeout=0.1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("its thread has ended before its requests")
        elif result.error is not None:
            raise RuntimeError(f"a request failed: {result.error}")
        elif result.is_finished():
            finished += 1
            total += len(result.generated_tokens)
    if total != len(prompts) * num_tokens:
        raise RuntimeError(f"it gave {total} tokens instead of {len(prompts) * num_tokens}")
    return total
