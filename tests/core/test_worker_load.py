from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relevo.core.worker_load import SETTLE_SECONDS, PromptWork, WorkerLoad


@dataclass(frozen=True)
class Load:
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0


NAMES = [bytes([number]) * 32 for number in range(16)]


def prompt(num_uncached: int, num_tokens: int | None = None, hashes: list[bytes] | None = None) -> PromptWork:
    return PromptWork(num_uncached if num_tokens is None else num_tokens, num_uncached, hashes or [])


def test_requests_count_until_a_report_can_have_seen_them() -> None:
    load = WorkerLoad(Load())
    load.reported(Load(num_running=2, num_waiting=1, step_seconds=0.2), now=0.0)
    load.sent(1, prompt(40), now=1.0)
    load.sent(2, prompt(60), now=1.1)
    assert load.num_requests == 5
    report = Load(num_running=3, step_seconds=0.2)
    load.reported(report, now=1.0 + 0.2 + SETTLE_SECONDS + 0.01)  # late enough for the first alone
    assert load.num_requests == 4
    load.reported(report, now=2.0)
    assert load.num_requests == 3


def test_prompts_wait_as_they_were_predicted_until_their_first_token() -> None:
    """The worker counts all 1,000 tokens of each, for it has not looked yet what it has of them."""
    load = WorkerLoad(Load())
    load.sent(1, prompt(40, 1000), now=1.0)
    load.sent(2, prompt(60, 1000), now=1.0)
    load.reported(Load(num_waiting=2, num_waiting_tokens=2000), now=2.0)
    assert load.num_waiting_tokens(2.0) == 100
    load.computed(1, now=3.0)
    assert load.num_waiting_tokens(3.0) == 60
    load.ended(2, now=3.0)
    assert load.num_waiting_tokens(3.0) == 0


def test_other_routers_prompts_are_what_the_report_has_beyond_ours() -> None:
    load = WorkerLoad(Load())
    load.sent(1, prompt(40, 100), now=1.0)
    load.reported(Load(num_waiting=2, num_waiting_tokens=700), now=2.0)
    assert load.num_waiting_tokens(2.0) == 600 + 40


def test_the_first_prompt_is_worked_off_while_time_passes() -> None:
    load = WorkerLoad(Load(prefill_tokens_per_second=1000.0))
    load.sent(1, prompt(500), now=1.0)
    load.sent(2, prompt(300), now=1.1)
    assert load.num_waiting_tokens(1.2) == pytest.approx(600)
    assert load.num_waiting_tokens(9.0) == pytest.approx(25 + 300)  # it is late, but it is not done
    load.computed(1, now=9.0)
    assert load.num_waiting_tokens(9.1) == pytest.approx(200)


def test_blocks_of_unfinished_prompts_are_expected() -> None:
    load = WorkerLoad(Load())
    load.sent(1, prompt(8, hashes=NAMES[:8]), now=1.0)
    load.sent(2, prompt(4, hashes=[*NAMES[:4], *NAMES[12:]]), now=1.0)
    assert load.num_expected_blocks(NAMES) == 8
    load.computed(1, now=2.0)
    assert load.num_expected_blocks(NAMES) == 4
    load.ended(2, now=2.0)
    assert load.num_expected_blocks(NAMES) == 0


def test_ended_requests_count_no_more() -> None:
    load = WorkerLoad(Load())
    load.sent(1, prompt(40), now=1.0)
    for _ in range(2):
        load.ended(1, now=1.0)
    load.computed(1, now=1.0)
    assert (load.num_requests, load.num_waiting_tokens(2.0)) == (0, 0)


operations = st.lists(
    st.tuples(st.sampled_from(["sent", "computed", "ended"]), st.integers(0, 5), st.integers(0, 9), st.integers(0, 16))
)


@given(operations)
def test_whatever_comes_in_whatever_order_nothing_is_left_at_the_end(steps: list[tuple[str, int, int, int]]) -> None:
    load = WorkerLoad(Load(prefill_tokens_per_second=3.0))
    alive: dict[int, PromptWork] = {}
    sent: set[int] = set()
    for now, (what, handle, tokens, blocks) in enumerate(steps):
        if what == "sent" and handle not in sent:
            sent.add(handle)
            alive[handle] = prompt(tokens, tokens, NAMES[:blocks])
            load.sent(handle, alive[handle], now)
        elif what == "computed":
            alive.pop(handle, None)
            load.computed(handle, now)
        elif what == "ended":
            alive.pop(handle, None)
            load.ended(handle, now)
        total = sum(work.num_uncached_tokens for work in alive.values())
        assert 0 <= load.num_waiting_tokens(now) <= total
        assert load.num_expected_blocks(NAMES) == max((len(work.hashes) for work in alive.values()), default=0)
    for handle in sent:
        load.ended(handle, len(steps))
    assert (load.num_requests, load.num_waiting_tokens(1e9), load.num_expected_blocks(NAMES)) == (0, 0, 0)
