"""`relevo bench serve` against an endpoint whose delays are known."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from relevo.bench.serve import ServeBenchConfig, ServeBenchResult, bench_serve
from relevo.bench.statistics import Slo
from relevo.bench.workload import Ask, random_asks
from relevo.core.errors import NotFound, Unavailable
from tests.bench.fake_endpoint import FakeEndpoint

# What a busy machine may add to a delay: two cores, shared with another test process.
SLACK_MS = 60.0


def make_asks(count: int, output_len: int = 5) -> list[Ask]:
    return random_asks(count, input_len=3, output_len=output_len, vocab_size=100, seed=1)


async def bench(fake: FakeEndpoint, count: int, output_len: int = 5, **options: Any) -> ServeBenchResult:
    async with fake.running():
        return await bench_serve(ServeBenchConfig(url=fake.url, **options), make_asks(count, output_len))


async def test_times_come_out_as_the_endpoint_takes_them() -> None:
    result = await bench(FakeEndpoint(ttft_seconds=0.2, itl_seconds=0.05), 3)
    figures = result.figures
    assert 200 <= figures["ttft_ms_p50"] < 200 + SLACK_MS
    # A token that is seen late makes the time to the next one shorter.
    assert 35 <= figures["itl_ms_p50"] < 50 + SLACK_MS
    assert 35 <= figures["tpot_ms_p50"] < 50 + SLACK_MS
    assert 400 <= figures["e2e_ms_p50"] < 400 + 4 * SLACK_MS
    assert result.num_output_tokens == 15
    assert result.num_input_tokens == 9
    assert result.tokens_per_chunk == 1
    assert result.output_tokens_per_second == pytest.approx(15 / result.seconds)
    assert not result.failures
    assert not result.num_short


async def test_chunks_of_several_tokens_are_not_taken_for_single_ones() -> None:
    """Of 9 tokens, 3 come at once, then 2 chunks of 3 after 300 ms each: 6 tokens in 600 ms."""
    fake = FakeEndpoint(itl_seconds=0.3, tokens_per_chunk=3, usage="each")
    result = await bench(fake, 1, output_len=9)
    assert result.tokens_per_chunk == 3
    assert result.num_output_tokens == 9
    assert 80 <= result.figures["itl_ms_p50"] < 100 + SLACK_MS
    assert 80 <= result.figures["tpot_ms_p50"] < 100 + SLACK_MS


@pytest.mark.parametrize("usage", ["last", "each", None])
@pytest.mark.parametrize("empty_last", [False, True])
async def test_tokens_are_counted_whatever_the_endpoint_tells(usage: str | None, empty_last: bool) -> None:
    result = await bench(FakeEndpoint(usage=usage, empty_last=empty_last), 2, output_len=4)
    assert result.num_output_tokens == 8
    assert result.tokens_per_chunk == 1


async def test_tokens_without_text_count() -> None:
    """As servers send them that have no tokenizer."""
    result = await bench(FakeEndpoint(with_text=False), 2, output_len=4)
    assert result.num_output_tokens == 8
    assert result.tokens_per_chunk == 1


async def test_concurrency_is_kept_and_warmup_not_counted() -> None:
    fake = FakeEndpoint(ttft_seconds=0.02)
    async with fake.running():
        config = ServeBenchConfig(url=fake.url, concurrency=3, model="named")
        result = await bench_serve(config, make_asks(7), make_asks(2))
    assert fake.max_open == 3
    assert result.num_requests == 7
    assert len(fake.bodies) == 9
    assert all(body["model"] == "named" and body["ignore_eos"] for body in fake.bodies)


async def test_poisson_arrivals_do_not_wait_for_answers() -> None:
    """20 requests at 100 a second, each of which takes 0.5 s: nearly all are under way at once."""
    fake = FakeEndpoint(ttft_seconds=0.5)
    result = await bench(fake, 20, output_len=1, concurrency=None, request_rate=100.0)
    assert fake.max_open > 10
    assert result.num_requests == 20
    assert result.seconds < 3


async def test_waiting_for_a_client_counts_as_ttft() -> None:
    """With room for one, the last of four requests that come at once waits for three."""
    fake = FakeEndpoint(ttft_seconds=0.1)
    result = await bench(fake, 4, output_len=1, concurrency=1, request_rate=1000.0)
    assert result.figures["ttft_ms_p99"] > 350


async def test_failed_requests_are_counted_and_named() -> None:
    result = await bench(FakeEndpoint(fail_every=3), 6)
    assert result.num_requests == 4
    (reason,) = result.failures
    assert "500" in reason
    assert "no luck" in reason
    assert "\n" not in reason
    assert result.failures[reason] == 2


async def test_broken_stream_is_a_failure_and_all_failed_is_an_error() -> None:
    with pytest.raises(Unavailable, match=r"all 2 requests failed.*worker died"):
        await bench(FakeEndpoint(break_after=2), 2)


async def test_short_answers_are_told() -> None:
    result = await bench(FakeEndpoint(max_tokens=3), 2, output_len=5, ignore_eos=False)
    assert result.num_short == 2
    assert result.num_output_tokens == 6


async def test_goodput_is_of_the_requests_within_the_slo() -> None:
    result = await bench(FakeEndpoint(ttft_seconds=0.05), 2, slo=Slo(ttft_ms=10))
    assert result.goodput_requests_per_second == 0.0
    result = await bench(FakeEndpoint(), 2, slo=Slo(ttft_ms=5000, tpot_ms=5000))
    assert result.goodput_requests_per_second == pytest.approx(result.requests_per_second)


async def test_endpoint_without_a_list_of_models_needs_a_name() -> None:
    with pytest.raises(NotFound, match="--model"):
        await bench(FakeEndpoint(lists_models=False), 1)
    result = await bench(FakeEndpoint(lists_models=False), 1, model="m")
    assert result.num_requests == 1


async def test_nobody_listening_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(Unavailable, match="cannot reach") as error:
            await bench_serve(ServeBenchConfig(url=url), make_asks(1))
    assert "\n" not in error.value.message


async def test_endpoint_that_hangs_is_a_failure_in_time() -> None:
    with pytest.raises(Unavailable, match="nothing came in time"):
        await asyncio.wait_for(bench(FakeEndpoint(ttft_seconds=30), 1, timeout_seconds=0.2), timeout=10)


async def test_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    dataset, figures = tmp_path / "asks.jsonl", tmp_path / "figures.json"
    dataset.write_text('{"prompt": "one", "output_len": 2}\n{"prompt": [1, 2], "output_len": 3}\n')
    fake = FakeEndpoint()
    async with fake.running():
        output = await run_command(
            "--url", fake.url, "--dataset", str(dataset), "--concurrency", "1,2", "--json", str(figures)
        )
    assert "TTFT" in output
    assert [each["concurrency"] for each in json.loads(figures.read_text())] == [1, 2]
    # Warm-up prompts are random; then the file's come, one after the other, and both at once.
    asked = [body["prompt"] for body in fake.bodies if body["prompt"] in ("one", [1, 2])]
    assert asked[:2] == ["one", [1, 2]] and len(asked) == 4 and "one" in asked[2:] and [1, 2] in asked[2:]


async def test_bad_level_is_refused() -> None:
    output = await run_command("--concurrency", "1,zero", expect=2)
    assert "1,8,32" in output


async def run_command(*arguments: str, expect: int = 0) -> str:
    """As a user runs it; returns stdout and stderr."""
    import sys

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relevo.cli", "bench", "serve", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode == expect, output.decode()
    return output.decode()
