"""relevo bench handover, on the demo model."""

from __future__ import annotations

import pytest

from relevo.bench.handover import HandoverBenchConfig, as_dicts, bench_handover
from relevo.bench.handover_command import handover_table
from relevo.stack import StackConfig
from tests.e2e.test_serve import free_port

pytestmark = pytest.mark.timeout(180)


async def test_it_tells_tail_and_overlap_of_split_requests() -> None:
    config = HandoverBenchConfig(
        stack=StackConfig(port=free_port(), kv_arena="64MiB", worker_options={"kv-cache-memory": "128MiB"}),
        input_lens=(256, 1100),
        num_requests=1,
    )
    told: list[str] = []
    short, long = cases = await bench_handover(config, told.append)
    assert (short.num_blocks, long.num_blocks) == (16, 68)
    for case in cases:
        assert case.ttft_ms > 0 and case.aggregated_ttft_ms > 0 and case.second_token_ms > 0
        assert 0 <= case.overlap <= 1 and 0 <= case.tail_share < 5 and case.copies_ms > 0
        assert case.num_bytes == case.num_blocks * 24576
    assert as_dicts(cases)[0]["tail_share"] == short.tail_share
    assert handover_table(cases).row_count == 2
    assert any("aggregated" in what for what in told)
