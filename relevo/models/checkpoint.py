"""A checkpoint's weight files: found, checked, measured and named, without reading the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from relevo.core.errors import StartupError
from relevo.model_files import ModelFiles

# In the order in which transformers looks for them: a single file, then an index of several.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

MAX_HEADER_BYTES = 100 << 20
SAMPLE_BYTES = 4096
NUM_SAMPLES = 64


def weight_files(files: ModelFiles) -> list[Path]:
    """The files that hold the weights, sorted. Raises StartupError if one is missing, empty or cut off."""
    found = _find(files)
    for path in found:
        if not path.is_file():
            raise StartupError(f"model {files.name!r}: the weights are incomplete: {path} is missing")
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.stat().st_size == 0:
            raise StartupError(f"model {files.name!r}: {path} is empty")
    return found


def content_digest(files: ModelFiles, weights: list[Path]) -> str:
    """What a local folder holds, in 64 hex digits: config.json, and each weight file's name, size and samples.

    Samples are SAMPLE_BYTES at NUM_SAMPLES places, evenly spread from the first byte to the last, and a safetensors
    file's header in full. Reading all of a large model would take longer than loading it. A fine-tune changes nearly
    every tensor and is told apart; an edit of a few values in between is not: give such a folder another config.json.
    """
    digest = sha256()
    _add(digest, (files.path / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        _add(digest, path.name.encode())
        _add(digest, str(size).encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                _add(digest, file.read(8 + int.from_bytes(file.read(8), "little")))
            last = max(0, size - SAMPLE_BYTES)
            for i in range(NUM_SAMPLES):
                file.seek(last * i // (NUM_SAMPLES - 1))
                _add(digest, file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """What the file holds, and where its data begins: https://huggingface.co/docs/safetensors: u64 length, JSON, data.

    Raises ValueError if that can't be.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError(f"a header of {length} bytes")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


@dataclass(frozen=True, slots=True)
class Memory:
    """available: bytes that may be used now; where: for messages."""

    available: int
    where: str = "of memory"


def available_memory() -> Memory | None:
    """What this process may still take, by the kernel's estimate and its cgroup's limits; None where nobody says."""
    known = [number for number in (_mem_available(), *_cgroup_headrooms()) if number is not None]
    return Memory(min(known)) if known else None


def _find(files: ModelFiles) -> list[Path]:
    for single, index in zip(_SINGLE, _INDEX, strict=True):
        if (files.path / single).is_file():
            return [files.path / single]
        if (files.path / index).is_file():
            return _indexed(files, files.path / index)
    raise StartupError(
        f"model {files.name!r}: no weights ({' or '.join(_SINGLE)}, or an index of them) in {files.path}"
    )


def _indexed(files: ModelFiles, index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(files.path / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupError(f"model {files.name!r}: {index} is not an index of weights") from error


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    try:
        header, header_bytes = safetensors_header(path)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StartupError(f"{path} is corrupt: not a safetensors file") from error
    if size != header_bytes + end:
        raise StartupError(f"{path} is corrupt: it has {size} bytes and its header promises {header_bytes + end}")


def _add(digest: Any, part: bytes) -> None:
    """Length first, so that no two lists of parts have the same bytes."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _mem_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None  # not Linux: nobody says
    return None


def _cgroup_headrooms() -> Iterator[int]:
    """Limit minus use, of this process's cgroup (version 2) and of those above it that have a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return
    folder = Path("/sys/fs/cgroup") / own.strip("/")
    for group in islice((folder, *folder.parents), len(folder.parts)):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            # The page cache counts as used and is given up under pressure.
            cached = next(
                (
                    int(line.split()[1])
                    for line in (group / "memory.stat").read_text().splitlines()
                    if line.startswith("file ")
                ),
                0,
            )
        except (OSError, ValueError):
            continue  # the root has no limit, and a container may not see the groups above its own
        if limit.isdigit():
            yield int(limit) - used + cached
