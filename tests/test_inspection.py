"""`relevo inspect`: what it says is true, and it says it in one line if it can't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from relevo import inspection
from relevo.cli import app
from relevo.core.errors import StartupError
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from tests.support.no_torch import HIDE_TORCH
from tests.support.tiny_models import TinyModels

SHAPE = Path(__file__).parent.parent / "bench" / "shapes" / "qwen2.5-0.5b"


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_agrees_with_the_engine(tiny_models: TinyModels) -> None:
    path = str(tiny_models.path("gemma2"))
    found = json.loads(inspect(path, "--json", "--block-size", "8", "--kv-cache-memory", "1MiB"))
    info = Engine(EngineConfig(model=path, block_size=8, kv_cache_memory=1 << 20)).info
    assert found["num_blocks"] == info.num_blocks
    assert found["kv_bytes_per_block"] == info.block_bytes
    assert found["max_model_len"] == info.max_model_len
    assert found["num_tokens"] == 8 * info.num_blocks
    # 4 layers, keys and values of 2 heads of 16 float32
    assert found["kv_bytes_per_token"] == 4 * 2 * 2 * 16 * 4
    assert [(kind["num_layers"], kind["sliding_window"]) for kind in found["layers"]] == [(2, 16), (2, None)]
    assert found["dtype"] == "float32"
    assert found["kernel_backend"] == "cpu"


def test_kv_memory_by_default(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gibibyte on a CPU; of a GPU, for which a stand-in answers, what its share leaves after the weights."""
    path = str(tiny_models.path("qwen3"))
    found = json.loads(inspect(path, "--json"))
    assert (found["kv_cache_memory"], found["is_kv_estimated"]) == (1 << 30, False)
    text = inspect(path)
    assert "KV blocks" in text
    assert "at most" not in text

    gpu = SimpleNamespace(total_memory=10 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(inspection, "choose_device", lambda device: torch.device("cuda"))
    module: Any = inspection
    load, backend = module.load_configured, module.load_backend
    monkeypatch.setattr(inspection, "load_configured", lambda *args: load(*args[:-1], torch.device("cpu")))
    monkeypatch.setattr(inspection, "load_backend", lambda name, device: backend(name, "cpu"))
    found = json.loads(inspect(path, "--json", "--gpu-memory-utilization", "0.5"))
    assert found["kv_cache_memory"] == (5 << 20) - found["weight_bytes"]["float32"] > 0
    assert found["num_blocks"] == found["kv_cache_memory"] // found["kv_bytes_per_block"]
    assert found["is_kv_estimated"]
    assert f"at most {found['num_blocks']:,} in" in inspect(path, "--gpu-memory-utilization", "0.5")


def test_parameters_are_counted_once_and_before_passes(tiny_models: TinyModels) -> None:
    path = str(tiny_models.path("qwen3"))  # tied
    counts = [json.loads(inspect(path, "--json", *option))["num_parameters"] for option in ([], ["--no-passes"])]
    layer = 64 * (4 + 2 + 2) * 32 + 4 * 32 * 64 + 3 * 64 * 96 + 2 * 64 + 2 * 32
    assert counts == [352 * 64 + 3 * layer + 64] * 2


def test_passes_are_listed_with_their_modules(tiny_models: TinyModels) -> None:
    found = json.loads(inspect(str(tiny_models.path("mixtral")), "--json"))
    passes: dict[str, Any] = {each["name"]: each for each in found["passes"]}
    assert passes["attention"]["modules"] == ["model.layers.0–1.self_attn"]
    assert passes["attention"]["num_applied"] == 2
    (left,) = passes["gated_mlp"]["left_alone"]
    assert left["modules"] == ["model.layers.0–1.mlp"]
    assert "gate, up and down" in left["why"]


def test_table_names_what_matters(tiny_models: TinyModels) -> None:
    text = inspect(str(tiny_models.path("mixtral")), "--attention-backend", "reference")
    for words in (
        "MixtralForCausalLM",
        "in float32",
        "2 layers",
        "512 tokens",
        "reference on cpu",
        "model.layers.0–1.mlp",
    ):
        assert words in text
    assert "passes are off" in inspect(str(tiny_models.path("llama")), "--no-passes").lower()


def test_unknown_model_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no such folder"):
        inspect(str(tmp_path / "nothing"))


def test_without_torch_it_says_what_to_install() -> None:
    code = f"{HIDE_TORCH}\nimport sys\nsys.argv = ['relevo', 'inspect']\nfrom relevo.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "relevo: error: relevo inspect needs torch: pip install 'relevo[engine]'"


def test_shape_without_weights() -> None:
    """Half a gigabyte of dummy weights in bfloat16; every linear layer is taken over."""
    found = json.loads(inspect(str(SHAPE), "--load-format", "dummy", "--dtype", "bfloat16", "--json"))
    assert found["num_parameters"] == 494_032_768
    assert found["weight_bytes"] == {"bfloat16": 2 * 494_032_768}
    assert found["kv_bytes_per_token"] == 24 * 2 * 2 * 64 * 2
    assert all(not each["left_alone"] for each in found["passes"])
