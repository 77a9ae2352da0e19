"""What a replay's requests have in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relevo.bench.route_trace import TraceRequest
from relevo.bench.statistics import Slo, mean, percentile


@dataclass(slots=True)
class RequestTimes:
    """Of one request, in seconds of virtual time."""

    prefill: str | None = None
    first_token: float | None = None
    end: float | None = None
    num_cached_tokens: int = 0
    predicted_ttft: float | None = None


def summarize(
    trace: Sequence[TraceRequest], times: Sequence[RequestTimes], slo: Slo, *, with_answers: bool
) -> dict[str, Any]:
    """Seconds; rates from 0 to 1. goodput_rps: requests a second that met the SLO, if one is set."""
    ttft, tpot, num_good = [], [], 0
    for traced, each in zip(trace, times, strict=True):
        assert each.first_token is not None and each.end is not None, "a request without an end"
        ttft.append(each.first_token - traced.arrival)
        own_tpot = None
        if with_answers and traced.num_output_tokens > 1:
            own_tpot = (each.end - each.first_token) / (traced.num_output_tokens - 1)
            tpot.append(own_tpot)
        num_good += slo.is_met(1000 * ttft[-1], None if own_tpot is None else 1000 * own_tpot)
    num_prompt_tokens = sum(traced.num_prompt_tokens for traced in trace)
    seconds = max(each.end or 0.0 for each in times) - trace[0].arrival
    figures: dict[str, Any] = {
        "num_requests": len(trace),
        "hit_rate": sum(each.num_cached_tokens for each in times) / num_prompt_tokens,
        **_summary("ttft", ttft),
    }
    if with_answers:
        figures |= _summary("tpot", tpot)
        figures["split_share"] = sum(each.prefill is not None for each in times) / len(times)
    if slo.is_set:
        figures["goodput_rps"] = num_good / seconds if seconds else 0.0
        figures["slo_attainment"] = num_good / len(trace)
    predicted = [each.predicted_ttft for each in times if each.predicted_ttft is not None]
    if predicted:
        figures["predicted_ttft_mean_s"] = mean(predicted)
    return figures


def _summary(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_mean_s": mean(values),
        **{f"{name}_p{percent}_s": percentile(values, percent) for percent in (50, 90, 99)},
    }
