"""How much of a GPU's memory is left for the KV cache.

total × utilization = weights + CUDA's own + largest step + CUDA graphs + KV cache
                      └──────────── measured, by computing ───────────┘   └ the rest

An engine's share is one of the total, not of what happens to be free: the shares of engines on one GPU don't overlap,
whichever starts first. While one starts, no other one of ours does (start.py); so what has gone since is its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import torch

from relevo.engine.gpu.driver import free_bytes
from relevo.engine.shortage import STEP_ADVICE, OutOfMemory, explain_shortage, gib

logger = logging.getLogger(__name__)

CONTEXT_BYTES = 512 << 20  # an allowance, for where the driver's library does not tell what our context takes
SPARE_SHARE = 0.02  # of the total: left free where others hold so much that our share is not there


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU before an engine had anything on it. Bytes.

    free: what others, other engines of this process too, had left
    reserved: what torch held in this process
    """

    device: torch.device
    total: int
    free: int
    reserved: int

    def taken(self) -> int:
        """Since then, by this process: weights, what torch keeps for steps, the CUDA context, kernels' code."""
        torch.cuda.synchronize(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        # Others may have freed some: what torch knows of is taken all the same.
        return max(self.free - free, self.reserved_since())

    def reserved_since(self) -> int:
        return torch.cuda.memory_reserved(self.device) - self.reserved


def first_touch(device: torch.device, uuid: UUID | None) -> GpuMemory:
    """Makes this process's CUDA context, if there is none yet, and counts it as taken since."""
    had_context = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    torch.cuda.empty_cache()  # of an engine that this process has had before
    before = None if uuid is None else free_bytes(uuid)
    free, total = torch.cuda.mem_get_info(device)
    after = None if uuid is None else free_bytes(uuid)
    if before is not None and after is not None:
        context = max(0, before - after)
    else:
        context = 0 if had_context else CONTEXT_BYTES
    return GpuMemory(device, total, free + context, torch.cuda.memory_reserved(device))


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What an engine takes beside its KV cache. Bytes.

    free: with nothing of it taken but weights and what is outside
    weights, step: by torch, in whole segments; what the first step sets up for good counts as weights
    outside: the CUDA context, kernels' code
    graphs: with the buffers that they compute from; they are captured when the KV cache is there
    """

    total: int
    free: int
    weights: int
    step: int
    outside: int
    graphs: int

    def kv_bytes(self, utilization: float) -> int:
        """What the KV cache may take; 0 or less: there is no room."""
        return min(self.share_left(utilization), self.free_left - int(self.total * SPARE_SHARE))

    def share_left(self, utilization: float) -> int:
        return int(self.total * utilization) - self.weights - self.step - self.outside - self.graphs

    @property
    def free_left(self) -> int:
        return self.free - self.step - self.graphs

    def __str__(self) -> str:
        return (
            f"weights {gib(self.weights)}, largest step {gib(self.step)}, CUDA {gib(self.outside)}, "
            f"graphs {gib(self.graphs)}"
        )


def profile_memory(
    memory: GpuMemory, largest_step: Callable[[], object], rehearse: Callable[[], int] | None = None
) -> MemoryProfile:
    """Compute the largest step that there can be, and look. Weights are loaded.

    rehearse: compute what CUDA graphs are to be captured of, the largest of each kind, with their buffers; returns what
        they take beside that
    """
    device = memory.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what loading has left
    weights = memory.reserved_since()
    largest_step()
    torch.cuda.synchronize(device)
    step = memory.reserved_since() - weights
    graphs = 0
    if rehearse is not None:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        graphs = rehearse()
        torch.cuda.synchronize(device)
        # They compute in a pool of their own, which all of them share: the largest one's.
        graphs += torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    lasting = memory.reserved_since() - weights  # kernels' workspaces
    weights, step = weights + lasting, step - lasting
    outside = memory.taken() - memory.reserved_since()
    free, _ = torch.cuda.mem_get_info(device)
    profile = MemoryProfile(memory.total, free, weights, step, outside, graphs)
    logger.info("memory of %s: %s of %s", device, profile, gib(memory.total))
    return profile


def keep_for_steps(memory: GpuMemory, profile: MemoryProfile) -> None:
    """When all else is there: let torch take what the largest step needs, and keep it. So nobody else can, and no step
    has to ask for it. (Capturing graphs gives back what torch had kept before.)
    """
    torch.cuda.empty_cache()  # what smaller steps have left would come on top
    with explain_shortage(memory.device, "the largest step", STEP_ADVICE):
        _allocate_once(memory.device, profile.step)
    logger.info("memory of %s: %s taken in all", memory.device, gib(memory.taken()))


def _allocate_once(device: torch.device, num_bytes: int) -> None:
    torch.empty(num_bytes, dtype=torch.uint8, device=device)


def no_room(profile: MemoryProfile, utilization: float, wanted: int) -> OutOfMemory:
    """For a KV cache of at least so many bytes."""
    return OutOfMemory(
        f"no room for the KV cache: of {gib(profile.total)}, gpu_memory_utilization {utilization:g} allows "
        f"{gib(profile.total * utilization)}, and {gib(profile.free)} are free; {profile} leave "
        f"{gib(max(0, profile.kv_bytes(utilization)))}, and at least {gib(wanted)} are needed. Raise "
        "gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs, or end what else uses this GPU"
    )
