"""What the cost makes of fleets; the arithmetic of expectations is by hand, from design.md's formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relevo.core.placement import Candidate, CostModel, WorkerView, place

COSTS = CostModel()
IDLE = WorkerView(
    address="decode-0",
    fingerprint=b"f",
    block_size=16,
    block_bytes=1 << 16,
    has_agent=True,
    max_num_seqs=64,
    num_free_blocks=10_000,
    prefill_tokens_per_second=10_000,
    step_seconds=0.01,
)


def worker(address: str, **changes: object) -> WorkerView:
    return replace(IDLE, address=address, **changes)  # type: ignore[arg-type]  # as the test says


def best(num_tokens: int, prefill: list[WorkerView], decode: list[WorkerView], affinity: bytes = b"") -> Candidate:
    placement = place(num_tokens, prefill, decode, costs=COSTS, affinity=affinity)
    assert placement is not None
    return placement.best


@pytest.mark.parametrize(("num_tokens", "splits"), [(1, False), (15, False), (40, False), (300, True), (5000, True)])
def test_idle_pair_splits_from_a_few_hundred_tokens_on(num_tokens: int, splits: bool) -> None:
    chosen = best(num_tokens, [worker("prefill-0")], [worker("decode-0")])
    assert (chosen.prefill is not None) == splits


@pytest.mark.parametrize(("num_requests", "splits"), [(0, False), (8, True)])
def test_busy_decode_is_spared_sooner(num_requests: int, splits: bool) -> None:
    """40 tokens are 4 ms: less than the hand-over's 5, unless eight others would wait them as well."""
    chosen = best(40, [worker("prefill-0")], [worker("decode-0", num_requests=num_requests)])
    assert (chosen.prefill is not None) == splits


def test_cached_prompt_falls_out_direct() -> None:
    assert best(1600, [worker("prefill-0")], [worker("decode-0", num_cached_blocks=99)]).prefill is None
    assert best(1600, [worker("prefill-0")], [worker("decode-0", num_cached_blocks=20)]).prefill == "prefill-0"


def test_queue_at_prefill_sends_a_prompt_direct() -> None:
    """1,000 tokens: 100 ms. Split: 5 more. Direct: 100 of slow-down. A queue of 2,000 tokens is 200 ms."""
    assert best(1000, [worker("prefill-0", num_waiting_tokens=500)], [worker("decode-0")]).prefill == "prefill-0"
    assert best(1000, [worker("prefill-0", num_waiting_tokens=2000)], [worker("decode-0")]).prefill is None


def test_prefix_is_worth_a_longer_queue_up_to_its_weight() -> None:
    """800 cached tokens save 80 ms twice over (a = 1): worth 160 ms of waiting, which are 1,600 tokens."""
    for waiting, expected in ((1500, "warm"), (1700, "cold")):
        warm = worker("warm", num_cached_blocks=50, num_waiting_tokens=waiting)
        assert best(1600, [warm, worker("cold")], [worker("decode-0")]).prefill == expected


def test_terms_are_the_designs() -> None:
    prefill = worker("prefill-0", num_waiting_tokens=500, num_cached_blocks=10)
    decode = worker("decode-0", num_requests=3, num_cached_blocks=4, block_bytes=10_000_000)
    placement = place(1000, [prefill], [decode], costs=COSTS)
    assert placement is not None
    split, direct = sorted(placement.candidates, key=lambda candidate: candidate.prefill is None)
    assert split.terms == pytest.approx(
        {
            "wait_ms": 50,
            "fetch_ms": 0,
            "uncached_ms": 84,  # 1000 - 160 tokens
            "transfer_ms": 496,  # 58 blocks of 10 MB at 1 GB/s are 580 ms, 84 of them while prefill computes
            "handover_ms": 5,
            "admit_ms": 5,
            "slowdown_ms": 30,
            "ttft_ms": 640,
            "cost_ms": 640 + 84 + 30,
        }
    )
    assert direct.terms == pytest.approx(
        {
            "wait_ms": 0,
            "fetch_ms": 0,
            "uncached_ms": 93.6,  # 1000 - 64 tokens
            "transfer_ms": 0,
            "handover_ms": 0,
            "admit_ms": 5,
            "slowdown_ms": 30 + 93.6 * 4,
            "ttft_ms": 98.6,
            "cost_ms": 98.6 + 93.6 + 30 + 93.6 * 4,
        }
    )


