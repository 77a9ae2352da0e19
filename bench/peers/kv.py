"""`relevo bench kv`, and other projects' transfer engines beside it in the same run: `python -m bench.peers.kv`.

NIXL and Mooncake come from PyPI into virtual environments of their own (bench/peers/install.sh). Mooncake also needs
the system's libibverbs (Debian: libibverbs1). Nothing else heavy should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from bench.peers.servers import ROOT, install
from relevo.bench.kv import KvBenchConfig, KvBenchResult, bench_kv
from relevo.bench.kv_command import kv_table
from relevo.core.sizes import format_size

PEER_SECONDS = 120.0
PEERS = {
    "NIXL, UCX's choice": ("nixl", {}),
    "NIXL, tcp": ("nixl", {"UCX_TLS": "tcp"}),
    "Mooncake, tcp": ("mooncake", {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", default="shared memory,tcp", help="of relevo")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    for venv, _ in PEERS.values():
        install(venv)
    config = KvBenchConfig(paths=options.paths.split(","))
    ours = bench_kv(config)
    theirs = {name: measure(venv, extra, config) for name, (venv, extra) in PEERS.items()}
    console = Console()
    console.print(kv_table(ours))
    console.print(peer_table(ours, theirs))
    if options.json is not None:
        options.json.write_bytes(orjson.dumps({"ours": ours.as_dict(), "peers": theirs}, option=orjson.OPT_INDENT_2))


def measure(venv: str, extra: dict[str, str], config: KvBenchConfig) -> list[dict[str, Any]]:
    """One peer, all sizes; nothing for those that fail, which says so on standard error."""
    python = ROOT / ".peers" / venv / "bin" / "python"
    counts = ",".join(map(str, config.num_blocks))
    figures = []
    for block_bytes in config.block_bytes:
        command = [str(python), str(ROOT / "bench/peers/kv_peer.py"), venv, str(block_bytes), counts]
        done = subprocess.run(
            command, env=os.environ | extra, stdout=subprocess.PIPE, timeout=PEER_SECONDS, check=False
        )
        figures += [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    return figures


def peer_table(ours: KvBenchResult, theirs: dict[str, list[dict[str, Any]]]) -> Table:
    """Peers check nothing; theirs ends with the bytes at the reader, as our `chunk` does."""
    table = Table(title="others, from buffer to buffer")
    for heading in ("path", "blocks", "GB/s", "CPU s/GB", "ms", "relevo's best chunk GB/s"):
        table.add_column(heading, justify="left" if heading in ("path", "blocks") else "right")
    for name, figures in theirs.items():
        for each in figures:
            key = (each["block_bytes"], each["num_blocks"])
            same = [case.chunk_gb_per_second for case in ours.cases if (case.block_bytes, case.num_blocks) == key]
            table.add_row(
                name,
                f"{each['num_blocks']} × {format_size(each['block_bytes'])}",
                f"{each['gb_per_second']:.2f}",
                f"{each['cpu_seconds_per_gb']:.3f}",
                f"{each['ms']:.3f}",
                f"{max(same, default=0.0):.2f}",
            )
    return table


if __name__ == "__main__":
    main()
