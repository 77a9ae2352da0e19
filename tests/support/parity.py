"""What every path through Relevo is compared with: greedy tokens of `transformers.generate`, in float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "gpt_oss",
    "gpt2",
    "opt",
    "gpt_neox",
    "gpt_neo",
)
BLOCK_SIZE = 16
NUM_TOKENS = 12


def prompts() -> list[list[int]]:
    """Shorter than a block, one block exactly, one more, several chunks, and two that share 40 tokens with it."""
    numbers = random.Random(7)
    draw = [[numbers.randrange(3, 300) for _ in range(length)] for length in (5, 16, 17, 90)]
    shared = draw[-1][:40]
    return [*draw, shared + draw[0], shared + draw[1]]


@cache
def transformers_greedy(path: Path, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """Greedy continuations of prompts(), one by one, EOS included where it ends one."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, num_beams=1
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def has_variety(answers: Sequence[Sequence[int]]) -> bool:
    """A model that says one token for ever would agree with anything."""
    return len({token for answer in answers for token in answer}) > 4
