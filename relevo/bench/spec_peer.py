"""transformers' assisted generation with the demo pair, for comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from relevo.demo import draft_path, target_path


def assisted_generation(prompt: Sequence[int], temperature: float, output_len: int, num_rounds: int) -> dict[str, Any]:
    """Tokens a second of one request, plain and assisted in turn; in float32, which CPUs are quick in."""
    auto: Any = AutoModelForCausalLM
    target, draft = (auto.from_pretrained(path, dtype=torch.float32) for path in (target_path(), draft_path()))
    ids = torch.tensor([list(prompt)])
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0} if temperature else {"do_sample": False}
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(num_rounds + 1):
        for assisted in (False, True):
            torch.manual_seed(0)
            started = time.perf_counter()
            output = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                assistant_model=draft if assisted else None,
                **sampling,
            )
            rates[assisted].append((output.shape[1] - ids.shape[1]) / (time.perf_counter() - started))
    plain, fast = rates[False][1:], rates[True][1:]
    return {
        "temperature": temperature,
        "plain_tokens_per_second": median(plain),
        "assisted_tokens_per_second": median(fast),
        "ratio": median(a / b for a, b in zip(fast, plain, strict=True)),
    }
