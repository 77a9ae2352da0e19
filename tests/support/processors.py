"""Logits processors as a package would have them, and the way in which one is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from relevo.engine import logits_processors

ENTRY_POINTS = """[relevo.logits_processors]
favour = tests.support.processors:Favour
fail_after = tests.support.processors:FailAfter
broken = tests.support.processors:no_such_thing
"""


class Favour:
    """Adds to the token that follows the last one by `step`, of prompt and output: a function of the row alone."""

    def __init__(self, step: int = 1, *, bonus: float = 5.0) -> None:
        self._step, self._bonus = step, bonus

    def __call__(self, prompt: Sequence[int], output: Sequence[int], logits: Tensor) -> Tensor:
        logits[([*prompt, *output][-1] + self._step) % len(logits)] += self._bonus
        return logits


class FailAfter:
    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __call__(self, prompt: Sequence[int], output: Sequence[int], logits: Tensor) -> Tensor:
        if len(output) >= self._num_tokens:
            raise ZeroDivisionError("as told")
        return logits


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip does it, for this test."""
    info = folder / "processors_of_tests-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: processors-of-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    logits_processors._load.cache_clear()
    logits_processors._make.cache_clear()
