"""The replay: its arithmetic on traces small enough to do by hand, and its promises on larger ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relevo.bench.cli import app
from relevo.bench.route import ALL_POLICIES, RouteBenchConfig, bench_route
from relevo.bench.route_policies import CacheThreshold
from relevo.bench.route_trace import BLOCK_TOKENS, TraceRequest, block_names, read_trace
from relevo.bench.statistics import Slo
from relevo.core.errors import StartupError

ONE = RouteBenchConfig(num_prefill=1, prefill_tokens_per_second=1000.0, pool_blocks=100)


def request(arrival: float, num_blocks: int, ids: Iterable[int], num_output_tokens: int = 1) -> TraceRequest:
    return TraceRequest(arrival, num_blocks * BLOCK_TOKENS, num_output_tokens, block_names(ids))


def chats(seed: int, num_chats: int = 60) -> list[TraceRequest]:
    """Chats of some turns after a common beginning, each turn with the last one's prompt and more; one a second."""
    rng = random.Random(seed)
    requests = []
    next_id = 4
    for _ in range(num_chats):
        arrival, ids = rng.uniform(0, num_chats), list(range(4))
        for _ in range(rng.randint(1, 6)):
            new = rng.randint(1, 8)
            ids += range(next_id, next_id + new)
            next_id += new
            requests.append(request(arrival, len(ids), ids, rng.randint(1, 100)))
            arrival += rng.uniform(1, 10)
    return sorted(requests, key=lambda traced: traced.arrival)


def test_one_worker_first_in_first_out() -> None:
    """Two prompts of 1,024 tokens at once: 1.024 s and 2.048 s. The second again, later: all but its last block."""
    trace = [request(0, 2, [1, 2]), request(0, 2, [3, 4]), request(10, 2, [3, 4])]
    figures = bench_route(ONE, trace, "round-robin")
    assert figures["ttft_mean_s"] == pytest.approx((1.024 + 2.048 + 0.512) / 3)
    assert figures["ttft_p50_s"] == pytest.approx(1.024)
    assert figures["hit_rate"] == pytest.approx(512 / 3072)


def test_pool_is_finite_and_the_oracles_is_not() -> None:
    trace = [request(float(10 * turn), 6, range(6 * (turn % 2), 6 * (turn % 2) + 6)) for turn in range(6)]
    small = RouteBenchConfig(num_prefill=1, prefill_tokens_per_second=1000.0, pool_blocks=8)
    assert bench_route(small, trace, "round-robin")["hit_rate"] < 0.3
    assert bench_route(small, trace, "oracle")["hit_rate"] == pytest.approx(4 * 5 / 36)


def test_cost_prefers_the_worker_that_has_the_prefix_until_its_queue_is_too_long() -> None:
    """Ten blocks cached are worth twice their 5.12 s: a queue of 60 blocks, 30.72 s, is longer than that."""
    config = RouteBenchConfig(num_prefill=2, prefill_tokens_per_second=1000.0, pool_blocks=1000)
    first = request(0, 10, range(10))
    warm = [first, request(100, 11, range(11))]
    assert bench_route(config, warm, "relevo")["hit_rate"] == pytest.approx(10 / 21)
    # Meanwhile a long prompt that goes on from the same prefix has come, and stands in the same queue.
    busy = [first, request(100, 70, [*range(10), *range(100, 160)]), request(100, 11, range(11))]
    assert bench_route(config, busy, "relevo")["hit_rate"] == pytest.approx(10 / 91)


def test_requests_that_share_a_prefix_and_arrive_together_compute_it_once() -> None:
    """No block event can have told of it: the router expects what it has sent."""
    config = RouteBenchConfig(num_prefill=4, prefill_tokens_per_second=1000.0, pool_blocks=1000)
    trace = [request(0, 41, [*range(40), 100 + number]) for number in range(3)]
    assert bench_route(config, trace, "relevo")["hit_rate"] == pytest.approx(2 * 40 / 123)


