"""relevo bench route"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import progress, write_json
from relevo.bench.statistics import Slo


def add_route_command(app: typer.Typer) -> None:
    app.command(name="route")(route)


def route(
    trace: Annotated[
        Path, typer.Argument(help="JSONL as Mooncake publishes it: timestamp, input_length, output_length, hash_ids")
    ],
    *,
    prefill: Annotated[int, typer.Option(min=0, help="prefill workers")] = 4,
    decode: Annotated[int, typer.Option(min=0, help="decode workers; 0: answers are not modelled")] = 0,
    prefill_rate: Annotated[float, typer.Option(min=1, help="a prefill worker's tokens a second")] = 15_000,
    pool_blocks: Annotated[int, typer.Option(min=1, help="blocks of 512 tokens in a prefill worker's pool")] = 5_000,
    decode_prefill_rate: Annotated[
        float | None, typer.Option(min=1, help="a decode worker's prompt tokens a second. Default: --prefill-rate")
    ] = None,
    decode_pool_blocks: Annotated[
        int | None, typer.Option(min=1, help="… in a decode worker's pool. Default: --pool-blocks")
    ] = None,
    step_ms: Annotated[float, typer.Option(min=0, help="a decode worker's step")] = 20,
    step_ms_per_request: Annotated[float, typer.Option(min=0, help="… and what each answer adds to it")] = 0.5,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="answers that a decode worker writes at a time")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="tokens in a step")] = 8_192,
    kv_bytes_per_token: Annotated[int, typer.Option(min=0, help="of a prompt's KV, on its way to decode")] = 131_072,
    bandwidth_gbps: Annotated[float, typer.Option(min=0.001, help="of that way, in GB/s")] = 10,
    answer_ms_per_token: Annotated[
        float, typer.Option(min=0, help="--decode 0: so long do policies that count requests count one, a token")
    ] = 30,
    policy: Annotated[list[str] | None, typer.Option(help="may be repeated. Default: all")] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="goodput: requests a second whose TTFT is within")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="goodput: … and whose TPOT is within")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many of the trace's first requests")] = None,
    seed: Annotated[int, typer.Option(help="of the policy `random`")] = 0,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
) -> None:
    """Placement policies compared: a trace in virtual time over modelled workers, through the router's own code."""
    from relevo.bench.route import ALL_POLICIES, RouteBenchConfig, bench_route
    from relevo.bench.route_trace import read_trace

    policies = policy or list(ALL_POLICIES)
    if unknown := [name for name in policies if name not in ALL_POLICIES]:
        raise typer.BadParameter(f"--policy {unknown[0]!r}: there are {', '.join(ALL_POLICIES)}")
    config = RouteBenchConfig(
        num_prefill=prefill,
        num_decode=decode,
        prefill_tokens_per_second=prefill_rate,
        pool_blocks=pool_blocks,
        decode_prefill_tokens_per_second=decode_prefill_rate or prefill_rate,
        decode_pool_blocks=decode_pool_blocks or pool_blocks,
        step_seconds=step_ms / 1000,
        step_seconds_per_request=step_ms_per_request / 1000,
        answer_seconds_per_token=answer_ms_per_token / 1000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        bytes_per_token=kv_bytes_per_token,
        bandwidth_bytes_per_second=bandwidth_gbps * 1e9,
        slo=Slo(slo_ttft_ms, slo_tpot_ms),
        seed=seed,
    )
    requests = read_trace(trace, limit)
    figures: dict[str, dict[str, Any]] = {}
    with progress(f"{len(requests)} requests", len(policies)) as advance:
        for name in policies:
            figures[name] = bench_route(config, requests, name)
            advance()
    Console().print(_table(figures))
    write_json(json, {"trace": str(trace), "config": config, "policies": figures})


def _table(figures: dict[str, dict[str, Any]]) -> Table:
    columns = [
        ("hit rate", "hit_rate", "{:.3f}"),
        ("TTFT mean", "ttft_mean_s", "{:.3f} s"),
        ("p50", "ttft_p50_s", "{:.3f} s"),
        ("p99", "ttft_p99_s", "{:.2f} s"),
        ("TPOT p50", "tpot_p50_s", "{:.4f} s"),
        ("p99", "tpot_p99_s", "{:.4f} s"),
        ("goodput/s", "goodput_rps", "{:.2f}"),
        ("in SLO", "slo_attainment", "{:.3f}"),
    ]
    shown = [column for column in columns if column[1] in next(iter(figures.values()))]
    table = Table("policy", *(heading for heading, _, _ in shown))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in figures.items():
        table.add_row(name, *(form.format(values[key]) for _, key, form in shown))
    return table
