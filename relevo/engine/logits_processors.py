"""Custom logits processors: what packages register under the entry point group `relevo.logits_processors`.

An entry point names a factory. Called with a request's arguments, it makes a processor. That is called for each token
with the prompt's token ids, the output's so far, and the row's logits ([vocab] float32, its own to change), and returns
logits. It must be a function of these alone: a row is computed again after preemption, and on another worker.

    [project.entry-points."relevo.logits_processors"]
    no_digits = "my_package:NoDigits"
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import LogitsProcessorCall

GROUP = "relevo.logits_processors"

Processor = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]

logger = logging.getLogger(__name__)


def make_processor(call: LogitsProcessorCall) -> Processor:
    """Raises InvalidRequest if there is none of this name, or its factory does not take the arguments."""
    return _make(call)


def apply_processor(
    call: LogitsProcessorCall, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], logits: Tensor
) -> Tensor:
    """The processor's logits: [vocab] float32. Raises InvalidRequest if it fails, or returns anything else."""
    processor = make_processor(call)
    try:
        processed = processor(prompt_token_ids, output_token_ids, logits)
    except Exception as error:
        logger.warning("logits processor %r failed", call.name, exc_info=True)
        raise InvalidRequest(
            f"the logits processor {call.name!r} failed: {type(error).__name__}: {error}", "logits_processors"
        ) from error
    if not isinstance(processed, Tensor) or processed.shape != logits.shape or processed.dtype != torch.float32:
        raise InvalidRequest(
            f"the logits processor {call.name!r} returned no logits of the shape and type that it got",
            "logits_processors",
        )
    return processed


@lru_cache(maxsize=256)
def _make(call: LogitsProcessorCall) -> Processor:
    factory = _load(call.name)
    try:
        made: Processor = factory(*call.args, **call.kwargs)
    except Exception as error:
        raise InvalidRequest(
            f"the logits processor {call.name!r} does not take these arguments: {error}", "logits_processors"
        ) from error
    return made


@cache
def _load(name: str) -> Callable[..., Any]:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise InvalidRequest(f"there is no logits processor {name[:80]!r} here ({known})", "logits_processors")
    try:
        factory: Callable[..., Any] = found[name].load()
    except Exception as error:
        logger.exception("logits processor %r can't be loaded", name)
        raise InvalidRequest(f"the logits processor {name!r} can't be loaded: {error}", "logits_processors") from error
    return factory
