"""Where a model's files are, and what its generation_config.json asks for. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relevo import demo
from relevo.core.errors import StartupError

DEMO = "demo"
DEMO_NAME = "relevo-demo"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder with config.json and whatever else of the model there is.

    name: as the user gave it, "relevo-demo" for the bundled model
    revision: the commit on the hub, "" for a local folder
    """

    path: Path
    name: str
    revision: str = ""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What applies where a request says nothing: generation_config.json's values, else OpenAI's defaults."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def resolve_model(model: str | None, *, weights: bool = True) -> ModelFiles:
    """Find a model's files: None or "demo" is the bundled model, else a local folder, else an id on the hub.

    weights=False fetches configuration and tokenizer only. What the cache holds is used when the hub is out of reach.
    Raises StartupError in one line if there is no such model, or no config.json in it.
    """
    if model is None or model == DEMO:
        return _folder(demo.target_path(), DEMO_NAME)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path.resolve(), model)
    if path.exists():
        raise StartupError(f"model {model!r} is a file: give the folder that holds config.json")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise StartupError(f"model {model!r}: no such folder")
    from relevo.model_hub import fetch_model  # takes half a second to import, and most starts do without

    return ModelFiles(*fetch_model(model, weights))


def read_config(files: ModelFiles) -> dict[str, Any]:
    """config.json as it is. Raises StartupError if it cannot be read."""
    return _read_json(files.path / "config.json")


def generation_defaults(files: ModelFiles) -> GenerationDefaults:
    """Defaults of generation_config.json, its null values left out; EOS falls back to config.json.

    `do_sample` does not count, as in vLLM. Raises StartupError for a file that is not what it should be.
    """
    path = files.path / "generation_config.json"
    given: dict[str, Any] = _read_json(path) if path.is_file() else {}
    found = {key: value for key, value in given.items() if value is not None}
    config = read_config(files)
    eos = found.get("eos_token_id", config.get("eos_token_id"))
    if eos is None and isinstance(config.get("text_config"), dict):
        eos = config["text_config"].get("eos_token_id")
    try:
        return GenerationDefaults(
            eos_token_ids=_token_ids(eos),
            temperature=float(found.get("temperature", 1.0)),
            top_p=float(found.get("top_p", 1.0)),
            top_k=int(found.get("top_k", 0)),
            min_p=float(found.get("min_p", 0.0)),
            repetition_penalty=float(found.get("repetition_penalty", 1.0)),
            max_tokens=int(found["max_new_tokens"]) if "max_new_tokens" in found else None,
        )
    except (TypeError, ValueError) as error:
        raise StartupError(f"{path}: a value has the wrong type: {error}") from error


def _folder(path: Path, name: str) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise StartupError(f"model {name!r}: no config.json in {path}")
    return ModelFiles(path, name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(value, Mapping):
        raise StartupError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return dict(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(int(token_id) for token_id in values)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