@pytest.mark.parametrize("obstacle", [{"has_agent": False}, {"fingerprint": b"g"}])
def test_no_split_where_blocks_cannot_travel(obstacle: dict[str, object]) -> None:
    for prefill, decode in (
        (worker("prefill-0", **obstacle), worker("decode-0")),
        (worker("prefill-0"), worker("decode-0", **obstacle)),
    ):
        assert best(5000, [prefill], [decode]).prefill is None


def test_no_split_without_a_full_uncached_block() -> None:
    placement = place(47, [worker("prefill-0")], [worker("decode-0", num_cached_blocks=2)], costs=COSTS)
    assert placement is not None
    assert [candidate.prefill for candidate in placement.candidates] == [None]


def test_no_decode_worker_is_no_placement() -> None:
    assert place(100, [worker("prefill-0")], [], costs=COSTS) is None


def test_full_decode_worker_is_the_last_choice() -> None:
    for full in (worker("full", num_requests=64), worker("full", num_free_blocks=3)):
        idle = worker("idle", num_requests=3)
        assert best(300, [], [full, idle]).decode == "idle"


def test_unmeasured_workers_are_taken_to_be_as_fast_as_the_others() -> None:
    unmeasured = worker("new", prefill_tokens_per_second=0.0, step_seconds=0.0)
    placement = place(1000, [], [worker("old", prefill_tokens_per_second=5000), unmeasured], costs=COSTS)
    assert placement is not None
    assert {candidate.uncached_ms for candidate in placement.candidates} == {200.0}
    alone = place(1000, [], [unmeasured], costs=COSTS)
    assert alone is not None
    assert alone.best.uncached_ms == 500.0  # 2,000 tokens a second


def test_equal_workers_share_unequal_prompts_and_keep_equal_ones() -> None:
    """Of 1,000 prompts each of four gets 250 ± 100: seven standard deviations."""
    decode = [worker(f"10.0.0.{index}:50053") for index in range(4)]
    chosen = [best(8, [], decode, prompt.to_bytes(32)).decode for prompt in range(1000)]
    assert all(150 <= chosen.count(view.address) <= 350 for view in decode)
    assert chosen == [best(8, [], decode[::-1], prompt.to_bytes(32)).decode for prompt in range(1000)]


def test_measured_step_times_decide_who_is_slowed_down() -> None:
    """Three answers of 128 tokens, each token of which takes 2 ms longer with one more: 768 ms, against a step's 30."""
    measured = place(100, [], [worker("d", num_requests=3, step_seconds_per_request=0.002)], costs=COSTS)
    unmeasured = place(100, [], [worker("d", num_requests=3)], costs=COSTS)
    assert measured is not None and unmeasured is not None
    assert measured.best.slowdown_ms - unmeasured.best.slowdown_ms == pytest.approx(768 - 30)


def test_measured_bandwidth_is_used() -> None:
    """100 blocks of 10 MB: 1,000 ms at the assumed 1 GB/s, 100 ms at 10, which is less than the 160 ms of prefill."""
    for bandwidth, transfer_ms in ((0.0, 1000 - 160), (10e9, 0), (2e9, 500 - 160)):
        decode = worker("decode-0", block_bytes=10_000_000, transfer_bytes_per_second=bandwidth)
        placement = place(1600, [worker("prefill-0")], [decode], costs=COSTS)
        assert placement is not None
        (split,) = [candidate for candidate in placement.candidates if candidate.prefill]
        assert split.transfer_ms == pytest.approx(transfer_ms)


