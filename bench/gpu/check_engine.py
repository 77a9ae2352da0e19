"""The engine's greedy tokens, whole and split over two engines, against transformers' own, in float32; and how steps
are launched on a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.gpu.engines import run
from bench.gpu.handover import hand_over
from bench.gpu.parts import Bench, Check, short_reason
from bench.gpu.tiny_models import ARCHITECTURES, save_tiny_model
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine

NUM_TOKENS = 12
NO_TOKEN = -1  # ends no text
TINY_ARCHITECTURES = ("llama", "mixtral")


def check_parity(bench: Bench) -> None:
    for architecture in TINY_ARCHITECTURES if bench.tiny else ARCHITECTURES:
        bench.deadline.check()
        name = f"greedy tokens equal transformers', {architecture}"
        try:
            path = save_tiny_model(architecture, bench.folder)
            answers = run(_engine(bench, path), _prompts(), NUM_TOKENS, bench.deadline).tokens
            bench.checks.append(_compared(name, answers, _transformers_tokens(path, bench.device)))
        except Exception as error:  # whatever it is, the other architectures are looked at
            bench.checks.append(Check(name, False, short_reason(error)))


def check_steps(bench: Bench) -> None:
    """On a GPU: decode is CUDA graphs, no step waits but for its tokens, and without either the tokens are the same."""
    if bench.device.type != "cuda":
        return
    path = save_tiny_model("llama", bench.folder)
    engine = _engine(bench, path)
    graphs = engine.runner.forward.graphs
    bench.checks.append(Check("decode steps are CUDA graphs", graphs is not None, "" if graphs else "see the log"))
    expected = run(engine, _prompts(), NUM_TOKENS, bench.deadline).tokens
    name = "no step waits but for its tokens"
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers = run(engine, _prompts(), NUM_TOKENS, bench.deadline).tokens
        bench.checks.append(_compared(name, answers, expected))
    except RuntimeError as error:
        bench.checks.append(Check(name, False, short_reason(error)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waiting = _engine(bench, path, enforce_eager=True, async_scheduling=False)
    answers = run(waiting, _prompts(), NUM_TOKENS, bench.deadline).tokens
    bench.checks.append(_compared("tokens are the same without graphs, waiting for each step", answers, expected))


def check_handover(bench: Bench) -> None:
    """Prompts that end within a block, with one, and behind one; by two engines as by one."""
    path = save_tiny_model("llama", bench.folder)
    source, target = _engine(bench, path), _engine(bench, path)
    prompts = [prompt for prompt in _prompts() if len(prompt) >= source.info.block_size]
    expected = run(_engine(bench, path), prompts, NUM_TOKENS, bench.deadline).tokens
    answers = [hand_over(source, target, prompt, NUM_TOKENS, bench.deadline).tokens for prompt in prompts]
    bench.checks.append(_compared("tokens after a hand-over equal one engine's", answers, expected))


def _engine(bench: Bench, path: Path, **options: Any) -> Engine:
    """Chunks of 32 tokens, so that a prompt takes several steps."""
    return Engine(
        EngineConfig(
            model=str(path),
            dtype="float32",
            kv_cache_memory=16 << 20,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            device="cuda" if bench.device.type == "cuda" else "cpu",
            threads=1 if bench.tiny else None,
            attention_backend=bench.backend,
            **options,
        )
    )


def _prompts() -> list[list[int]]:
    """Shorter than a block, one block exactly, one more, and several chunks."""
    numbers = random.Random(7)
    return [[numbers.randrange(3, 300) for _ in range(length)] for length in (5, 16, 17, 90)]


def _transformers_tokens(path: Path, device: torch.device) -> list[list[int]]:
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_pretrained(path, dtype=torch.float32).to(device)
    answers = []
    for prompt in _prompts():
        ids = torch.tensor([prompt], device=device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=NO_TOKEN
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def _compared(name: str, answers: list[list[int]], expected: list[list[int]]) -> Check:
    wrong = [i for i, (answer, right) in enumerate(zip(answers, expected, strict=True)) if answer != right]
    if wrong:
        return Check(name, False, f"{len(wrong)} of {len(expected)} texts differ, first {answers[wrong[0]]}")
    if len({token for answer in answers for token in answer}) <= 4:
        return Check(name, False, "the same few tokens over and over: nothing was shown")
    return Check(name, True, "")
