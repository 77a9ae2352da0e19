from __future__ import annotations

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from relevo.bench.cli import app
from relevo.bench.quantization import measure_loss, next_token_logprobs, text_windows
from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.loader import load_model
from relevo.models.quantization import dequantize_rows, quantize_rows


def test_a_row_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(5000, 33) * torch.logspace(-3, 2, 5000)[:, None]
    weight[7] = 0.0
    rows, scales = quantize_rows(weight)
    assert rows.dtype == torch.int8
    assert rows.abs().max() == 127
    assert ((dequantize_rows(rows, scales, torch.float32) - weight).abs() <= scales[:, None] * 0.5001).all()


def test_a_model_does_not_differ_from_itself_and_does_from_its_int8() -> None:
    files, kernels = resolve_model(None), load_backend("cpu", "cpu")
    plain, int8 = (load_model(files, dtype="float32", kernels=kernels, quantization=each) for each in ("none", "int8"))
    windows = [list(range(5, 69)), list(range(100, 164))]
    same, other = (measure_loss(plain, model, kernels, windows) for model in (plain, int8))
    assert (same.kl_max, same.agreement, same.num_positions) == (0.0, 1.0, 126)
    assert 0.0 < other.kl_mean < 0.01
    assert other.kl_mean <= other.kl_p99 <= other.kl_max
    assert abs(other.quantized_loss - other.plain_loss) < 0.05


def test_logprobs_are_those_of_transformers() -> None:
    files, kernels = resolve_model(None), load_backend("cpu", "cpu")
    model = load_model(files, dtype="float32", kernels=kernels)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    ids = list(range(10, 50))
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    assert (next_token_logprobs(model, kernels, ids) - expected).abs().max() < 1e-3


def test_windows_are_spread_over_the_text() -> None:
    assert list(text_windows(range(100), length=10, count=3)) == [
        list(range(begin, begin + 10)) for begin in (0, 33, 66)
    ]
    assert list(text_windows(range(9), length=10, count=3)) == []


def test_command_writes_its_figures(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["quantization", "--count", "2", "--length", "32", "--json", str(tmp_path / "loss.json")]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "loss.json").read_bytes())
    assert figures["num_positions"] == 62
    assert 0.0 < figures["kl_mean"] < 0.05
    assert "KL divergence" in result.output
