"""The bundled demo model: a target and a draft of one tokenizer, small enough to live in the package."""

from pathlib import Path


def target_path() -> Path:
    """Folder of the target model, as `transformers` saves one."""
    return Path(__file__).parent / "target"


def draft_path() -> Path:
    """Folder of the draft model, distilled from the target for speculative decoding."""
    return Path(__file__).parent / "draft"
