from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relevo import demo
from relevo.core.errors import StartupError
from relevo.model_files import GenerationDefaults, ModelFiles, generation_defaults, read_config, resolve_model


def write_model(folder: Path, config: object = None, generation: object = None) -> ModelFiles:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return resolve_model(str(folder))


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    files = write_model(tmp_path)
    assert files == ModelFiles(tmp_path, str(tmp_path), "")
    assert read_config(files) == {"model_type": "llama"}


@pytest.mark.parametrize("model", [None, "demo"])
def test_the_demo_is_what_one_gets_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    write_model(tmp_path)
    monkeypatch.setattr(demo, "target_path", lambda: tmp_path)
    assert resolve_model(model) == ModelFiles(tmp_path, "relevo-demo", "")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "model './nowhere': no such folder"),
        ("a/b/c", "model 'a/b/c': no such folder"),
        ("two words", "model 'two words' is neither a folder nor an id on the Hugging Face hub"),
    ],
)
def test_unknown_models_are_one_line(model: str, expected: str) -> None:
    with pytest.raises(StartupError) as caught:
        resolve_model(model)
    assert caught.value.message == expected


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json in "):
        resolve_model(str(tmp_path))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(StartupError, match=r"is a file: give the folder"):
        resolve_model(str(tmp_path / "model.gguf"))


def run_offline(code: str, home: Path) -> str:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_hub_id_out_of_reach_is_one_line_and_no_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from relevo.model_files import resolve_model; from relevo.core.errors import StartupError\n"
        "try: resolve_model('org/name')\n"
        "except StartupError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    line = "model 'org/name': no such folder, not in the cache, and the Hugging Face hub cannot be reached"
    assert run_offline(code, tmp_path) == f"{line}\nFalse\n"


def test_a_hub_id_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    code = (
        "from relevo.model_files import resolve_model; f = resolve_model('org/name'); print(f.path, f.name, f.revision)"
    )
    assert run_offline(code, tmp_path) == f"{snapshot} org/name {commit}\n"


def test_defaults_are_openais_where_nothing_is_said(tmp_path: Path) -> None:
    assert generation_defaults(write_model(tmp_path)) == GenerationDefaults()


def test_fields_count_where_they_are_present_and_not_null(tmp_path: Path) -> None:
    generation = {"do_sample": False, "temperature": 0.6, "top_p": None, "top_k": 20, "eos_token_id": [7, 8]}
    files = write_model(tmp_path, {"eos_token_id": 2}, {**generation, "max_new_tokens": 64, "repetition_penalty": 1.1})
    assert generation_defaults(files) == GenerationDefaults(
        eos_token_ids=(7, 8), temperature=0.6, top_k=20, repetition_penalty=1.1, max_tokens=64
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"eos_token_id": 2}, (2,)), ({"eos_token_id": [2, 3]}, (2, 3)), ({"text_config": {"eos_token_id": 5}}, (5,))],
)
def test_eos_falls_back_to_config(tmp_path: Path, config: dict[str, object], expected: tuple[int, ...]) -> None:
    assert generation_defaults(write_model(tmp_path, config, {"top_k": 1})).eos_token_ids == expected


@pytest.mark.parametrize("text", ["{", "[1]", '{"temperature": "hot"}'])
def test_a_broken_generation_config_names_itself(tmp_path: Path, text: str) -> None:
    files = write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(StartupError, match=r"generation_config\.json"):
        generation_defaults(files)
