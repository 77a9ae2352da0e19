"""What passes did to a model, and what they left alone and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """figures: what was measured, if something was"""

    module: str
    why: str
    figures: str = ""


@dataclass(slots=True)
class PassRecord:
    """One pass over one model; modules by their names in it, "" for the model itself."""

    name: str
    does: str
    applied: list[str] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def reasons(self) -> list[tuple[str, list[str]]]:
        """Why it did not apply, each reason once, with the modules that it is true of."""
        found: dict[str, list[str]] = {}
        for left in self.left_alone:
            found.setdefault(left.why, []).append(left.module)
        return list(found.items())


def grouped(modules: Iterable[str]) -> list[str]:
    """Names with their numbers in ranges: ["layers.0.mlp", "layers.1.mlp", "norm"] is ["layers.0–1.mlp", "norm"].

    Only the first number of a name is taken together.
    """
    patterns: dict[tuple[str, str], list[int]] = {}
    for name in modules:
        match = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        head, tail = (name[: match.start()], name[match.end() :]) if match else (name, "")
        patterns.setdefault((head, tail), []).extend([int(match.group())] if match else [])
    return [f"{head}{_ranges(numbers)}{tail}" for (head, tail), numbers in patterns.items()]


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)
