"""relevo bench …"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from relevo.core.errors import RelevoError

if TYPE_CHECKING:
    from relevo.bench.serve import ServeBenchConfig, ServeBenchResult

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
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="measured, per concurrency. Default: 16, or twice the concurrency")
    ] = None,
    num_warmup: Annotated[
        int | None, typer.Option(min=0, help="not measured, before them. Default: the concurrency")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="tokens in a prompt")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="tokens in an answer")] = 64,
    vocab_size: Annotated[int, typer.Option(min=2, help="prompts are random token ids below this")] = 1000,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
) -> None:
    """Latency and throughput of an OpenAI-compatible endpoint (Relevo's or another's), as a client sees them."""
    from relevo.bench.serve import ServeBenchConfig  # and with it httpx, which `relevo serve` does without

    results = []
    for index, level in enumerate(_levels(concurrency)):
        config = ServeBenchConfig(
            url=url,
            model=model,
            api_key=api_key,
            concurrency=level,
            num_requests=num_requests or max(16, 2 * level),
            num_warmup_requests=level if num_warmup is None else num_warmup,
            input_len=input_len,
            output_len=output_len,
            vocab_size=vocab_size,
            seed=seed + index,  # no prompt of one level is in the cache from another
        )
        results.append(asyncio.run(_one_error(config)))
        Console(stderr=True).print(f"concurrency {level}: done")
    Console().print(_table(results))
    if json is not None:
        json.write_bytes(orjson.dumps([result.as_dict() for result in results], option=orjson.OPT_INDENT_2))


async def _one_error(config: ServeBenchConfig) -> ServeBenchResult:
    """Of a group of failed requests the first says it all."""
    from relevo.bench.serve import bench_serve

    try:
        return await bench_serve(config)
    except* RelevoError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise typer.BadParameter(f"{text!r}: give numbers from 1 on, e.g. 1,8,32")
    return levels


def _table(results: list[ServeBenchResult]) -> Table:
    first = results[0]
    table = Table(title=f"{first.input_len} tokens in, {first.output_len} out")
    for heading in ("concurrency", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99", "tokens/s", "requests/s"):
        table.add_column(heading, justify="right")
    for each in results:
        times = (
            each.ttft_ms_p50,
            each.ttft_ms_p99,
            each.tpot_ms_p50,
            each.tpot_ms_p99,
            each.itl_ms_p50,
            each.itl_ms_p99,
        )
        rates = (each.output_tokens_per_second, each.requests_per_second)
        table.add_row(str(each.concurrency), *(f"{ms:.1f} ms" for ms in times), *(f"{rate:.2f}" for rate in rates))
    return table
