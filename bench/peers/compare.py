"""Relevo and its peers, alternately, on the same cores, over HTTP; prints ratios. `make bench-peers` runs it.

Every contender is started, measured and stopped once a round, in turn. Weights are random and prompts too, so that
no prefix cache helps anybody; all answers have the full length. Nothing else heavy should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers.report import AT_CEILING, FIGURES, Round, all_targets, medians, ratio
from bench.peers.servers import OURS, PEERS, ROOT, Server, Setting, install, prepare, running
from relevo.bench.model_ceiling import Ceiling, read_ceiling
from relevo.bench.serve import ServeBenchConfig, ServeBenchResult, bench_serve
from relevo.bench.workload import random_asks
from relevo.core.errors import RelevoError

INPUT_LEN, OUTPUT_LEN = 256, 64
VOCAB_SIZE = 1000
NUM_REQUESTS = {1: 4, 8: 8, 32: 32}  # measured at each concurrency


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # not at once: servers are ended on the way out
    options = _options()
    setting = Setting(options.shape.resolve(), options.dtype, options.relevo.split())
    for peer in options.peers:
        install(peer)
        prepare(peer, setting)
    folder = options.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    ceiling = _measure_ceiling(setting, folder / "ceiling.json")
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cpu": _cpu_name(), "cores": sorted(os.sched_getaffinity(0)), "python": platform.python_version()},
        "setting": {
            "shape": setting.shape.name,
            "dtype": setting.dtype,
            "input_len": INPUT_LEN,
            "output_len": OUTPUT_LEN,
        },
        "ceiling": ceiling.as_dict(),
        "rounds": [],
    }
    for number in range(options.rounds):
        results = {}
        for name in (*OURS, *options.peers):
            results[name] = _measure(name, setting, seed=1000 * number)
            print(f"round {number + 1}, {name}: {_short(results[name])}", flush=True)
        record["rounds"].append(results)
        options.json.write_text(json.dumps(record, indent=1))  # what was measured is kept, whatever comes
    _print_report(record["rounds"], options.peers, ceiling)
    print(f"\nall figures: {options.json}")
    if failed := sorted({name for each in record["rounds"] for name, result in each.items() if "error" in result}):
        sys.exit(f"not all were measured: {', '.join(failed)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--peers", type=_peer_list, default=list(PEERS), help="vllm,openvino")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--shape", type=Path, default=ROOT / "bench/shapes/qwen2.5-0.5b")
    parser.add_argument("--relevo", default="", help="more options for `relevo serve`, in one argument")
    parser.add_argument("--json", type=Path, default=ROOT / "build/bench-peers.json")
    return parser.parse_args()


def _peer_list(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"no such peer: {unknown[0]}; there are {', '.join(PEERS)}")
    return names


def _measure_ceiling(setting: Setting, path: Path) -> Ceiling:
    """In a process of its own: none of its memory or threads stays."""
    command = [sys.executable, "-m", "relevo.cli", "bench", "ceiling", str(setting.shape), "--dtype", setting.dtype]
    subprocess.run([*command, "--json", str(path)], check=True)
    return read_ceiling(path)


def _measure(name: str, setting: Setting, seed: int) -> dict[str, Any]:
    """One contender, one round. An endpoint that fails is a result too."""
    try:
        with running(name, setting) as server:
            return _measure_server(server, seed)
    except (RelevoError, RuntimeError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _measure_server(server: Server, seed: int) -> dict[str, Any]:
    results: dict[int, ServeBenchResult] = {}
    for level in NUM_REQUESTS:
        before = server.cpu_seconds()
        results[level] = asyncio.run(_bench(server.url, level, seed + level))
        after = server.cpu_seconds()
    cpu_seconds = {role: after[role] - before.get(role, 0.0) for role in after}
    return {
        "figures": {
            "ttft_c1_ms": results[1].figures["ttft_ms_p50"],
            "tpot_c1_ms": results[1].figures["tpot_ms_p50"],
            "tpot_c8_ms": results[8].figures["tpot_ms_p50"],
            "itl_c32_ms": results[32].figures["itl_ms_p50"],
            "tokens_per_second_c32": results[32].output_tokens_per_second,
            "start_seconds": server.seconds_to_ready,
        },
        "cpu_seconds_c32": cpu_seconds,
        "peak_rss_bytes": server.peak_rss_bytes(),
        "serve": {str(level): result.as_dict() for level, result in results.items()},
    }


async def _bench(url: str, level: int, seed: int) -> ServeBenchResult:
    lengths = {"input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "vocab_size": VOCAB_SIZE}
    asks = random_asks(NUM_REQUESTS[level], seed=seed, **lengths)
    warmup = random_asks(1, seed=seed + 500, **lengths)
    return await bench_serve(ServeBenchConfig(url=url, concurrency=level), asks, warmup)


def _short(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAILED: {result['error']}"
    figures = ", ".join(f"{FIGURES[name]} {value:.1f}" for name, value in result["figures"].items())
    failures = [reason for each in result["serve"].values() for reason in each["failures"]]
    return figures + (f"; FAILED REQUESTS: {failures[0]}" if failures else "")


def _print_report(results: list[dict[str, Any]], peers: list[str], ceiling: Ceiling) -> None:
    rounds: list[Round] = [
        {name: result["figures"] for name, result in each.items() if "figures" in result} for each in results
    ]
    console = Console()
    console.print(_median_table(rounds, peers, ceiling))
    console.print(_ratio_table(rounds, peers))
    console.print(_process_table(results))


def _median_table(rounds: list[Round], peers: list[str], ceiling: Ceiling) -> Table:
    allowed = _at_ceiling(ceiling)
    table = Table("", *OURS, *peers, "the machine", "relevo of it", title=f"Medians of {len(rounds)} rounds")
    ours = medians(rounds, "relevo")
    for figure, heading in FIGURES.items():
        row = [f"{medians(rounds, name).get(figure, float('nan')):.1f}" for name in (*OURS, *peers)]
        if figure in allowed:
            row += [f"{allowed[figure]:.1f}", f"{ours.get(figure, float('nan')) / allowed[figure]:.2f} x"]
        table.add_row(heading, *row)
    return table


def _at_ceiling(ceiling: Ceiling) -> dict[str, float]:
    context_len = INPUT_LEN + OUTPUT_LEN / 2
    values = (
        ceiling.ttft_ms(INPUT_LEN),
        ceiling.tpot_ms(1, context_len),
        ceiling.tpot_ms(8, context_len),
        ceiling.tpot_ms(32, context_len),
        ceiling.tokens_per_second(32, INPUT_LEN, OUTPUT_LEN),
    )
    return dict(zip(AT_CEILING, values, strict=True))


def _ratio_table(rounds: list[Round], peers: list[str]) -> Table:
    table = Table("", "of", "to", "ratio", "rounds", "target", "", title="Ratios of medians")
    for target in all_targets(peers):
        found = ratio(rounds, target.figure, target.contender, target.reference)
        if found is None:
            continue
        verdict = "" if not str(target) else "met" if target.is_met(found.value) else "MISSED"
        spread = f"{found.low:.2f}–{found.high:.2f}"
        names = FIGURES[target.figure].split(",")[0], target.contender, target.reference
        table.add_row(*names, f"{found.value:.2f}", spread, str(target), verdict)
    return table


def _process_table(results: list[dict[str, Any]]) -> Table:
    """Of the last round: peak memory, and at c=32 each process's part of the CPU time."""
    table = Table("", "process", "peak RSS, MiB", "CPU at c=32, s", "share", title="Processes, last round")
    for name, result in results[-1].items():
        seconds = result.get("cpu_seconds_c32", {})
        total = sum(seconds.values()) or 1.0
        for process, peak in result.get("peak_rss_bytes", {}).items():
            own = seconds.get(process)
            cpu = ["", ""] if own is None else [f"{own:.2f}", f"{own / total:.1%}"]
            table.add_row(name, process, f"{peak / 2**20:.0f}", *cpu)
    return table


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
