"""`python -m bench.gpu` on a machine without a GPU: everything runs, tiny, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.__main__ import finish
from bench.gpu.clock import Deadline, OutOfTime
from bench.gpu.figures import BYTES, Figure, is_met
from bench.gpu.parts import Bench, Check, Part, run_part
from bench.gpu.plan import make_plan
from bench.gpu.report import make_report, print_report
from bench.gpu.shapes import load_shape
from tests.support.no_torch import hide

SERVICES = ("fastapi", "starlette", "uvicorn", "uvloop", "redis", "opentelemetry", "grpc", "prometheus_client")
OTHERS = ("pydantic", "pydantic_settings", "orjson", "xxhash", "llguidance", "gigatoken", "matplotlib")

ROOT = Path(__file__).parent.parent.parent
RUN = "import runpy; runpy.run_module('bench.gpu', run_name='__main__')"
FIGURE = Figure("x", "an x", "ms", BYTES, "lower", 1.5, 1.2)


def run_bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Where neither a service's libraries nor matplotlib are installed."""
    command = [sys.executable, "-c", hide(*SERVICES, *OTHERS) + RUN, "--output", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_all_of_it_runs_without_a_gpu_and_without_what_services_need(tmp_path: Path) -> None:
    run = run_bench(tmp_path, "--device", "cpu", "--tiny")
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert {check["ok"] for check in report["checks"]} == {True}
    names = [check["name"] for check in report["checks"]]
    for start in (
        "cpu: attention",
        "triton, interpreted: attention",
        "triton, interpreted: checksums",
        "greedy tokens",
        "tokens after a hand-over",
    ):
        assert any(name.startswith(start) for name in names), start
    assert [figure["key"] for figure in report["figures"]] == [f.key for part in make_plan() for f in part.figures]
    for figure in report["figures"]:
        assert figure["value"] > 0, figure
        assert (figure["ratio"] is None) == (not figure["bound"]), figure
        assert figure["met"] is None  # targets are for real shapes
    assert "not measured" not in run.stdout and "no plots: matplotlib is not installed" in run.stdout
    assert run.stdout.rstrip().splitlines()[-1].endswith("all 16 requests")


def test_without_time_every_figure_says_why_it_is_missing(tmp_path: Path) -> None:
    run = run_bench(tmp_path, "--device", "cpu", "--tiny", "--seconds", "0")
    assert run.returncode == 0
    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert {figure["not_measured"] for figure in report["figures"]} == {"no time left"}
    assert {check["ok"] for check in report["checks"]} == {None}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), "auto", False, tmp_path)


def fail(bench: Bench) -> None:
    raise ValueError("no such thing\nand more")


def lack_memory(bench: Bench) -> None:
    raise torch.OutOfMemoryError


def sleep(bench: Bench) -> None:
    time.sleep(10)


@pytest.mark.parametrize(
    ("run", "reason"),
    [(fail, "ValueError: no such thing"), (lack_memory, "out of memory"), (sleep, "out of time (0 s)")],
)
def test_a_part_that_cannot_go_on_leaves_a_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, run: Any, reason: str
) -> None:
    monkeypatch.setattr("bench.gpu.parts.GRACE_SECONDS", 0.05)
    bench.kept["an engine"] = object()
    run_part(Part("x", 0.01, run, (FIGURE,)), bench, Deadline(5))
    assert bench.missing == {"x": reason} and not bench.kept


def test_what_fails_while_checking_is_a_failed_check(bench: Bench) -> None:
    run_part(Part("checks", 1, fail, is_check=True), bench, Deadline(5))
    assert bench.checks == [Check("checks", False, "ValueError: no such thing")]


@pytest.mark.parametrize(("ok", "status"), [(False, 1), (None, 0), (True, 0)])
def test_a_failed_check_is_the_status(bench: Bench, tmp_path: Path, ok: bool | None, status: int) -> None:
    bench.checks = [Check("a kernel", ok, "")]
    assert finish(bench, [], {"device": "a GPU", "date": "today", "backend": "auto"}, tmp_path, 1.0) == status


def test_a_loop_that_looks_at_its_deadline_ends() -> None:
    with pytest.raises(OutOfTime):
        Deadline(-1).check()


def test_targets_are_judged_and_reasons_are_printed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan()
    bench.add("llama-3.1-8b/tpot_1", 4.0, 1.05)
    bench.add("llama-3.1-8b/tpot_64", 9.0, 1.5)
    bench.missing["continuous"] = "out of memory"
    bench.checks = [Check("a kernel", False, "differs")]
    about = {"device": "a GPU", "date": "today", "backend": "auto"}
    print_report(make_report(bench, plan, about, 1.0))
    lines = capsys.readouterr().out.splitlines()
    assert "  FAILED: a kernel: differs" in lines
    row = next(line.split("  ") for line in lines if line.startswith("llama-3.1-8b: TPOT, batch 1, 1k"))
    assert [cell.strip() for cell in row if cell] == [
        "llama-3.1-8b: TPOT, batch 1, 1k", "4 ms", f"1.05 {BYTES}", "≤ 1.25 ×", "met, moonshot too",
    ]  # fmt: skip
    assert any(line.startswith("llama-3.1-8b: TPOT, batch 64") and line.endswith("not met") for line in lines)
    assert any("not measured: out of memory" in line and "≥ 3 ×" in line for line in lines)
    assert is_met(FIGURE, 1.5, None) is None


def test_bounds_are_those_of_the_real_models() -> None:
    """Llama-3.1-8B has 8.03 billion parameters, 525 million of them in its table of embeddings."""
    llama, moe = load_shape("llama-3.1-8b", tiny=False), load_shape("moe-8x0.5b", tiny=False)
    assert llama.num_weights == pytest.approx(8.03e9, rel=1e-3)
    assert llama.kv_bytes_per_token == 128 << 10
    assert llama.decode_bytes(1, 0) == pytest.approx(2 * (8.03e9 - 0.525e9), rel=1e-3)
    assert llama.decode_bytes(64, 1024) - llama.decode_bytes(1, 0) == 64 * 1024 * (128 << 10)
    # of experts a token reads two of eight, and many tokens all
    expert = 3 * 2048 * 4096
    others = moe.decode_bytes(1, 0) - 2 * 20 * 2 * expert
    assert moe.decode_bytes(10**6, 0) == pytest.approx(others + 2 * 20 * 8 * expert)