@pytest.mark.parametrize("policy", ALL_POLICIES)
@pytest.mark.parametrize(("num_prefill", "num_decode"), [(3, 0), (2, 2), (0, 2)])
def test_every_request_ends_and_the_same_seed_gives_the_same_figures(
    policy: str, num_prefill: int, num_decode: int
) -> None:
    config = RouteBenchConfig(
        num_prefill=num_prefill,
        num_decode=num_decode,
        prefill_tokens_per_second=4000.0,
        decode_prefill_tokens_per_second=4000.0,
        pool_blocks=200,
        decode_pool_blocks=200,
        max_num_seqs=8,
        slo=Slo(ttft_ms=2000, tpot_ms=60),
        seed=7,
    )
    trace = chats(1)
    figures = bench_route(config, trace, policy)
    assert figures == bench_route(config, trace, policy)
    assert figures["num_requests"] == len(trace)
    assert 0 < figures["ttft_p50_s"] <= figures["ttft_p99_s"]
    assert 0 < figures["slo_attainment"] <= 1
    if num_decode:
        assert 0.02 <= figures["tpot_p50_s"] <= figures["tpot_p99_s"]
        assert (figures["split_share"] > 0) == (num_prefill > 0)


@pytest.mark.parametrize("seed", range(3))
def test_relevo_is_ahead_of_the_others_and_behind_the_oracle(seed: int) -> None:
    config = RouteBenchConfig(num_prefill=4, prefill_tokens_per_second=3000.0, pool_blocks=300)
    means = {policy: bench_route(config, chats(seed, 250), policy)["ttft_mean_s"] for policy in ALL_POLICIES}
    assert means["relevo"] < 0.8 * min(means["random"], means["round-robin"], means["least-loaded"])
    assert means["relevo"] < 0.95 * means["cache-threshold"]
    assert means["oracle"] < means["relevo"]


class Worker:
    def __init__(self, num_requests: int) -> None:
        self.num_requests = num_requests


def test_cache_threshold_follows_the_published_rule() -> None:
    rule = CacheThreshold(2)
    first, second = request(0, 4, range(4)), request(0, 4, range(10, 14))
    assert rule.pick(first, [Worker(0), Worker(1)]) == 0  # nobody has it: the least busy
    assert rule.pick(second, [Worker(1), Worker(0)]) == 1
    longer, half = request(0, 7, range(7)), request(0, 8, [*range(4), *range(20, 24)])
    assert rule.pick(longer, [Worker(32), Worker(0)]) == 0  # more than half is there, and 32 more are not too many
    assert rule.pick(longer, [Worker(33), Worker(0)]) == 1  # 33 are
    assert rule.pick(half, [Worker(5), Worker(0)]) == 1  # half is not more than half
    assert rule.pick(request(0, 5, range(5)), [Worker(360), Worker(328)]) == 0  # not by a tenth


def test_cache_threshold_as_documented_fills_the_smallest_tree() -> None:
    rule = CacheThreshold(2, unmatched_to_smallest_tree=True)
    assert rule.pick(request(0, 4, range(4)), [Worker(9), Worker(0)]) == 0
    assert rule.pick(request(0, 2, range(10, 12)), [Worker(0), Worker(9)]) == 1
    assert rule.pick(request(0, 1, range(20, 21)), [Worker(0), Worker(9)]) == 1


LINE = '{"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]}'


def test_trace_is_read_with_the_names_of_full_blocks_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{LINE}\n\n{LINE.replace('1500', '500')}\n")
    early, late = read_trace(path)
    assert (early.arrival, late.arrival) == (0.5, 1.5)
    assert late == TraceRequest(1.5, 1100, 7, block_names([4, 5]))
    assert len(read_trace(path, limit=1)) == 1


@pytest.mark.parametrize(
    "line", ["no json", "[]", '{"timestamp": 1}', LINE.replace("1100", "0"), LINE.replace("1100", "2048"), ""]
)
def test_what_is_no_trace_is_said_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(StartupError, match=r"trace.jsonl:1|no request"):
        read_trace(path)


def test_fleet_that_cannot_hold_a_request_is_refused() -> None:
    with pytest.raises(StartupError, match="3 blocks"):
        bench_route(RouteBenchConfig(num_prefill=1, pool_blocks=3), [request(0, 3, range(3))], "relevo")
    with pytest.raises(StartupError, match="neither"):
        bench_route(RouteBenchConfig(num_prefill=0), [request(0, 3, range(3))], "relevo")


def test_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    trace, result = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text(f"{LINE}\n" * 3)
    arguments = ["route", str(trace), "--prefill", "2", "--decode", "0", "--pool-blocks", "50", "--json", str(result)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "cache-threshold" in done.output
    policies = json.loads(result.read_text())["policies"]
    assert set(policies) == set(ALL_POLICIES)
    for figures in policies.values():
        assert {"hit_rate", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s"} <= figures.keys()
