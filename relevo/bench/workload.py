"""What is asked of an endpoint or an engine, and when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from relevo.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Ask:
    """prompt: text or token ids; output_len: tokens of the answer, which does not end before."""

    prompt: str | list[int]
    output_len: int


def random_prompts(count: int, *, input_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids below vocab_size: no prefix cache knows them. A seed gives the same again."""
    numbers = random.Random(seed)
    return [[numbers.randrange(vocab_size) for _ in range(input_len)] for _ in range(count)]


def random_asks(count: int, *, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[Ask]:
    prompts = random_prompts(count, input_len=input_len, vocab_size=vocab_size, seed=seed)
    return [Ask(prompt, output_len) for prompt in prompts]


def file_asks(path: Path, *, output_len: int) -> list[Ask]:
    """One a line, as JSON: {"prompt": text or token ids, "output_len": tokens}; without output_len, the one given.

    Raises InvalidRequest, with the line's number, for what is not that.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", "dataset") from error
    asks = [_ask(path, number, line, output_len) for number, line in enumerate(lines, start=1) if line.strip()]
    if not asks:
        raise InvalidRequest(f"{path} holds no prompt", "dataset")
    return asks


def arrivals(requests_per_second: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which requests of a Poisson process come: the gaps are exponential. Endless."""
    numbers = random.Random(seed)
    seconds = 0.0
    while True:
        seconds += numbers.expovariate(requests_per_second)
        yield seconds


def _ask(path: Path, number: int, line: bytes, default_output_len: int) -> Ask:
    wanted = 'want {"prompt": text or token ids, "output_len": tokens}'
    try:
        fields: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{path}, line {number}: no JSON ({error}); {wanted}", "dataset") from error
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    if not prompt or not (isinstance(prompt, str) or _are_token_ids(prompt)):
        raise InvalidRequest(f"{path}, line {number}: {wanted}", "dataset")
    output_len = fields.get("output_len", default_output_len)
    if not isinstance(output_len, int) or output_len < 1:
        raise InvalidRequest(f"{path}, line {number}: output_len is {output_len!r}; {wanted}", "dataset")
    return Ask(prompt, output_len)


def _are_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(token, int) and token >= 0 for token in prompt)
