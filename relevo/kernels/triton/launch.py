"""What the launches of several kernels share."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take; the rest goes to `reference`
FP8 = torch.float8_e4m3fn  # what caches may be besides


def num_warps(elements: int) -> int:
    """For a program of so many elements: about 16 a thread."""
    return max(1, min(16, elements // 512))
