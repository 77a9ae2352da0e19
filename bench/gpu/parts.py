"""Parts, one after another: what one cannot do is said, and the next one goes on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import GRACE_SECONDS, Deadline, OutOfTime, interrupted_after
from bench.gpu.figures import Figure
from relevo.engine.config import AttentionBackend


@dataclass(frozen=True, slots=True)
class Measured:
    """ratio: to the figure's bound; None: it has none, or the bound was not measured"""

    value: float
    ratio: float | None = None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """ok: None: not run, and detail says why"""

    name: str
    ok: bool | None
    detail: str


@dataclass(slots=True)
class Bench:
    """What parts share. Rates in bytes and operations a second, 0 until measured.

    kept: what one part leaves to the next, by name; dropped after a part that failed
    """

    device: torch.device
    backend: AttentionBackend
    tiny: bool
    folder: Path
    measured: dict[str, Measured] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # figure's key → why it was not measured
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # that each part took
    copy_bandwidth: float = 0.0
    matrix_rate: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)
    deadline: Deadline = field(default_factory=lambda: Deadline(0.0))

    def add(self, key: str, value: float, ratio: float | None = None, remark: str = "") -> None:
        self.measured[key] = Measured(value, ratio, remark)

    def drop(self) -> None:
        """Give memory back."""
        self.kept.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Part:
    """frees: begins with nothing kept. is_check: what fails in it counts as a failed check"""

    name: str
    budget_seconds: float
    run: Callable[[Bench], None]
    figures: Sequence[Figure] = ()
    frees: bool = False
    is_check: bool = False


def run_part(part: Part, bench: Bench, total: Deadline) -> None:
    """Raises nothing. Figures that are missing afterwards have a reason."""
    started = time.monotonic()
    seconds = min(part.budget_seconds, total.seconds_left)
    reason = "no time left"
    if seconds > 0:
        reason = ""
        if part.frees:
            bench.drop()
        bench.deadline = Deadline(seconds)
        try:
            with interrupted_after(seconds + GRACE_SECONDS):
                part.run(bench)
        except OutOfTime:
            reason = f"out of time ({seconds:.0f} s)"
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # whatever it is, the other parts go on
            reason = short_reason(error)
            if part.is_check:
                bench.checks.append(Check(part.name, False, reason))
        if reason:
            bench.drop()
    if reason and part.is_check and not any(check.detail == reason for check in bench.checks):
        bench.checks.append(Check(part.name, None, reason))
    for figure in part.figures:
        if figure.key not in bench.measured:
            bench.missing[figure.key] = reason or "the part ended without it"
    bench.seconds[part.name] = time.monotonic() - started


def short_reason(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
