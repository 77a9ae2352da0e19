"""Traces of requests: Mooncake's JSON lines, with the names of the prompts' blocks instead of their text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from relevo.core.block_hash import BlockHash
from relevo.core.errors import StartupError

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """hashes: names of the prompt's full blocks of BLOCK_TOKENS. arrival: seconds from the start."""

    arrival: float
    num_prompt_tokens: int
    num_output_tokens: int
    hashes: tuple[BlockHash, ...]


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests, in order of arrival. Raises StartupError naming file and line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read the trace {path}: {error}") from error
    requests = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines[:limit], start=1) if line.strip()]
    if not requests:
        raise StartupError(f"the trace {path} holds no request")
    return sorted(requests, key=lambda request: request.arrival)


def block_names(hash_ids: Iterable[int]) -> tuple[BlockHash, ...]:
    return tuple(map(_name, hash_ids))


@cache
def _name(hash_id: int) -> BlockHash:
    return sha256(b"%d" % hash_id).digest()


def _parse(line: str, where: str) -> TraceRequest:
    try:
        entry = json.loads(line)
        arrival = float(entry["timestamp"]) / 1000
        num_prompt_tokens, num_output_tokens = int(entry["input_length"]), int(entry["output_length"])
        hash_ids = [int(hash_id) for hash_id in entry["hash_ids"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(
            f"{where}: no request of a trace, which has timestamp, input_length, output_length and hash_ids: {error!r}"
        ) from error
    num_blocks = num_prompt_tokens // BLOCK_TOKENS
    if num_prompt_tokens < 1 or num_output_tokens < 0 or len(hash_ids) < num_blocks or not 0 <= arrival < float("inf"):
        raise StartupError(
            f"{where}: {num_prompt_tokens} tokens in, {num_output_tokens} out, {len(hash_ids)} hash_ids at "
            f"{arrival} s make no request: one has a prompt, and an id for each {BLOCK_TOKENS} tokens of it"
        )
    # The last id may stand for a part of a block, which has no name.
    return TraceRequest(arrival, num_prompt_tokens, max(1, num_output_tokens), block_names(hash_ids[:num_blocks]))
