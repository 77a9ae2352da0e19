"""Out of memory, said so that one knows what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from relevo.core.errors import StartupError

LOADING_ADVICE = "take a smaller model or dtype, or end what else uses this memory"
STEP_ADVICE = "lower max_num_batched_tokens or max_num_seqs"
SERVING_ADVICE = f"{STEP_ADVICE}, or gpu_memory_utilization where others take memory of this GPU"
GRAPH_ADVICE = "lower max_num_seqs or gpu_memory_utilization, or set enforce_eager"
KV_ADVICE = "lower kv_cache_memory or gpu_memory_utilization"

# Beside torch.OutOfMemoryError: what CUDA, its libraries and Triton say of memory that torch does not hand out, and
# torch's allocator for CPUs.
_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


class OutOfMemory(StartupError):
    """A device's memory does not do for what was to be computed or kept there."""


@contextmanager
def explain_shortage(device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Out of memory inside becomes OutOfMemory: what it was for, how much was asked for and is there, what to lower.

    Also where somebody inside has made another error of it. Within another of these, the inner one explains.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        cause = _shortage(error)
        if cause is None:
            raise
        raise OutOfMemory(f"out of memory for {what} ({_asked(cause)}{_there(device)}): {advice}") from error


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _shortage(error: BaseException | None) -> RuntimeError | None:
    """Of an error and those it was raised from, the one that says that memory is short."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return error
        error = error.__cause__
    return None


def _asked(error: RuntimeError) -> str:
    """torch's first sentences: the rest says what is there, in torch's terms."""
    line = str(error).partition("\n")[0].partition(". GPU ")[0]
    return line.removeprefix("CUDA out of memory. ").rpartition("DefaultCPUAllocator: ")[2]


def _there(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # without a context even that needs memory
        return ""
    ours = torch.cuda.memory_reserved(device)
    return f"; of {gib(total)} on {device}, {gib(free)} are free and torch holds {gib(ours)} for this process"
