"""relevo bench …"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from relevo.bench.commands import integers, numbers, progress, write_json
from relevo.bench.engine_commands import add_engine_commands
from relevo.bench.fairness import add_fairness_command
from relevo.bench.handover_command import add_handover_command
from relevo.bench.kv_command import add_kv_command
from relevo.bench.quantization_command import add_quantization_command
from relevo.bench.route_command import add_route_command
from relevo.bench.router_command import add_router_command
from relevo.bench.sampling import add_sampling_command
from relevo.bench.spec_command import add_spec_command

app = typer.Typer(no_args_is_help=True, help="Measure.", rich_markup_mode=None)


@app.callback()
def root() -> None:
    """Measure."""


@app.command()
def serve(
    *,
    url: Annotated[str, typer.Option(help="endpoint, without /v1")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="default: the first that the endpoint lists")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="RELEVO_API_KEY")] = None,
    concurrency: Annotated[str, typer.Option(help="requests at the same time; several: 1,8,32")] = "1,8,32",
    request_rate: Annotated[
        str | None, typer.Option(help="instead: requests a second, arriving as a Poisson process; several: 0.5,1,2")
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, help="measured, per level. Default: 16, or twice the concurrency; a whole file"),
    ] = None,
    num_warmup: Annotated[
        int | None, typer.Option(min=0, help="not measured, before them. Default: the concurrency, at most 8")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help='JSONL: {"prompt": text or token ids, "output_len": tokens}. Default: random')
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="tokens in a random prompt")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="tokens in an answer")] = 64,
    vocab_size: Annotated[int, typer.Option(min=2, help="random prompts are token ids below this")] = 1000,
    seed: Annotated[int, typer.Option(help="of random prompts and arrivals")] = 0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="goodput: requests a second whose TTFT is within")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="goodput: … and whose TPOT is within")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="ask for answers of full length; not every server knows it")] = True,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds without a byte after which a request failed")] = 600,
    ceiling: Annotated[
        Path | None, typer.Option(help="of `relevo bench ceiling MODEL --json`: how far from it is this?")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
) -> None:
    """Latency and throughput of an OpenAI-compatible endpoint (Relevo's or another's), as a client sees them."""
    import uvloop

    from relevo.bench.serve import ServeBenchConfig, bench_serve  # and with it httpx, which `relevo serve` does without
    from relevo.bench.statistics import Slo
    from relevo.bench.tables import serve_ceiling_table, serve_remarks, serve_table
    from relevo.bench.workload import file_asks, random_asks

    from_file = None if dataset is None else file_asks(dataset, output_len=output_len)[:num_requests]
    levels: list[tuple[int | None, float | None]] = [(level, None) for level in integers("--concurrency", concurrency)]
    if request_rate is not None:
        levels = [(None, rate) for rate in numbers("--request-rate", request_rate)]
    results = []
    for index, (level, rate) in enumerate(levels):
        # No prompt of one level is in the cache from another, none of the warm-up's either.
        warmup = random_asks(
            min(level or 1, 8) if num_warmup is None else num_warmup,
            input_len=input_len,
            output_len=output_len,
            vocab_size=vocab_size,
            seed=seed + 1000 * index + 999,
        )
        asks = from_file or random_asks(
            num_requests or max(16, 2 * (level or 1)),
            input_len=input_len,
            output_len=output_len,
            vocab_size=vocab_size,
            seed=seed + 1000 * index,
        )
        config = ServeBenchConfig(
            url=url,
            model=model,
            api_key=api_key,
            concurrency=level,
            request_rate=rate,
            seed=seed,
            slo=Slo(slo_ttft_ms, slo_tpot_ms),
            ignore_eos=ignore_eos,
            timeout_seconds=timeout,
        )
        with progress(f"concurrency {level}" if rate is None else f"{rate:g} requests/s", len(asks)) as advance:
            results.append(uvloop.run(bench_serve(config, asks, warmup, advance)))
    title = f"{input_len} tokens in, {output_len} out" if dataset is None else str(dataset)
    console = Console()
    console.print(serve_table(f"{title}; p50/p99", results))
    if ceiling is not None:
        from relevo.bench.model_ceiling import read_ceiling

        console.print(serve_ceiling_table(results, read_ceiling(ceiling), input_len, output_len))
    for remark in serve_remarks(results):
        console.print(remark, markup=False)
    write_json(json, [result.as_dict() for result in results])


add_engine_commands(app)
add_route_command(app)
add_kv_command(app)
add_router_command(app)
add_spec_command(app)
add_handover_command(app)
add_quantization_command(app)
add_sampling_command(app)
add_fairness_command(app)
