"""relevo bench router."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import integers, spinner, write_json

if TYPE_CHECKING:
    from relevo.bench.router import RouterBenchResult


def add_router_command(app: typer.Typer) -> None:
    app.command()(router)


def router(
    *,
    workers: Annotated[int, typer.Option(min=1, help="decode workers without a model")] = 2,
    input_len: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 256,
    rates: Annotated[str, typer.Option(help="tokens a second from the workers; several: 13000,40000")] = "13000,40000",
    streams: Annotated[int, typer.Option(min=1, help="answers streamed at the same time")] = 64,
    clients: Annotated[int, typer.Option(min=1, help="that ask for whole answers of 16 tokens")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="for each figure")] = 5.0,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
) -> None:
    """What the router costs, tokenizing, placing and detokenizing included: on one core, before model-free workers."""
    import uvloop

    from relevo.bench.router import RouterBenchConfig, bench_router

    config = RouterBenchConfig(
        num_workers=workers,
        input_len=input_len,
        rates=[*integers("--rates", rates), 0],
        num_streams=streams,
        num_clients=clients,
        seconds=seconds,
    )
    with spinner("measuring"):
        result = uvloop.run(bench_router(config))
    Console().print(router_table(result))
    write_json(json, result.as_dict())


def router_table(result: RouterBenchResult) -> Table:
    table = Table(title="the router on one core", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("requests/s, 16 tokens each, not streamed", f"{result.requests_per_second:.0f}"),
        ("CPU ms a request", f"{result.cpu_ms_per_request:.3f}"),
        ("workers' and client's share of their core", f"{result.others_share:.2f}"),
        ("added TTFT at low load, p50 / p99", f"{result.added_ttft_p50_ms:.2f} / {result.added_ttft_p99_ms:.2f} ms"),
    ]
    for case in result.streams:
        asked = f"{case.rate} tokens/s" if case.rate else "as many as it can"
        rows += [
            (f"streamed, {asked}: tokens/s", f"{case.tokens_per_second:.0f}"),
            ("  CPU ms for 1,000 tokens", f"{case.cpu_ms_per_1000_tokens:.1f}"),
            ("  the router's and the others' share of a core", f"{case.router_share:.2f} / {case.others_share:.2f}"),
        ]
    if result.scaling is not None:
        scaling = result.scaling
        rows += [
            ("two processes: CPU ms a request", f"{scaling.cpu_ms_per_request:.3f}"),
            ("  what they can serve, by CPU time, against one", f"{scaling.capacity_ratio:.2f} ×"),
        ]
    rows.append(("RSS", f"{result.rss_mib:.0f} MiB"))
    for row in rows:
        table.add_row(*row)
    return table
