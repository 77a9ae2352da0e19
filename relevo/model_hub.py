"""Models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from relevo.core.errors import StartupError

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# Folders of a repository hold other formats' copies, and so does Mistral's consolidated.safetensors.
_NEVER = ("*/*", "consolidated*")


def fetch_model(model: str, weights: bool) -> tuple[Path, str, str]:
    """(folder, id, commit) of a model on the hub, from the cache where it is there. Raises StartupError in one line.

    weights: False fetches configuration and tokenizer only
    """
    path = _download(model, (*_SMALL_FILES, "*.safetensors") if weights else _SMALL_FILES)
    if weights and not any(path.glob("*.safetensors")):
        path = _download(model, (*_SMALL_FILES, "pytorch_model*.bin"))
    if not (path / "config.json").is_file():
        raise StartupError(f"model {model!r}: its repository on the hub has no config.json")
    return path, model, path.name


def _download(model: str, patterns: tuple[str, ...]) -> Path:
    """The snapshot's folder, which is named after the commit."""
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=list(_NEVER)))
    except HFValidationError as error:
        raise StartupError(f"model {model!r} is neither a folder nor an id on the Hugging Face hub") from error
    except GatedRepoError as error:
        raise StartupError(f"model {model!r} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise StartupError(
            f"model {model!r}: no such folder, and no such model on the hub (or HF_TOKEN lacks access)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError) as error:
        raise StartupError(
            f"model {model!r}: no such folder, not in the cache, and the Hugging Face hub cannot be reached"
        ) from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise StartupError(f"model {model!r}: cannot be downloaded: {reason}") from error
