"""One list of options for every command that starts an engine."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from relevo.engine.config import EngineConfig
from relevo.engine_options import EngineOptions, engine_options, takes_engine_options, worker_flags
from services.worker.config import WorkerSettings


def test_defaults_are_the_engines_own() -> None:
    """What EngineConfig has beside them is told by other means: the model, and what services share."""
    own = {field.name: field.default for field in fields(EngineConfig)}
    options = engine_options()
    assert options == {name: own[name] for name in options}
    assert own.keys() - options.keys() <= {"model", "turn_file", "gpu_lock_dir"}


def run(*arguments: str) -> tuple[int, EngineOptions, str]:
    seen: EngineOptions = {}
    app = typer.Typer()

    def command(model: str, *, engine: EngineOptions, block_size: int = 3) -> None:
        seen.update(engine, own=(model, block_size))

    app.command()(takes_engine_options(command))
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, seen, result.output


def test_command_receives_them_beside_its_own() -> None:
    code, seen, output = run(
        "m", "--dtype", "bfloat16", "--kv-cache-memory", "2MiB", "--gpu-memory-utilization", "0.7", "--no-passes",
        "--block-size", "5",
    )  # fmt: skip
    assert code == 0, output
    assert seen.pop("own") == ("m", 5)
    assert "block_size" not in seen, "the command's own option stands"
    assert seen == {
        **{name: value for name, value in engine_options().items() if name != "block_size"},
        "dtype": "bfloat16",
        "kv_cache_memory": 2 << 20,
        "gpu_memory_utilization": 0.7,
        "passes": False,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "int3"],
        ["--kv-cache-memory", "much"],
        ["--threads", "0"],
        ["--gpu-memory-utilization", "0"],
        ["--gpu-memory-utilization", "1.1"],
    ],
)
def test_bad_value_is_refused_by_name(arguments: list[str]) -> None:
    code, seen, output = run("m", *arguments)
    assert (code, seen) == (2, {})
    assert arguments[0] in output


def test_flags_of_workers() -> None:
    assert worker_flags({"max_model_len": None, "passes": True, "block_size": 16, "dtype": "auto"}) == {
        "max-model-len": "",
        "passes": True,
        "block-size": "16",
        "dtype": "auto",
    }


def test_workers_know_the_options_and_have_the_same_defaults() -> None:
    assert WorkerSettings(_cli_parse_args=[]).engine_config() == EngineConfig()
    given = {name: value for name, value in worker_flags(engine_options()).items() if value and value is not True}
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert WorkerSettings(_cli_parse_args=flags).engine_config() == EngineConfig()


def test_worker_is_told_of_memory() -> None:
    flags = ["--kv-cache-memory", "3GiB", "--gpu-memory-utilization", "0.25", "--gpu-lock-dir", "/arena"]
    config = WorkerSettings(_cli_parse_args=flags).engine_config()
    assert (config.kv_cache_memory, config.gpu_memory_utilization, config.gpu_lock_dir) == (3 << 30, 0.25, "/arena")


def test_empty_variable_leaves_memory_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose.yaml gives it."""
    monkeypatch.setenv("RELEVO_KV_CACHE_MEMORY", "")
    monkeypatch.setenv("RELEVO_GPU_MEMORY_UTILIZATION", "0.45")
    config = WorkerSettings(_cli_parse_args=[]).engine_config()
    assert (config.kv_cache_memory, config.gpu_memory_utilization) == (None, 0.45)
