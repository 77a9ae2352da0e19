"""`relevo bench latency` and `throughput` on a tiny engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relevo import demo
from relevo.bench.engine import bench_latency, bench_throughput
from relevo.cli import app
from relevo.core.errors import InvalidRequest
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from tests.support.tiny_models import TinyModels

SMALL = ["--dtype", "float32", "--kv-cache-memory", "16MiB", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path("llama")


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(EngineConfig(model=str(model), kv_cache_memory=16 << 20, max_num_seqs=4, max_num_batched_tokens=32))


def test_latency_counts_every_run_but_the_first(engine: Engine) -> None:
    result = bench_latency(engine, batch_size=3, input_len=20, output_len=5, num_runs=2)
    figures = result.figures
    assert 0 < figures["ttft_ms_p50"] <= figures["prefill_ms_p99"]
    assert 0 < figures["step_ms_p50"] <= figures["step_ms_p99"]
    # A request's last four tokens take four steps, some of which also compute another's prompt.
    assert figures["step_ms_mean"] * 0.5 < figures["tpot_ms_p90"]
    assert result.as_dict()["tpot_ms_mean"] == figures["tpot_ms_mean"]
    assert result.prefill_tokens_per_second > result.output_tokens_per_second > 0
    assert not engine.has_unfinished_requests
    assert engine.scheduler.pool.num_free_blocks == engine.info.num_blocks


def test_answers_of_one_token_have_no_tpot(engine: Engine) -> None:
    assert bench_latency(engine, batch_size=1, input_len=4, output_len=1, num_runs=1).figures["tpot_ms_p50"] == 0


def test_batch_beyond_the_engine_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="max_num_seqs 4"):
        bench_latency(engine, batch_size=5, input_len=4, output_len=2, num_runs=1)


def test_throughput_counts_the_tokens_that_came(engine: Engine) -> None:
    ended = []
    result = bench_throughput(engine, [([1, 2, 3], 4), ([4, 5], 6), ([7] * 30, 2)], lambda: ended.append(1))
    assert (result.num_requests, result.num_input_tokens, result.num_output_tokens) == (3, 35, 12)
    assert result.output_tokens_per_second == pytest.approx(12 / result.seconds)
    assert len(ended) == 3


def test_latency_command_takes_the_engines_options(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--batch-size", "1,2", "--input-len", "8", "--output-len", "3", "--num-runs", "1", "--json", str(path)]
    result = CliRunner().invoke(app, ["bench", "latency", str(model), *SMALL, *arguments])
    assert result.exit_code == 0, result.output
    assert [each["batch_size"] for each in json.loads(path.read_text())] == [1, 2]
    refused = CliRunner().invoke(app, ["bench", "latency", str(model), *SMALL, "--batch-size", "8"])
    assert isinstance(refused.exception, InvalidRequest)


def test_throughput_command_takes_a_file_of_text_and_ids(tmp_path: Path) -> None:
    dataset, path = tmp_path / "asks.jsonl", tmp_path / "figures.json"
    dataset.write_text('{"prompt": "import os", "output_len": 2}\n{"prompt": [5, 6, 7]}\n{"prompt": "left out"}\n')
    arguments = ["--dataset", str(dataset), "--num-requests", "2", "--output-len", "3", "--json", str(path)]
    result = CliRunner().invoke(app, ["bench", "throughput", str(demo.target_path()), *SMALL, *arguments])
    assert result.exit_code == 0, result.output
    figures = json.loads(path.read_text())
    assert (figures["num_requests"], figures["num_output_tokens"]) == (2, 5)
    assert figures["num_input_tokens"] > 3