def test_burst_spreads_when_what_was_sent_is_counted() -> None:
    """64 at once over four prefill and two decode workers, no report in between."""
    prefill = {f"prefill-{index}": worker(f"prefill-{index}") for index in range(4)}
    decode = {f"decode-{index}": worker(f"decode-{index}") for index in range(2)}
    for _ in range(64):
        chosen = best(1000, list(prefill.values()), list(decode.values()))
        view = decode[chosen.decode]
        decode[chosen.decode] = replace(view, num_requests=view.num_requests + 1)
        assert chosen.prefill is not None
        view = prefill[chosen.prefill]
        tokens = view.num_waiting_tokens + chosen.num_uncached_tokens
        prefill[chosen.prefill] = replace(view, num_waiting_tokens=tokens)
    assert [view.num_waiting_tokens for view in prefill.values()] == [16_000] * 4
    assert [view.num_requests for view in decode.values()] == [32] * 2


views = st.builds(
    WorkerView,
    address=st.sampled_from(["a:1", "b:1", "c:1"]),
    fingerprint=st.sampled_from([b"f", b"g"]),
    block_size=st.just(16),
    block_bytes=st.integers(1, 1 << 24),
    has_agent=st.booleans(),
    max_num_seqs=st.integers(1, 256),
    num_requests=st.integers(0, 300),
    num_waiting_tokens=st.integers(0, 100_000),
    num_free_blocks=st.integers(0, 1000),
    prefill_tokens_per_second=st.sampled_from([0.0, 10.0, 1e5]),
    step_seconds=st.sampled_from([0.0, 0.01, 1.0]),
    num_cached_blocks=st.integers(0, 60),
)


def fleets(max_size: int) -> st.SearchStrategy[list[WorkerView]]:
    return st.lists(views, max_size=max_size, unique_by=lambda view: view.address)


@given(st.integers(1, 2000), fleets(3), fleets(3))
def test_whatever_the_fleet_the_decision_is_sound(
    num_tokens: int, prefill: list[WorkerView], decode: list[WorkerView]
) -> None:
    placement = place(num_tokens, prefill, decode, costs=COSTS, affinity=b"x")
    if not decode:
        assert placement is None
        return
    assert placement is not None
    assert placement.best == placement.candidates[0]
    # The order of workers does not matter.
    mirrored = place(num_tokens, prefill[::-1], decode[::-1], costs=COSTS, affinity=b"x")
    assert mirrored is not None
    assert mirrored.candidates == placement.candidates
    direct = [candidate.decode for candidate in placement.candidates if candidate.prefill is None]
    assert sorted(direct) == sorted(view.address for view in decode)
    for candidate in placement.candidates:
        assert placement.best.cost_ms <= candidate.cost_ms
        assert candidate.cost_ms == pytest.approx(
            candidate.ttft_ms + COSTS.uncached_weight * candidate.uncached_ms + candidate.slowdown_ms
        )
        assert all(value >= 0 for value in candidate.terms.values())
        parts = ("wait_ms", "uncached_ms", "transfer_ms", "handover_ms", "admit_ms")
        assert candidate.ttft_ms == pytest.approx(sum(candidate.terms[part] for part in parts))


@given(st.integers(1, 2000), fleets(3), fleets(3).filter(bool), st.integers(0, 2), st.integers(1, 50))
def test_more_work_on_a_decode_worker_never_attracts(
    num_tokens: int, prefill: list[WorkerView], decode: list[WorkerView], index: int, more: int
) -> None:
    before = place(num_tokens, prefill, decode, costs=COSTS)
    view = decode[index % len(decode)]
    busier = replace(view, num_requests=view.num_requests + more, num_waiting_tokens=view.num_waiting_tokens + more)
    after = place(num_tokens, prefill, [busier if other is view else other for other in decode], costs=COSTS)
    assert before is not None
    assert after is not None
    if before.best.decode != view.address:
        assert after.best == before.best
