"""What the machine allows: measured, and worked out for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from relevo.bench import ceiling as ceiling_module
from relevo.bench.ceiling import GemmSpeed, Machine, largest_cache_bytes, measure_machine
from relevo.bench.model_ceiling import Ceiling, ModelCost, model_cost, read_ceiling
from relevo.cli import app
from relevo.core.errors import InvalidRequest, StartupError
from relevo.model_files import resolve_model
from tests.support.tiny_models import TinyModels

SHAPE = Path(__file__).parent.parent.parent / "bench/shapes/qwen2.5-0.5b"


def make_machine(**gflops: float) -> Machine:
    """gflops: of float32 by rows, r1=…, r8=…; reads 10 GB/s."""
    speeds = tuple(
        GemmSpeed("float32", "best", int(rows[1:]), speed, 4 * speed / 2 / int(rows[1:]))
        for rows, speed in gflops.items()
    )
    return Machine(2, "AVX2", 1 << 28, 20.0, 10.0, speeds, speeds)


@pytest.fixture
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in a moment: the figures mean nothing then."""
    monkeypatch.setattr(ceiling_module, "PASS_SECONDS", 0.005)
    monkeypatch.setattr(ceiling_module, "MAX_PASS_SECONDS", 0.005)
    monkeypatch.setattr(ceiling_module, "LAYER", (64, 32))
    monkeypatch.setattr(ceiling_module, "WEIGHT_BYTES", 1 << 16)
    monkeypatch.setattr(ceiling_module, "largest_cache_bytes", lambda: 0)


@pytest.mark.usefixtures("small_weights")
def test_best_of_what_there_is_is_taken() -> None:
    machine = measure_machine(["float32", "int8"], rows=[1, 4])
    assert {(each.dtype, each.rows) for each in machine.gemms} == {(d, r) for d in ("float32", "int8") for r in (1, 4)}
    for best in machine.gemms:
        same = [each for each in machine.all if (each.dtype, each.rows) == (best.dtype, best.rows)]
        assert best.gflops_per_second == max(each.gflops_per_second for each in same) > 0
    measured = {(each.dtype, each.implementation) for each in machine.all}
    assert {("float32", "torch"), ("float32", "relevo cpu"), ("int8", "torch")} <= measured
    assert (("float32", "mkldnn packed") in measured) == torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    assert any(reason.startswith("int8, mkldnn packed") for reason in machine.missing), "said, not passed over"
    assert machine.read_gb_per_second > 0
    assert machine.copy_gb_per_second > 0


def test_caches_are_found() -> None:
    assert largest_cache_bytes() >= 1 << 20


def test_time_between_measured_numbers_of_rows() -> None:
    """4 and 8 GFLOP/s at 1 and 4 rows: 0.5 and 1 ns a weight; halfway, log-linear, is sqrt(0.5)."""
    machine = make_machine(r1=4.0, r4=8.0)
    assert machine.seconds_per_weight("float32", 1) == pytest.approx(0.5e-9)
    assert machine.seconds_per_weight("float32", 2) == pytest.approx(0.5**0.5 * 1e-9)
    assert machine.seconds_per_weight("float32", 4) == pytest.approx(1e-9)
    assert machine.seconds_per_weight("float32", 16) == pytest.approx(4e-9), "beyond, in proportion"
    with pytest.raises(KeyError, match="int8"):
        machine.seconds_per_weight("int8", 1)


def test_ceiling_of_a_model_by_hand() -> None:
    """10⁹ weights and 10⁸ in the head at 2 GFLOP/s, one row or two: 1 and 2 ns a weight."""
    ceiling = Ceiling(make_machine(r1=2.0, r2=2.0), ModelCost("m", 10**9, 10**8, 1000, 0), "float32")
    assert ceiling.ttft_ms(4) == pytest.approx(4000 + 100)
    assert ceiling.tpot_ms(1, 2500) == pytest.approx(1100 + 1)  # 2500 × 1000 elements of 4 bytes at 10 GB/s
    assert ceiling.tpot_ms(2, 2500) == pytest.approx(2200 + 2)
    # Two prompts of 4 tokens, then 10 steps for both at 9 tokens on average.
    seconds = 2 * 4.1 + 10 * (2.2 + 2 * 9 * 4000 / 10e9)
    assert ceiling.tokens_per_second(2, 4, 10) == pytest.approx(20 / seconds)


def test_attention_costs_half_a_square() -> None:
    plain, with_attention = (
        Ceiling(make_machine(r1=2.0, r2=2.0), ModelCost("m", 0, 0, 0, flops), "float32") for flops in (0, 1000)
    )
    # 1000 FLOP for each of 100²/2 pairs at 2 GFLOP/s.
    assert with_attention.ttft_ms(100) - plain.ttft_ms(100) == pytest.approx(1e3 * 1000 * 5000 / 2e9)


def test_cost_of_a_model_is_read_off_its_config() -> None:
    """Qwen2.5-0.5B as published: 494 M parameters, of which 136 M are the tied embeddings."""
    cost = model_cost(resolve_model(str(SHAPE)))
    layer = 896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864
    assert cost.num_weights == 24 * layer
    assert cost.num_head_weights == 151936 * 896
    assert cost.kv_elements == 24 * 2 * 2 * 64
    assert cost.attention_flops == 24 * 4 * 14 * 64


def test_mixture_of_experts_is_refused(tiny_models: TinyModels) -> None:
    with pytest.raises(InvalidRequest, match="mixture of experts"):
        model_cost(resolve_model(str(tiny_models.path("mixtral"))))


@pytest.mark.usefixtures("small_weights")
def test_command_writes_what_others_read(tmp_path: Path) -> None:
    path = tmp_path / "ceiling.json"
    result = CliRunner().invoke(app, ["bench", "ceiling", str(SHAPE), "--json", str(path)])
    assert result.exit_code == 0, result.output
    ceiling = read_ceiling(path)
    assert ceiling.dtype == "float32"
    assert ceiling.as_dict() == json.loads(path.read_text()) | {"machine": ceiling.machine.as_dict()}
    assert 0 < ceiling.tpot_ms(1, 288) <= ceiling.tpot_ms(8, 288) * 1.5
    path.write_text("{}")
    with pytest.raises(StartupError, match="relevo bench ceiling"):
        read_ceiling(path)
