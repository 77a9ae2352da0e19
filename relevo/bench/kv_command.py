"""relevo bench kv."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import integers, write_json
from relevo.core.sizes import format_size, parse_size

if TYPE_CHECKING:
    from relevo.bench.kv import KvBenchResult, KvCase


def add_kv_command(app: typer.Typer) -> None:
    app.command()(kv)


def kv(
    *,
    paths: Annotated[
        str, typer.Option(help="shared memory, and transports between two agents; several: shared memory,tcp,nixl")
    ] = "shared memory,tcp",
    block_bytes: Annotated[str, typer.Option(help="sizes of a block; several: 196608,2MiB")] = "196608,2MiB",
    num_blocks: Annotated[str, typer.Option(help="blocks at once; several: 1,16,256")] = "1,16,256",
    seconds: Annotated[float, typer.Option(min=0.01, help="for each figure")] = 1.0,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
) -> None:
    """How fast KV blocks get from one worker's pool into another's, on one host and between two agents."""
    from relevo.bench.kv import KvBenchConfig, bench_kv

    try:
        sizes = [parse_size(part) for part in block_bytes.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    config = KvBenchConfig(
        paths=[path.strip() for path in paths.split(",")],
        block_bytes=sizes,
        num_blocks=integers("--num-blocks", num_blocks),
        seconds=seconds,
    )
    result = bench_kv(config)
    console = Console()
    console.print(kv_table(result))
    for path, link in result.links.items():
        console.print(f"{path}: {link}")
    write_json(json, result.as_dict())


def kv_table(result: KvBenchResult) -> Table:
    caption = "chunk: sealed → in the reader's pool. whole: with the writer's copy"
    table = Table(title="KV blocks from pool to pool", caption=caption)
    for heading in ("path", "blocks"):
        table.add_column(heading)
    for heading in ("chunk GB/s", "CPU s/GB", "ms", "whole GB/s", "CPU s/GB"):
        table.add_column(heading, justify="right")
    for case in (*result.memcpy, *result.cases):
        table.add_row(*_row(case))
    return table


def _row(case: KvCase) -> tuple[str, ...]:
    figures = (
        (case.chunk_gb_per_second, 2),
        (case.chunk_cpu_seconds_per_gb, 3),
        (case.chunk_ms, 3),
        (case.whole_gb_per_second, 2),
        (case.whole_cpu_seconds_per_gb, 3),
    )
    blocks = f"{case.num_blocks} × {format_size(case.block_bytes)}"
    return case.path, blocks, *("" if value is None else f"{value:.{digits}f}" for value, digits in figures)
