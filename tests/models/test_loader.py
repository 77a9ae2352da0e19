from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig, Phi3Config, PreTrainedConfig, Qwen2Config

from relevo.core.errors import StartupError
from relevo.kernels import load_backend
from relevo.model_files import ModelFiles, resolve_model
from relevo.models import checkpoint, loader
from relevo.models.causal_lm import CausalLM
from relevo.models.checkpoint import Memory
from relevo.models.loader import choose_dtype, load_model, max_positions
from tests.models.paged import PagedModel
from tests.support.tiny_models import REFUSED, TinyModels

CPU = torch.device("cpu")
TOKENS = list(range(3, 23))


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy of the tiny llama, to be spoilt."""
    shutil.copytree(tiny_models.path("llama"), tmp_path / "llama")
    return tmp_path / "llama"


def load(path: Path, **options: str | int) -> CausalLM:
    return load_model(resolve_model(str(path)), **{"dtype": "float32", **options})  # type: ignore[arg-type]


def error_line(path: Path, **options: str | int) -> str:
    with pytest.raises(StartupError) as caught:
        load(path, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("architecture", REFUSED)
def test_architectures_that_cannot_be_served_are_refused_by_name(tiny_models: TinyModels, architecture: str) -> None:
    class_name = {"mamba": "MambaForCausalLM", "bloom": "BloomForCausalLM"}[architecture]
    assert error_line(tiny_models.path(architecture)).startswith(f"architecture {class_name} is not supported: ")


def test_an_unknown_architecture_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, architectures=["HypeForCausalLM"], model_type="hype")
    assert error_line(folder).startswith("architecture HypeForCausalLM is not supported: ")


def test_weights_that_a_checkpoint_lacks_are_never_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights: model.layers.1.mlp.up_proj.weight" in error_line(folder)


def test_weights_of_another_shape_are_an_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "weights cannot be loaded" in error_line(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors or pytorch_model.bin" in error_line(folder)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1], ids=["empty", "no-header", "half-a-header", "a-byte-short"])
def test_a_file_that_was_cut_off_is_called_corrupt(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is corrupt" in error_line(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert error_line(folder).endswith("model-00002-of-00002.safetensors is missing")


def test_too_little_memory_is_told_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda: Memory(100_000))
    monkeypatch.setattr(loader, "_from_pretrained", None)
    line = error_line(folder)
    assert "its weights take 0.00 GiB in float32, 0.00 GiB of memory are available" in line


def test_available_memory_is_known_here() -> None:
    memory = checkpoint.available_memory()
    assert memory is None or memory.available > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(folder: Path) -> None:
    assert error_line(folder, device="cuda") == "device 'cuda' is not available: torch finds no CUDA device here"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16, not 'float8'"),
        ({"load_format": "gguf"}, "load_format must be one of auto, dummy, not 'gguf'"),
        ({"device": "mps"}, "device must be cpu or cuda, not 'mps'"),
    ],
)
def test_options_out_of_range_name_what_is_allowed(folder: Path, options: dict[str, str], expected: str) -> None:
    assert error_line(folder, **options) == expected


def test_bfloat16_loads_and_computes(tiny_models: TinyModels) -> None:
    model = load(tiny_models.path("qwen2"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    logits = PagedModel(model).step({"a": TOKENS})["a"]
    assert logits.dtype == torch.float32
    exact = PagedModel(load(tiny_models.path("qwen2"))).step({"a": TOKENS})["a"]
    assert torch.nn.functional.cosine_similarity(logits, exact).min() > 0.99


def test_auto_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    half, full = LlamaConfig(dtype="float16"), LlamaConfig(dtype="float32")
    assert choose_dtype("auto", half, torch.device("cuda")) == torch.float16
    assert choose_dtype("float16", full, CPU) == torch.float16
    monkeypatch.setattr(loader, "_cpu_multiplies_bfloat16", lambda: False)
    assert choose_dtype("auto", half, CPU) == torch.float32
    assert choose_dtype("auto", half, CPU, load_backend("reference", "cpu")) == torch.float32
    assert choose_dtype("auto", half, CPU, load_backend("cpu", "cpu")) == torch.bfloat16
    assert choose_dtype("auto", full, CPU, load_backend("cpu", "cpu")) == torch.float32
    experts = MixtralConfig(dtype="bfloat16")
    assert choose_dtype("auto", experts, CPU, load_backend("cpu", "cpu")) == torch.float32
    monkeypatch.setattr(loader, "_cpu_multiplies_bfloat16", lambda: True)
    assert choose_dtype("auto", half, CPU) == torch.bfloat16
    assert choose_dtype("auto", full, CPU) == torch.float32


def test_longrope_ends_where_its_frequencies_would_change() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 128,
    }
    shape: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = Phi3Config(
        **shape, max_position_embeddings=512, original_max_position_embeddings=128, rope_parameters=rope
    )
    assert max_positions(config, "m") == 128
    assert max_positions(LlamaConfig(max_position_embeddings=512), "m") == 512


def test_model_says_its_limits(tiny_models: TinyModels) -> None:
    model = load(tiny_models.path("gpt2"))
    assert (model.max_model_len, model.vocab_size, model.dtype) == (512, 384, torch.float32)
    assert [(s.kv_heads, s.k_dim, s.v_dim) for s in model.layout_layers] == [(4, 16, 16)] * 3


def test_fingerprint_follows_the_content_not_the_place(folder: Path, tiny_models: TinyModels) -> None:
    own = load(folder).fingerprint_parts
    assert own == load(tiny_models.path("llama")).fingerprint_parts
    hub = load_model(ModelFiles(folder, "org/llama", "0123abcd"), dtype="float32")
    assert hub.fingerprint_parts == ("org/llama", "0123abcd", "")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, folder / "model.safetensors")
    assert load(folder).fingerprint_parts != own


# -- dummy weights


@pytest.fixture
def dummy_folder(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    return folder


def test_dummy_needs_only_config_and_follows_its_seed(dummy_folder: Path) -> None:
    first, same, other = (load(dummy_folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    logits = [PagedModel(model).step({"a": TOKENS})["a"] for model in (first, same, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert first.fingerprint_parts == same.fingerprint_parts
    assert first.fingerprint_parts != other.fingerprint_parts


def test_dummy_weights_are_what_they_should_be(dummy_folder: Path) -> None:
    weights = dict(load(dummy_folder, load_format="dummy").module.named_parameters())
    assert weights["model.norm.weight"].eq(1).all()
    matrix = weights["model.layers.0.mlp.up_proj.weight"]
    assert abs(matrix.std().item() - 0.02) < 0.001
    assert not torch.equal(matrix, weights["model.layers.1.mlp.up_proj.weight"])
    assert len({tuple(row) for row in matrix.tolist()}) == len(matrix)


def test_dummy_weights_are_the_same_in_another_process(dummy_folder: Path) -> None:
    script = (
        "import hashlib, sys; from relevo.model_files import resolve_model\n"
        "from relevo.models.loader import load_model\n"
        "model = load_model(resolve_model(sys.argv[1]), dtype='float32', load_format='dummy', seed=3)\n"
        "weights = b''.join(p.numpy().tobytes() for p in model.module.parameters())\n"
        "print(hashlib.sha256(weights).hexdigest(), *model.fingerprint_parts)"
    )
    command = [sys.executable, "-c", script, str(dummy_folder)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    model = load(dummy_folder, load_format="dummy", seed=3)
    weights = b"".join(parameter.numpy().tobytes() for parameter in model.module.parameters())
    assert output.split() == [sha256(weights).hexdigest(), *model.fingerprint_parts[:2]]


def test_dummy_keeps_tied_weights_tied(tiny_models: TinyModels) -> None:
    module = load(tiny_models.path("qwen2"), load_format="dummy").module
    weights = dict(module.named_parameters(remove_duplicate=False))
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


def test_dummy_of_every_kind_of_model_computes(tiny_models: TinyModels) -> None:
    """Mixture of experts (weights that transformers renames when it loads), tables of positions, sinks."""
    for architecture in ("mixtral", "gpt_oss", "gpt_neo", "opt", "gemma3"):
        model = load(tiny_models.path(architecture), load_format="dummy")
        assert PagedModel(model).step({"a": TOKENS})["a"].isfinite().all()


def test_half_a_billion_dummy_weights_are_quick(tmp_path: Path) -> None:
    """Of CPU time: the machine may be busy with other things."""
    save_config(
        Qwen2Config(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        tmp_path,
    )
    start = time.process_time()
    model = load(tmp_path, dtype="bfloat16", load_format="dummy")
    seconds = time.process_time() - start
    assert sum(parameter.numel() for parameter in model.module.parameters()) == 494_032_768
    assert seconds < 10


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
