"""Sizes in bytes, as people write them: 1GiB, 512MiB, 64k, 4096."""

from __future__ import annotations

import re
from fractions import Fraction

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", re.IGNORECASE)
_POWERS: dict[str, int] = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(value: str | int) -> int:
    """Bytes from a plain number or a number with a unit.

    KiB, MiB, GiB, TiB and, as usual on command lines, K, M, G, T are powers of 1024; kB, MB, GB, TB of 1000.
    Raises ValueError for anything else, for sizes below 0 and for fractions of a byte.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is no size: at least 0 is right")
        return value
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{value!r} is no size: write for example 1GiB, 512MiB or 4096")
    number, prefix, binary, byte = match.groups()
    unit: int = (1000 if prefix and byte and not binary else 1024) ** _POWERS[prefix.lower()]
    num_bytes = Fraction(number) * unit
    if num_bytes.denominator != 1:
        raise ValueError(f"{value!r} is no whole number of bytes")
    return num_bytes.numerator


def format_size(num_bytes: int) -> str:
    """The shortest exact way to write it: 268435456 → "256MiB", 4097 → "4097"."""
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{unit}"
    return str(num_bytes)
