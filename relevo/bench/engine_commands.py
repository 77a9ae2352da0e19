"""relevo bench latency, throughput and ceiling: what an engine and the machine under it can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from relevo.bench.commands import integers, needs_engine, progress, spinner, write_json
from relevo.bench.tables import ceiling_tables, latency_table, throughput_table
from relevo.core.errors import InvalidRequest
from relevo.engine_options import EngineOptions, takes_engine_options

if TYPE_CHECKING:
    from relevo.bench.workload import Ask
    from relevo.engine.engine import Engine

Model = Annotated[str | None, typer.Argument(help="Hugging Face id or local folder; nothing: the bundled demo model")]
InputLen = Annotated[int, typer.Option(min=1, help="tokens in a random prompt")]
OutputLen = Annotated[int, typer.Option(min=1, help="tokens in an answer")]
PromptSeed = Annotated[int, typer.Option(help="of random prompts")]
Json = Annotated[Path | None, typer.Option(help="also write the figures to this file")]
CeilingFile = Annotated[
    Path | None, typer.Option(help="of `relevo bench ceiling MODEL --json`: how far from it is this?")
]


def add_engine_commands(app: typer.Typer) -> None:
    for command in (latency, throughput):
        app.command()(takes_engine_options(command))
    app.command()(ceiling)


def latency(
    model: Model = None,
    *,
    engine: EngineOptions,
    batch_size: Annotated[str, typer.Option(help="requests that come together; several: 1,8,32")] = "1,8,32",
    input_len: InputLen = 256,
    output_len: OutputLen = 64,
    num_runs: Annotated[int, typer.Option(min=1, help="measured, per batch size; one more goes before")] = 3,
    prompt_seed: PromptSeed = 0,
    ceiling: CeilingFile = None,
    json: Json = None,
) -> None:
    """Prefill time and TPOT of an engine by itself, for batches that come together."""
    sizes = integers("--batch-size", batch_size)
    built = _engine(model, engine)
    from relevo.bench.engine import bench_latency
    from relevo.bench.model_ceiling import read_ceiling

    limit = None if ceiling is None else read_ceiling(ceiling)
    results = []
    with progress("batch sizes", len(sizes)) as advance:
        for size in sizes:
            results.append(
                bench_latency(
                    built,
                    batch_size=size,
                    input_len=input_len,
                    output_len=output_len,
                    num_runs=num_runs,
                    seed=prompt_seed,
                )
            )
            advance()
    Console().print(latency_table(results, limit))
    write_json(json, [result.as_dict() for result in results])


def throughput(
    model: Model = None,
    *,
    engine: EngineOptions,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="all there from the start. Default: 64; a whole file")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help='JSONL: {"prompt": text or token ids, "output_len": tokens}. Default: random')
    ] = None,
    input_len: InputLen = 256,
    output_len: OutputLen = 64,
    prompt_seed: PromptSeed = 0,
    json: Json = None,
) -> None:
    """Tokens a second of an engine by itself, all requests there from the start."""
    from relevo.bench.workload import file_asks, random_asks

    asks = None if dataset is None else file_asks(dataset, output_len=output_len)[:num_requests]
    built = _engine(model, engine)
    from relevo.bench.engine import bench_throughput

    if asks is None:
        asks = random_asks(
            num_requests or 64,
            input_len=input_len,
            output_len=output_len,
            vocab_size=built.info.vocab_size,
            seed=prompt_seed,
        )
    requests = _tokenized(model, asks)
    with progress("requests", len(requests)) as advance:
        result = bench_throughput(built, requests, advance)
    Console().print(throughput_table(result))
    write_json(json, result.as_dict())


def ceiling(
    model: Annotated[
        str | None, typer.Argument(help="also what the machine allows for this one; its config.json is enough")
    ] = None,
    *,
    dtype: Annotated[
        str, typer.Option(help="several: float32,bfloat16,float16,int8; the first is the model's")
    ] = "float32",
    input_len: InputLen = 256,
    output_len: OutputLen = 64,
    concurrency: Annotated[str, typer.Option(help="several: 1,8,32")] = "1,8,32",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one a core that there is for us")] = None,
    json: Json = None,
) -> None:
    """What this machine's CPU allows: products of matrices larger than its caches, and memory bandwidth."""
    levels = integers("--concurrency", concurrency)
    dtypes = [name.strip() for name in dtype.split(",")]
    torch_modules = _torch_modules()
    if unknown := [name for name in dtypes if name not in torch_modules.DTYPES]:
        raise typer.BadParameter(f"--dtype {unknown[0]!r}: give some of {', '.join(torch_modules.DTYPES)}")
    from relevo.bench.model_ceiling import Ceiling, model_cost
    from relevo.engine.threads import set_num_threads
    from relevo.model_files import resolve_model

    cost = None if model is None else model_cost(resolve_model(model, weights=False))
    set_num_threads(threads)
    with spinner("measuring") as update:
        machine = torch_modules.measure_machine(dtypes, advance=update)
    limit = None if cost is None else Ceiling(machine, cost, dtypes[0])
    console = Console()
    for table in ceiling_tables(machine, limit, levels, input_len, output_len):
        console.print(table)
    for reason in machine.missing:
        console.print(f"not measured: {reason}", markup=False)
    write_json(json, {"machine": machine.as_dict()} if limit is None else limit.as_dict())


def _torch_modules() -> Any:
    with needs_engine():
        from relevo.bench import ceiling
    return ceiling


def _engine(model: str | None, options: EngineOptions) -> Engine:
    with needs_engine():
        from relevo.engine.config import EngineConfig
        from relevo.engine.engine import Engine
    with spinner("starting the engine"):
        return Engine(EngineConfig(model=model, **options))


def _tokenized(model: str | None, asks: list[Ask]) -> list[tuple[list[int], int]]:
    texts = [ask.prompt for ask in asks if isinstance(ask.prompt, str)]
    if not texts:
        return [(ask.prompt, ask.output_len) for ask in asks if isinstance(ask.prompt, list)]
    from relevo.model_files import resolve_model
    from relevo.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(resolve_model(model))
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer: the file must hold token ids", "dataset")
    return [
        (tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt, ask.output_len) for ask in asks
    ]
