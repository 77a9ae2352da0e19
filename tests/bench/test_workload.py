"""Prompts and when they come."""

from __future__ import annotations

import json
import math
from itertools import islice, pairwise
from pathlib import Path

import pytest

from relevo.bench.workload import Ask, arrivals, file_asks, random_asks
from relevo.core.errors import InvalidRequest
from tests.support.statistics import uniform_pvalue


def test_random_prompts_have_their_length_and_come_again_with_their_seed() -> None:
    first, again, other = (random_asks(5, input_len=7, output_len=3, vocab_size=10, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 5
    for ask in first:
        assert isinstance(ask.prompt, list)
        assert len(ask.prompt) == 7
        assert ask.output_len == 3
        assert all(0 <= token < 10 for token in ask.prompt)


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps are exponential with the rate's mean. The seed is fixed: a false alarm has happened by now or never does."""
    times = list(islice(arrivals(4.0, seed=7), 2000))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    assert min(gaps) > 0
    assert abs(sum(gaps) / len(gaps) - 0.25) < 0.025
    assert uniform_pvalue([math.exp(-4.0 * gap) for gap in gaps]) > 1e-3
    assert list(islice(arrivals(4.0, seed=7), 3)) == times[:3]


def test_file_holds_text_or_token_ids_a_line(tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text('{"prompt": "hello", "output_len": 9}\n\n{"prompt": [1, 2, 3], "source": "x"}\n')
    assert file_asks(path, output_len=4) == [Ask("hello", 9), Ask([1, 2, 3], 4)]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"prompt": ""}', '{"prompt": [1, "a"]}', '{"prompt": "a", "output_len": 0}']
)
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + f"\n{line}\n")
    with pytest.raises(InvalidRequest, match=r"asks\.jsonl, line 2"):
        file_asks(path, output_len=4)


def test_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        file_asks(tmp_path / "none", output_len=4)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InvalidRequest, match="no prompt"):
        file_asks(tmp_path / "empty", output_len=4)
