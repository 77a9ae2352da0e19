"""A checkpoint's weights as transformers takes them in: one tensor at a time, so that no second copy of all exists.

Those that go into the model as they lie in the file stay there: mapped, shared by all workers of a host, and in
nobody's way if memory gets short. Those of another dtype, or that transformers merges into others, are read into memory
of their own when they are asked for, which is freed as soon as they are converted. (Through a mapping they would stay
resident beside the model.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from relevo.models.checkpoint import safetensors_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. Indexing reads it, like safetensors' own slices. [begin, end): its bytes in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def __getitem__(self, index: Any) -> Tensor:
        """Raises OSError if the file is too short."""
        tensor = torch.empty(math.prod(self.shape), dtype=self.dtype)
        array: Any = tensor.view(torch.uint8).numpy()
        data = memoryview(array)
        if len(data) != self.end - self.begin:
            raise OSError(f"{self.path}: {self.end - self.begin} bytes for {self.dtype} of shape {self.shape}")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            while data:
                count = file.readinto(data)
                if not count:
                    raise OSError(f"{self.path} ends within a tensor")
                data = data[count:]
        return tensor.reshape(self.shape)[index]


def stored_weights(paths: Sequence[Path], skeleton: nn.Module, base_prefix: str) -> dict[str, Any] | None:
    """Every tensor of these safetensors files, to be indexed when it is wanted; None if one has a dtype unknown here.

    skeleton: what they are for; tells which tensors can stay in the file
    base_prefix: of names in the skeleton that some checkpoints leave out
    """
    wanted = {name: tensor.dtype for name, tensor in skeleton.state_dict(keep_vars=True).items()}
    weights: dict[str, Any] = {}
    for path in paths:
        header, header_bytes = safetensors_header(path)
        mapped: Any = safe_open(path, framework="pt")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                return None
            if dtype in (wanted.get(name), wanted.get(f"{base_prefix}.{name}")):
                weights[name] = mapped.get_slice(name)
            else:
                begin, end = (header_bytes + offset for offset in entry["data_offsets"])
                weights[name] = StoredTensor(path, dtype, tuple(entry["shape"]), begin, end)
    return weights


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """transformers converts and merges weights one after another, where it would read ahead of itself in threads."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
