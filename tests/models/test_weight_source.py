"""How much memory loading takes: measured in processes of their own, in MiB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from relevo.model_files import resolve_model
from relevo.models.loader import load_model
from relevo.models.weight_source import StoredTensor
from tests.support.tiny_models import TinyModels

SCRIPT = """
import json, sys
from relevo.allocator import use_one_heap
use_one_heap()  # as workers do
from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.loader import load_model

def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}

before = status()
model = load_model(resolve_model(sys.argv[1]), dtype=sys.argv[2])
weights = sum(p.numel() * p.element_size() for p in model.module.parameters()) / 2**20
print(json.dumps({"before": before, "after": status(), "weights": weights}))
"""
SLACK = 64  # MiB: what loading takes beside weights, whatever the model's size


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """92 MiB in bfloat16, in shards; its largest tensor has 16 MiB."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return save(config, tmp_path_factory.mktemp("weights") / "llama", max_shard_size="40MB")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """152 MiB in bfloat16, nearly all of it experts: one tensor each in the file, merged in the model."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    return save(config, tmp_path_factory.mktemp("weights") / "mixtral")


def save(config: PreTrainedConfig, folder: Path, **options: Any) -> Path:
    auto_model: Any = AutoModelForCausalLM
    auto_model.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, **options)
    return folder


def measure(folder: Path, dtype: str) -> tuple[float, dict[str, float], dict[str, float]]:
    """MiB of weights; growth of peak and parts of RSS by loading; all of it afterwards."""
    command = [sys.executable, "-c", SCRIPT, str(folder), dtype]
    output = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    result = json.loads(output)
    before, after = result["before"], result["after"]
    growth = {name: after[name] - before[name] for name in after}
    growth["VmHWM"] = after["VmHWM"] - before["VmRSS"]
    return result["weights"], growth, after


def test_weights_of_the_files_dtype_stay_in_the_file(llama: Path) -> None:
    """Mapped pages are shared by all processes of the host; memory of our own hardly grows."""
    weights, growth, _ = measure(llama, "bfloat16")
    assert weights > 80
    assert growth["RssAnon"] < SLACK
    assert growth["VmHWM"] < weights + SLACK


def test_converting_holds_one_tensor_of_the_file_at_a_time(llama: Path) -> None:
    weights, growth, _ = measure(llama, "float32")
    assert weights > 160
    assert growth["VmHWM"] < weights + SLACK  # the checkpoint has 92 MiB


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merging_experts_holds_one_layer_twice(mixtral: Path, dtype: str) -> None:
    weights, growth, _ = measure(mixtral, dtype)
    assert weights > 140
    assert growth["VmHWM"] < weights * 1.3 + SLACK


def test_a_stored_tensor_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "matrix": torch.randn(5, 7).bfloat16(),
        "scalar": torch.tensor(3.5),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, path)
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:header_bytes])
    for name, tensor in load_file(path).items():
        begin, end = (header_bytes + offset for offset in header[name]["data_offsets"])
        read = StoredTensor(path, tensor.dtype, tuple(tensor.shape), begin, end)[...]
        assert read.dtype == tensor.dtype and torch.equal(read, tensors[name])
    with pytest.raises(OSError, match="ends within a tensor"):
        StoredTensor(path, torch.uint8, (1 << 20,), header_bytes, header_bytes + (1 << 20))[...]


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2", "phi3", "gpt_oss", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_that_transformers_loads(tiny_models: TinyModels, architecture: str, dtype: str) -> None:
    path = tiny_models.path(architecture)
    ours = load_model(resolve_model(str(path)), dtype=dtype).module.state_dict()
    auto_model: Any = AutoModelForCausalLM
    theirs = auto_model.from_pretrained(path, dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
