"""`relevo bench router`, and other projects' routers beside it in the same run: `python -m bench.peers.router`.

Theirs are proxies over HTTP before model-free servers: they neither tokenize nor detokenize, ours does both. Client,
cores and figures are the same. Nothing else heavy should run meanwhile.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from bench.peers.servers import ROOT, install
from relevo.bench.router import NUM_PROMPTS, RouterBenchConfig, RouterBenchResult, bench_router, measure, pin
from relevo.bench.router_processes import BenchWorker, prompts

START_SECONDS = 60.0
PEERS = {
    "vllm-router, round robin": ("vllm-router", ["bin/vllm-router", "--policy", "round_robin"]),
    "vllm-router, cache-aware": ("vllm-router", ["bin/vllm-router", "--policy", "cache_aware"]),
    "sglang-router, cache-aware": (
        "sglang-router",
        ["bin/python", "-m", "sglang_router.launch_router", "--policy", "cache_aware"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    for venv, _ in PEERS.values():
        install(venv)
    config = RouterBenchConfig(seconds=options.seconds)
    results = {"relevo": uvloop.run(bench_router(config))}
    for name, (venv, command) in PEERS.items():
        results[name] = uvloop.run(bench_peer(config, ROOT / ".peers" / venv, command))
    Console(width=160).print(table(results))
    if options.json is not None:
        figures = {name: result.as_dict() for name, result in results.items()}
        options.json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2))


async def bench_peer(config: RouterBenchConfig, venv: Path, command: list[str]) -> RouterBenchResult:
    texts = prompts(config.input_len, NUM_PROMPTS)
    with ExitStack() as stack:
        router_core, other_core = pin(stack)
        workers = [BenchWorker(stack, "bench.peers.router_worker", other_core) for _ in range(config.num_workers)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        urls = [f"http://{worker.address}" for worker in workers]
        flags = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls, "--log-level", "error"]
        process = _start(stack, [str(venv / command[0]), *command[1:], *flags], router_core)
        _wait_ready(port, process)
        return await measure(config, texts, workers, process.pid, port)


def _start(stack: ExitStack, command: list[str], core: int) -> subprocess.Popen[bytes]:
    pinned = ["taskset", "--cpu-list", str(core), *command]  # before it makes threads
    process = subprocess.Popen(pinned, stdout=subprocess.DEVNULL)
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)
    return process


def _wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until it answers a completion."""
    end = time.monotonic() + START_SECONDS
    ask = {"model": "bench", "prompt": "a", "max_tokens": 1}
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=ask, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{process.args!r} does not answer")


def table(results: dict[str, RouterBenchResult]) -> Table:
    found = Table(title="routers on one core")
    found.add_column("")
    rates = [case.rate for case in next(iter(results.values())).streams]
    headings = [f"CPU ms / 1,000 at {rate // 1000}k" if rate else "most tokens/s (CPU ms / 1,000)" for rate in rates]
    for heading in ("requests/s", "CPU ms a request", *headings, "TTFT p50 / p99 ms", "RSS MiB"):
        found.add_column(heading, justify="right")
    for name, result in results.items():
        streams = [
            f"{case.cpu_ms_per_1000_tokens:.1f}"
            if case.rate
            else f"{case.tokens_per_second:.0f} ({case.cpu_ms_per_1000_tokens:.1f})"
            for case in result.streams
        ]
        found.add_row(
            name,
            f"{result.requests_per_second:.0f}",
            f"{result.cpu_ms_per_request:.3f}",
            *streams,
            f"{result.added_ttft_p50_ms:.2f} / {result.added_ttft_p99_ms:.2f}",
            f"{result.rss_mib:.0f}",
        )
    return found


if __name__ == "__main__":
    main()
