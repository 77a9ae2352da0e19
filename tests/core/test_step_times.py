from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relevo.core.step_times import StepTimes


def test_line_is_found_whatever_batches_come() -> None:
    """10 ms and 0.5 ms a request."""
    times = StepTimes()
    for round_ in range(50):
        num_requests = 1 + 7 * round_ % 13
        times.add(num_requests, 0.010 + 0.0005 * num_requests)
    assert times.step_seconds_per_request == pytest.approx(0.0005)
    assert 0.010 < times.step_seconds < 0.017


def test_batches_of_one_size_tell_no_slope() -> None:
    times = StepTimes()
    assert (times.step_seconds, times.step_seconds_per_request) == (0.0, 0.0)
    for _ in range(10):
        times.add(8, 0.02)
    assert times.step_seconds == pytest.approx(0.02)
    assert times.step_seconds_per_request == 0.0


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(1e-6, 10)), max_size=50))
def test_slope_is_never_negative(steps: list[tuple[int, float]]) -> None:
    times = StepTimes()
    for num_requests, seconds in steps:
        times.add(num_requests, seconds)
    assert times.step_seconds_per_request >= 0
