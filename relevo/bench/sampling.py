"""relevo bench sampling: what choosing a token costs at a vocabulary's size, by filter, on one core."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import needs_engine, write_json
from relevo.bench.engine_commands import Json

# name → temperature, min_p, top_k, top_p
FILTERS: dict[str, tuple[float, float, int, float]] = {
    "none": (0.8, 0.0, 0, 1.0),
    "min_p 0.05": (0.8, 0.05, 0, 1.0),
    "top_k 50": (0.8, 0.0, 50, 1.0),
    "top_p 0.9": (0.8, 0.0, 0, 0.9),
    "top_p 0.999": (0.8, 0.0, 0, 0.999),
    "top_k 50, top_p 0.9": (0.8, 0.0, 50, 0.9),
}


def add_sampling_command(app: typer.Typer) -> None:
    app.command()(sampling)


def sampling(
    *,
    vocab_size: Annotated[int, typer.Option(min=2)] = 151_936,
    batch: Annotated[int, typer.Option(min=1, help="rows")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="the quickest counts")] = 9,
    json: Json = None,
) -> None:
    """Milliseconds a row: of this thread's CPU time, so that other work on the machine hardly matters."""
    with needs_engine():
        import torch

        from relevo.kernels import load_backend
    torch.set_num_threads(1)
    kernels = load_backend("cpu", "cpu")
    kernels.warm_up(torch.float32)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, vocab_size, generator=generator)
    peaked = 3.0 * flat
    peaked[:, ::997] += 12.0 * torch.rand(peaked[:, ::997].shape, generator=generator)
    uniforms = [(i + 0.5) / batch for i in range(batch)]
    figures: list[dict[str, Any]] = []
    for name, (temperature, min_p, top_k, top_p) in FILTERS.items():
        filters = ([temperature] * batch, [min_p] * batch, [top_k] * batch, [top_p] * batch, uniforms)
        row: dict[str, Any] = {"filter": name}
        for shape, logits in (("flat", flat), ("peaked", peaked)):
            seconds = []
            for _ in range(rounds):
                started = time.thread_time()
                kernels.sample(logits, *filters)
                seconds.append(time.thread_time() - started)
            row[f"{shape}_ms_per_row"] = 1000.0 * min(seconds) / batch
        figures.append(row)
    table = Table(title=f"sampling {batch} rows of {vocab_size} logits on one core, ms a row")
    for heading in ("filters", "flat: N(0, 1)", "peaked"):
        table.add_column(heading)
    for row in figures:
        table.add_row(row["filter"], f"{row['flat_ms_per_row']:.3f}", f"{row['peaked_ms_per_row']:.3f}")
    Console().print(table)
    write_json(json, figures)
