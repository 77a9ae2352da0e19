"""Percentiles, promises, and what one request's times come to."""

from __future__ import annotations

import pytest

from relevo.bench.endpoint import Answer
from relevo.bench.serve import ServeBenchConfig, summarize
from relevo.bench.statistics import Slo, mean, percentile, summary


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 50, 7.0), ([1, 2, 3, 4], 50, 2), ([1, 2, 3, 4, 5], 50, 3), ([3, 1, 2], 99, 3), (range(1, 101), 99, 99)],
)
def test_percentile_is_nearest_rank(values: list[float], percent: int, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_of_nothing_figures_are_zero() -> None:
    assert summary("x", []) == {"x_mean": 0.0, "x_p50": 0.0, "x_p90": 0.0, "x_p99": 0.0}
    assert mean([]) == 0.0


def test_slo_is_met_up_to_and_with_its_bounds() -> None:
    slo = Slo(ttft_ms=100, tpot_ms=10)
    assert slo.is_met(100, 10)
    assert not slo.is_met(101, 5)
    assert not slo.is_met(50, 11)
    assert slo.is_met(50, None), "an answer of one token has no TPOT"
    assert Slo().is_met(1e9, 1e9)
    assert not Slo().is_set


def make_answer(*chunks: tuple[float, int], sent: float = 0.0, error: str | None = None) -> Answer:
    answer = Answer(sent, output_len=4, ended=chunks[-1][0] if chunks else sent, error=error)
    answer.chunks = list(chunks)
    answer.num_tokens = sum(tokens for _, tokens in chunks)
    return answer


def test_tokens_that_come_together_share_their_gap() -> None:
    answer = make_answer((1.0, 1), (1.5, 1), (2.5, 2))
    assert answer.ttft_ms == 1000
    assert answer.itl_ms == [500, 500, 500]
    assert answer.tpot_ms == 500  # 1.5 s for the three tokens after the first


def test_tpot_of_one_chunk_is_none() -> None:
    assert make_answer((1.0, 1)).tpot_ms is None
    assert make_answer((1.0, 3)).tpot_ms is None, "there is no time between them to speak of"


def test_goodput_counts_requests_that_kept_their_promise() -> None:
    answers = [
        make_answer((0.05, 1), (0.06, 1)),
        make_answer((0.2, 1), (0.21, 1)),  # first token too late
        make_answer((0.05, 1), (0.5, 1)),  # second token too late
        make_answer(error="broke"),
    ]
    config = ServeBenchConfig(url="", concurrency=2, slo=Slo(ttft_ms=100, tpot_ms=20))
    result = summarize(config, answers, seconds=2.0, cpu_seconds=0.5)
    assert result.goodput_requests_per_second == 0.5
    assert result.requests_per_second == 1.5
    assert result.output_tokens_per_second == 3.0
    assert result.failures == {"broke": 1}
    assert result.num_short == 3
    assert result.client_cpu_share == 0.25
    assert result.figures["ttft_ms_p50"] == 50
    assert result.as_dict()["e2e_ms_p99"] == 500
