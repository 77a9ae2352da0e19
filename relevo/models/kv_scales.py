"""The scales that a checkpoint has for a KV cache in 8 bits, named as compressed-tensors names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from relevo.models.checkpoint import safetensors_header

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|attn)\.([kv])_scale$")


def stored_kv_scales(
    paths: Sequence[Path], num_layers: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Each layer's (k_scale, v_scale), [1] float32; None where no layer has any. One that is missing is 1."""
    found: dict[tuple[int, str], Tensor] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            continue
        header, _ = safetensors_header(path)
        names = {name: match for name in header if (match := _NAME.search(name))}
        if names:
            file: Any = safe_open(path, framework="pt")
            for name, match in names.items():
                found[int(match[1]), match[2]] = file.get_tensor(name).float().reshape(-1)[:1].to(device)
    if not found:
        return None
    one = torch.ones(1, device=device)
    return tuple((found.get((layer, "k"), one), found.get((layer, "v"), one)) for layer in range(num_layers))
