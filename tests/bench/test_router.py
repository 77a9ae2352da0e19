"""relevo bench router: real processes, short."""

from __future__ import annotations

import os

import pytest

from relevo.bench.router import RouterBenchConfig, bench_router
from relevo.bench.router_command import router_table
from relevo.bench.router_processes import prompts
from relevo.model_files import resolve_model
from relevo.tokenizer import Tokenizer


def test_prompts_have_about_as_many_tokens_as_asked_for() -> None:
    tokenizer = Tokenizer.from_files(resolve_model(None, weights=False))
    assert tokenizer is not None
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in prompts(256, 8)]
    assert all(250 <= length <= 260 for length in lengths), lengths


async def test_it_measures_and_leaves_everything_as_it_was() -> None:
    cores = os.sched_getaffinity(0)
    result = await bench_router(
        RouterBenchConfig(num_workers=1, rates=(2000,), num_streams=4, num_clients=4, seconds=0.5)
    )
    assert os.sched_getaffinity(0) == cores
    assert result.requests_per_second > 1 and result.cpu_ms_per_request > 0.1
    assert 0 < result.added_ttft_p50_ms <= result.added_ttft_p99_ms
    [case] = result.streams
    assert 20 < case.tokens_per_second < 2600, "the workers were told 2,000"
    assert case.cpu_ms_per_1000_tokens > 1
    assert result.rss_mib > 30
    assert result.scaling is not None and sum(result.scaling.shares) == pytest.approx(1.0)
    assert 0.2 < result.scaling.capacity_ratio < 8
    assert router_table(result).row_count == 10
