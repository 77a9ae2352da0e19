"""What a router process takes, with the demo's tokenizer (4,096 tokens): the aim is 120 MB and the index."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import orjson
import pytest

from relevo.bench.http_load import closed_loop, post
from relevo.bench.router import NUM_PROMPTS
from relevo.bench.router_processes import BenchWorker, completion_requests, prompts, start_router
from services.router.route_log import MAX_RECORDS

MAX_RSS_BYTES = 120_000_000
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
# Libraries that cost megabytes and are for few requests, or for the start alone.
KEPT_OUT = ("tokenizers.abi3", "_multiarray_umath", "llguidance", "torch")


@pytest.fixture
def router() -> Iterator[tuple[int, int]]:
    """Its pid and its HTTP port."""
    cores = os.sched_getaffinity(0)
    with ExitStack() as stack:
        worker = BenchWorker(stack, "services.router.bench_worker", max(cores))
        worker.set_rate(math.inf)
        yield start_router(stack, [worker.address], min(cores))


def rss_bytes(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(line.split()[1])


def is_mapped(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


async def test_one_router_takes_120_megabytes(router: tuple[int, int]) -> None:
    """With its log of requests full, after chats and streams. What grammars need comes with the first one."""
    pid, port = router
    texts = prompts(256, NUM_PROMPTS)
    whole = completion_requests(texts, port, stream=False, max_tokens=16)
    streamed = completion_requests(texts, port, stream=True, max_tokens=16)
    chats = [post("127.0.0.1", port, "/v1/chat/completions", orjson.dumps({**CHAT, "ignore_eos": True}))]
    num_requests = 0
    while num_requests < MAX_RECORDS:
        num_requests += (await closed_loop("127.0.0.1", port, whole, 32, 0.5)).num_requests
    await closed_loop("127.0.0.1", port, streamed, 32, 0.5)
    await closed_loop("127.0.0.1", port, chats, 8, 0.3)
    taken = rss_bytes(pid)
    assert [name for name in KEPT_OUT if is_mapped(pid, name)] == []
    assert taken <= MAX_RSS_BYTES, f"{taken / 1e6:.1f} MB"

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        body = {**CHAT, "response_format": {"type": "json_object"}}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert is_mapped(pid, "llguidance")
    assert rss_bytes(pid) - taken < 10_000_000
