"""Ratios of our medians to the peers', with their spread, against the targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIGURES = {
    "ttft_c1_ms": "TTFT c=1, ms",
    "tpot_c1_ms": "TPOT c=1, ms",
    "tpot_c8_ms": "TPOT c=8, ms",
    "itl_c32_ms": "ITL c=32, ms",
    "tokens_per_second_c32": "tok/s c=32",
    "start_seconds": "start to ready, s",
}
# What a figure is compared with at the ceiling; a start has none.
AT_CEILING = ("ttft_c1_ms", "tpot_c1_ms", "tpot_c8_ms", "itl_c32_ms", "tokens_per_second_c32")

Round = Mapping[str, Mapping[str, float]]  # contender -> figure -> value


@dataclass(frozen=True, slots=True)
class Target:
    """contender's figure over reference's; at_most or at_least says what it should be."""

    figure: str
    contender: str
    reference: str
    at_most: float | None = None
    at_least: float | None = None

    def is_met(self, ratio: float) -> bool:
        if self.at_most is not None:
            return ratio <= self.at_most
        return self.at_least is None or ratio >= self.at_least

    def __str__(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return f"≥ {self.at_least:g}" if self.at_least is not None else ""


TARGETS = (
    Target("tpot_c1_ms", "relevo", "vllm", at_most=0.88),
    Target("tpot_c8_ms", "relevo", "vllm"),
    Target("itl_c32_ms", "relevo", "vllm", at_most=0.75),
    Target("ttft_c1_ms", "relevo", "vllm", at_most=0.75),
    Target("tokens_per_second_c32", "relevo", "vllm", at_least=1.25),
    Target("tokens_per_second_c32", "relevo-split", "vllm", at_least=1.1),
    Target("ttft_c1_ms", "relevo-split", "relevo", at_most=1.15),
    Target("start_seconds", "relevo", "vllm", at_most=0.1),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of medians over all rounds; low and high: of the single rounds' ratios."""

    value: float
    low: float
    high: float


def medians(rounds: Sequence[Round], contender: str) -> dict[str, float]:
    """Of each figure that was measured."""
    values: dict[str, list[float]] = {}
    for each in rounds:
        for figure, value in each.get(contender, {}).items():
            values.setdefault(figure, []).append(value)
    return {figure: statistics.median(several) for figure, several in values.items()}


def ratio(rounds: Sequence[Round], figure: str, contender: str, reference: str) -> Ratio | None:
    """None if no round has both."""
    both = [each for each in rounds if figure in each.get(contender, {}) and figure in each.get(reference, {})]
    if not both:
        return None
    single = [each[contender][figure] / each[reference][figure] for each in both]
    value = medians(both, contender)[figure] / medians(both, reference)[figure]
    return Ratio(value, min(single), max(single))


def all_targets(peers: Sequence[str]) -> list[Target]:
    """Those of the table, and the same figures against the other peers, where nothing was promised."""
    others = [
        Target(target.figure, target.contender, peer)
        for peer in peers
        if peer != "vllm"
        for target in TARGETS
        if target.reference == "vllm"
    ]
    return [*TARGETS, *others]
