"""relevo bench kv, with few and small blocks: every figure is there, and adds up."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from relevo.bench.cli import app
from relevo.bench.kv import SHARED_MEMORY, KvBenchConfig, bench_kv


def test_each_path_and_size_is_measured() -> None:
    config = KvBenchConfig(block_bytes=[65_536], num_blocks=[1, 4], seconds=0.02)
    result = bench_kv(config)
    assert [(case.path, case.num_blocks) for case in result.cases] == [
        (SHARED_MEMORY, 1),
        (SHARED_MEMORY, 4),
        ("tcp", 1),
        ("tcp", 4),
    ]
    for case in result.cases:
        num_bytes = case.num_blocks * case.block_bytes
        assert case.chunk_gb_per_second == pytest.approx(num_bytes / (case.chunk_ms / 1000) / 1e9)
        assert case.whole_gb_per_second is not None and case.whole_gb_per_second > 0
        assert case.whole_cpu_seconds_per_gb is not None and case.whole_cpu_seconds_per_gb > 0
    assert [case.num_blocks for case in result.memcpy] == [1, 4]
    assert result.links["tcp"].startswith("tcp, ") and "MB/s" in result.links["tcp"]


def test_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    arguments = ["kv", "--paths", SHARED_MEMORY, "--block-bytes", "64KiB", "--num-blocks", "2", "--seconds", "0.02"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "2 × 64KiB" in result.output
    (case,) = orjson.loads(path.read_bytes())["cases"]
    assert (case["path"], case["num_blocks"], case["block_bytes"]) == (SHARED_MEMORY, 2, 65_536)


def test_sizes_that_are_none_are_refused() -> None:
    result = CliRunner().invoke(app, ["kv", "--block-bytes", "many"])
    assert result.exit_code == 2
    assert "is no size" in result.output
